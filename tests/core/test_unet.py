"""The U-Net: silent at birth, of every size, moved by what it is told and blind to pads; the same when recomputed."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from diffusion_core.errors import ConfigError
from diffusion_core.nets import NetSpec
from diffusion_core.nets.blocks import (
    CrossAttention,
    Downsample,
    PlaceAttention,
    ResidualBlock,
    TextAttention,
    Timesteps,
    attend,
)
from diffusion_core.nets.unet import UNet, sides_of

SIZES = {"channels": 3, "size": 8, "widths": (8, 16), "depth": 1, "groups": 4, "head_width": 8}
FULL = SIZES | {"classes": 5, "attention": (4,), "text": 6, "film": True}
C = torch.tensor([-1.0, 0.0, 0.5, 2.0])
LABEL = torch.tensor([0, 4, -1, 2])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, TEXT = normal(4, 3, 8, 8), normal(4, 5, 6, seed=1)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
COND = {"label": LABEL, "text": TEXT, "mask": MASK}


def awake(module, seed=0):
    """The module with none of its weights zero."""
    torch.manual_seed(seed)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.2)
    return module


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({}, (8, 8)),
        ({"widths": (8,), "attention": (8,)}, (5, 3)),
        ({"widths": (8, 16, 8, 4), "attention": (7, 2), "size": 13, "heads": 2}, (13, 7)),
        (
            {"widths": (4, 12), "attention": (8, 4), "lopsided": True, "middle": False, "depth": 3, "head_width": 2},
            (9, 11),
        ),
        ({"text": 6, "attention": (4,), "heads": 1, "film": True, "dropout": 0.5}, (8, 16)),
        ({"channels": 1, "out_channels": 2, "period": 10_000.0, "shift": 1.0}, (1, 1)),
    ],
)
def test_the_shape_is_kept_and_the_first_word_is_zero(changes, side):
    net = UNet(**(SIZES | changes))
    x = normal(2, net.channels, *side)
    out = net(x, C[:2])
    assert out.shape == (2, changes.get("out_channels", net.channels), *side) and not out.any()
    assert awake(net)(x, C[:2]).abs().min() > 0


@torch.no_grad()
def test_residual_blocks_and_attention_are_the_identity_at_birth():
    x, steer = normal(2, 8, 4, 4), normal(2, 16)
    assert torch.equal(ResidualBlock(8, 8, 16, 4)(x, steer), x)
    assert torch.equal(PlaceAttention(8, 2, 4)(x), x)
    assert torch.equal(TextAttention(8, 2, 4, 6)(x, TEXT[:2], MASK[:2]), x)


@torch.no_grad()
def test_film_changes_nothing_at_birth_and_is_a_scale_and_a_shift_after():
    x, steer = normal(2, 8, 4, 4), normal(2, 16)
    block = ResidualBlock(8, 8, 16, 4, film=True)
    nn.init.dirac_(block.conv2.weight)  # so that what the second convolution hears is heard outside
    assert torch.equal(block(x, steer), block(x, 0 * steer))
    before = block.norm2(block.conv1(nn.functional.silu(block.norm1(x))))
    awake(block.steer)
    gamma, beta = (block.steer.weight @ steer.T + block.steer.bias[:, None]).T[:, :, None, None].tensor_split(2, 1)
    wanted = x + nn.functional.silu(before + gamma * before + beta)
    torch.testing.assert_close(block(x, steer), wanted)


@pytest.mark.parametrize("film", [False, True])
@torch.no_grad()
def test_noise_level_class_and_text_matter(film):
    net = awake(UNet(**(FULL | {"film": film})))
    out = net(X, C, COND)
    for c, cond in (
        (C + 0.1, COND),
        (C, COND | {"label": torch.tensor([1, 3, 0, -1])}),
        (C[:3], {"label": LABEL[:3], "text": TEXT[:3] + 0.5, "mask": MASK[:3]}),
        (C[:3], {"label": LABEL[:3], "text": TEXT[:3], "mask": ~MASK[:3].roll(1, 1)}),
    ):
        rows = len(c)
        moved = (net(X[:rows], c, cond) - out[:rows]).abs().amax((1, 2, 3))
        assert moved.min() > 1e-3


@torch.no_grad()
def test_what_is_not_told_is_nothing():
    net = awake(UNet(**FULL))
    nothing = {"label": torch.full((4,), -1), "text": TEXT, "mask": torch.zeros_like(MASK)}
    wanted = net(X, C, nothing)
    assert wanted.isfinite().all()
    for cond in (None, {}, {"label": nothing["label"]}, {"mask": MASK}):
        torch.testing.assert_close(net(X, C, cond), wanted, rtol=1e-6, atol=1e-6)
    plain = awake(UNet(**SIZES))
    assert torch.equal(plain(X, C, COND), plain(X, C))


@torch.no_grad()
def test_pads_are_not_seen():
    """More pads, other pads and pads elsewhere say the same; a NaN in a pad stays there."""
    net = awake(UNet(**FULL))
    out = net(X, C, COND)

    def said(text, mask):
        return net(X, C, {"label": LABEL, "text": text, "mask": mask})

    same = {"rtol": 1e-5, "atol": 1e-5 * out.abs().max().item()}
    padded = torch.cat((TEXT, normal(4, 7, 6, seed=3)), 1)
    torch.testing.assert_close(said(padded, torch.cat((MASK, torch.zeros(4, 7).bool()), 1)), out, **same)
    assert torch.equal(said(TEXT.masked_fill(~MASK[..., None], math.nan), MASK), out)
    order = torch.tensor([4, 2, 0, 3, 1])
    torch.testing.assert_close(said(TEXT[:, order], MASK[:, order]), out, **same)
    assert not torch.allclose(said(TEXT[:, order], MASK)[:3], out[:3], atol=1e-3)


def test_a_row_of_pads_alone_trains():
    """In bfloat16, where attention is written out and a softmax over nothing would be NaN."""
    net = awake(UNet(**FULL)).bfloat16()
    net(X.bfloat16(), C.bfloat16(), COND | {"text": TEXT.bfloat16()}).square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in net.parameters())


@torch.no_grad()
def test_attention_is_a_softmax_average():
    """Against the formula written out: softmax over the places where the mask is True, one head at a time."""
    q, k, v = normal(2, 7, 12), normal(2, 5, 12, seed=1), normal(2, 5, 12, seed=2)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    for where in (torch.ones_like(mask), mask):
        wanted = torch.zeros(2, 7, 12, dtype=torch.float64)
        for b in range(2):
            for head in range(3):
                part = slice(4 * head, 4 * head + 4)
                qh, kh, vh = (one[b, :, part].double() for one in (q, k[:, where[b]], v[:, where[b]]))
                weight = (qh @ kh.T / 4**0.5).exp()
                wanted[b, :, part] = weight / weight.sum(1, keepdim=True) @ vh
        out = attend(q, k, v, 3, where[:, None, None])
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(attend(q, k, v, 3), attend(q, k, v, 3, torch.ones(2, 1, 1, 5).bool()))


@torch.no_grad()
def test_cross_attention_reads_the_text_alone():
    """Where one token is real, every place hears that token's value, whatever it asks."""
    read = awake(CrossAttention(8, 2, 6))
    out = read(normal(4, 9, 8), TEXT, torch.arange(5).expand(4, 5) == 2)
    value = read.join(TEXT[:, 2] @ read.answer.weight[8:].T)
    torch.testing.assert_close(out, value[:, None].expand(4, 9, 8))


