"""Networks: silent at birth, moved by noise level and class, blind to their batch, of the published sizes."""

import inspect

import pytest
import torch
from torch import nn

from diffusion_core.errors import ConfigError
from diffusion_core.nets import NetSpec
from diffusion_core.nets.blocks import attend
from diffusion_core.nets.dit import Block, DiT
from diffusion_core.nets.embed import LabelEmbedding, Sinusoids, grid_positions
from diffusion_core.nets.mmdit import MMDiT
from diffusion_core.nets.text import ClassNames
from diffusion_core.nets.uvit import UViT

SIZES = {"channels": 3, "size": 8, "classes": 5, "width": 32, "depth": 2, "heads": 2}
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
C = torch.tensor([-1.0, 0.0, 0.5, 2.0])
LABEL = {"label": torch.tensor([0, 4, -1, 2])}


def awake(seed=0, **sizes):
    """A network none of whose weights is zero."""
    torch.manual_seed(seed)
    net = DiT(**(SIZES | sizes))
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    return net


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_shape_is_kept_and_the_first_word_is_zero(patch):
    out = DiT(**SIZES, patch=patch)(X, C, LABEL)
    assert out.shape == X.shape and not out.any()
    assert awake(patch=patch)(X, C, LABEL).shape == X.shape


def test_a_block_is_the_identity_at_birth():
    tokens, steer = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(Block(32, 2, 4)(tokens, steer), tokens)


def test_noise_level_class_and_place_matter():
    net = awake()
    with torch.no_grad():
        out = net(X, C, LABEL)
        assert not torch.allclose(net(X, C + 0.1, LABEL), out, atol=1e-4)
        assert not torch.allclose(net(X, C, {"label": torch.tensor([1, 3, 0, 0])}), out, atol=1e-4)
        assert not torch.allclose(net(X.roll(2, -1), C, LABEL).roll(-2, -1), out, atol=1e-4)


def test_no_condition_is_the_label_no_class():
    net = awake()
    assert torch.equal(net(X, C), net(X, C, {"label": torch.full((4,), -1)}))
    embedding = LabelEmbedding(5, 8)
    assert torch.equal(embedding(torch.tensor([-1, 2])), embedding.weight[[5, 2]])


def every_kind():
    """One network of each kind, none of its weights zero: those of the table and the transformers."""
    tiny = SIZES | {"depth": 3, "text": 6, "widths": (16, 32), "groups": 8, "attention": (4,), "head": 16}
    for made in sorted({*NetSpec.known.values(), DiT, UViT, MMDiT}, key=lambda made: made.__name__):
        torch.manual_seed(0)
        taken = inspect.signature(made).parameters
        net = made(**{name: value for name, value in tiny.items() if name in taken}).eval()
        for weight in net.parameters():
            nn.init.normal_(weight, std=0.1)
        yield pytest.param(net, id=made.__name__)


@pytest.mark.parametrize("net", every_kind())
def test_a_row_does_not_know_its_batch(net):
    text = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]]).bool()
    cond = LABEL | {"text": text, "mask": mask}
    with torch.no_grad():
        together = net(X, C, cond)
        for i in range(4):
            alone = net(X[i : i + 1], C[i : i + 1], {name: part[i : i + 1] for name, part in cond.items()})
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", every_kind())
def test_no_denoiser_has_a_layer_that_mixes_the_batch(net):
    """Against the statement that class conditioning is conditional batch norm: no network known here holds one."""
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


def test_patches_are_put_back_where_they_came_from():
    """Without blocks, which alone mix places, a changed pixel moves the pixels of its own patch only."""
    net = awake(depth=0)
    changed = X.clone()
    changed[0, 0, 3, 6] += 1
    with torch.no_grad():
        moved = (net(changed, C) - net(X, C)).abs().sum(1) > 1e-7
    assert moved[0, 2:4, 6:8].all() and moved.sum() == 4


def test_embeddings_are_told_apart():
    places = grid_positions(8, 32)
    assert places.shape == (64, 32)
    assert torch.cdist(places, places)[~torch.eye(64, dtype=torch.bool)].min() > 0.1
    levels = Sinusoids(64)(torch.linspace(-3, 3, 101))
    assert levels.shape == (101, 64) and levels.isfinite().all()
    assert torch.cdist(levels, levels)[~torch.eye(101, dtype=torch.bool)].min() > 0.1


@pytest.mark.parametrize("sizes", [{"size": 7}, {"heads": 3}, {"width": 30, "heads": 2}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ConfigError, match="patch must divide size"):
        DiT(**(SIZES | sizes))


def count(net):
    return sum(weight.numel() for weight in net.parameters()) / 1e6


@pytest.mark.parametrize(
    ("width", "depth", "heads", "published"),
    [(384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)],
)
def test_dit_has_the_published_sizes(width, depth, heads, published):
    """Peebles and Xie 2023, table 4, in millions: patch 2, ImageNet's latents, learned variance."""
    with torch.device("meta"):
        net = DiT(4, 32, 1000, width=width, depth=depth, heads=heads, out_channels=8, period=10_000.0)
    assert count(net) == pytest.approx(published, abs=1)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "published"),
    [(512, 17, 8, 58), (768, 17, 12, 131), (1024, 21, 16, 287), (1152, 29, 16, 501)],
)
def test_u_vit_has_the_published_sizes(width, depth, heads, published):
    """Bao et al. 2023, table 1, in millions: small (deep), mid, large and huge."""
    with torch.device("meta"):
        net = UViT(4, 32, 1000, width=width, depth=depth, heads=heads)
    assert count(net) == pytest.approx(published, abs=1)


@pytest.mark.parametrize(("depth", "published"), [(24, 2000), (38, 8000)])
def test_mm_dit_has_the_published_sizes(depth, published):
    """Esser et al. 2024, section 5.3: width 64 a block of depth, 2 and 8 thousand million."""
    with torch.device("meta"):
        net = MMDiT(16, 64, 0, text=4096, width=64 * depth, depth=depth, heads=depth)
    assert count(net) == pytest.approx(published, rel=0.02)


def test_class_names():
    names = ClassNames(("cat", "Dog", "horse"))
    assert [names.label(text) for text in ("cat", " dog\n", "HORSE")] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"prompt is 'hors'.*did you mean 'horse'"):
        names.label("hors")
    with pytest.raises(ConfigError, match="allowed: Dog, cat, horse"):
        names.label("")


def test_attention_written_out_is_sdpa():
    """Trained in bfloat16 on a processor attention is written out; values and gradients are SDPA's to rounding."""
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, 16, generator=draws, dtype=torch.bfloat16) for _ in range(3))
    plain = attend(q, k, v, 2)  # asks for no gradient: SDPA
    assert plain.dtype == torch.bfloat16
    trained = [part.clone().requires_grad_() for part in (q, k, v)]
    found = attend(*trained, 2)
    torch.testing.assert_close(found, plain, rtol=0.02, atol=0.02)
    wide = [part.float().requires_grad_() for part in (q, k, v)]  # SDPA again, in float32
    attend(*wide, 2).square().sum().backward()
    found.float().square().sum().backward()
    for one, other in zip(trained, wide, strict=True):
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_nothing_is_nothing(dtype):
    q, k, v = (torch.randn(1, 3, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    assert not attend(q, k, v, 2, torch.zeros(1, 1, 1, 3, dtype=torch.bool)).any()