@pytest.mark.parametrize("changes", [{}, {"text": 0, "film": False}, {"dropout": 0.3}])
def test_recomputed_gradients_are_the_same_bits(changes):
    told = []
    for checkpointing in (False, True):
        net = awake(UNet(**(FULL | changes), checkpointing=checkpointing)).train()
        x = X.clone().requires_grad_()
        torch.manual_seed(1)  # of the dropout
        net(x, C, COND).square().mean().backward()
        told.append([x.grad, *(weight.grad for weight in net.parameters())])
    assert all(torch.equal(kept, again) for kept, again in zip(*told, strict=True))
    assert all(gradient.any() for gradient in told[0])


def test_recomputing_keeps_less():
    kept = []
    for checkpointing in (False, True):
        net, sizes = awake(UNet(**FULL, checkpointing=checkpointing)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.nbytes) or x, lambda x: x):
            net(X, C, COND)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_dropout_is_silent_in_evaluation():
    net = awake(UNet(**SIZES, dropout=0.5))
    assert not torch.equal(net(X, C), net(X, C))
    assert torch.equal(net.eval()(X, C), net(X, C))


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("width", [4, 64, 320])
def test_timesteps_are_those_of_the_peer_to_the_bit(width, shift):
    steps = torch.cat((torch.arange(0.0, 1000.0, 37), torch.tensor([0.5, 998.0, 999.0])))
    theirs = get_timestep_embedding(steps, width, downscale_freq_shift=shift)
    assert torch.equal(Timesteps(width, shift=shift)(steps), theirs)


@torch.no_grad()
def test_lopsided_halving_looks_right_and_down():
    """A lone pixel at (2, 2) reaches only the windows that hold it: from rows 1 to 3 or 2 to 4, by where pads are."""
    lone = torch.zeros(1, 1, 6, 6)
    lone[0, 0, 2, 2] = 1
    for lopsided, reached in ((False, [(1, 1)]), (True, [(0, 0), (0, 1), (1, 0), (1, 1)])):
        down = Downsample(1, lopsided)
        nn.init.ones_(down.conv.weight)
        nn.init.zeros_(down.conv.bias)
        assert [tuple(place) for place in down(lone)[0, 0].nonzero().tolist()] == reached


def test_sides():
    assert sides_of(32, 4) == [32, 16, 8, 4]
    assert sides_of(13, 4) == [13, 7, 4, 2]
    assert sides_of(13, 4, lopsided=True) == [13, 6, 3, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": 3}, "groups 3: groups must divide every width"),
        ({"groups": 0}, "groups 0"),
        ({"widths": (9, 18), "groups": 9}, "and 2 the first"),
        ({"widths": ()}, "numbers from 1 are wanted"),
        ({"depth": 0}, "depth 0"),
        ({"size": 0}, "size 0"),
        ({"channels": 0}, "channels 0"),
        ({"attention": (5,)}, "attention at 5; a picture of 8 has the sides 8, 4"),
        ({"heads": 5}, "heads 5: it must divide the width 16"),
        ({"heads": 0}, "heads 0"),
        ({"head_width": 5}, "head_width 5: it must divide the width 16"),
        ({"head_width": 0}, "head_width 0"),
        ({"classes": -1}, "classes -1"),
        ({"text": -1}, "text -1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"period": 1.0}, "period 1.0"),
        ({"period": 10_000.0, "shift": 4.0}, "shift 4.0"),
    ],
)
def test_impossible_numbers_are_refused_when_built(changes, words):
    with pytest.raises(ConfigError, match=words):
        UNet(**(SIZES | changes))


def test_what_does_not_fit_is_refused_when_told():
    net = UNet(**FULL)
    with pytest.raises(ConfigError, match="x has 4 channels; this network takes 3"):
        net(normal(4, 4, 8, 8), C, COND)
    with pytest.raises(ConfigError, match="text is 7 wide; this network takes 6"):
        net(X, C, COND | {"text": normal(4, 5, 7)})


def test_no_layer_mixes_the_batch():
    net = NetSpec.read({"kind": "unet", **FULL, "widths": [8, 16], "attention": [4]}, "net").build()
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    awake(net)
    with torch.no_grad():
        together = net(X, C, COND)
        for i in range(4):
            alone = net(X[i : i + 1], C[i : i + 1], {name: part[i : i + 1] for name, part in COND.items()})
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=1e-5 * together.abs().max().item())
