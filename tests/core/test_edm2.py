"""EDM2: unit magnitudes throughout, weights that keep their length whatever happens, the published sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_core.errors import ConfigError
from diffusion_core.nets.edm2 import Block, Drop, Edm2
from diffusion_core.nets.magnitude import NormalizedWeight
from diffusion_core.noise import Noise
from diffusion_core.spec import Blueprint

SIZES = {"channels": 3, "size": 8, "classes": 5, "width": 16, "multipliers": (1, 2), "depth": 1, "head": 16}
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
C = torch.tensor([-1.0, 0.0, 0.5, 2.0])
LABEL = {"label": torch.tensor([0, 4, -1, 2])}


class Spec(Blueprint):
    known = {"edm2": Edm2}


def made(seed=0, *, awake=True, **sizes):
    """A network; `awake` with every gain above zero, so that all there is acts."""
    torch.manual_seed(seed)
    net = Edm2(**(SIZES | sizes))
    if awake:
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if name.endswith("gain"):
                    weight.fill_(0.5)
    return net


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def magnitude(x):
    return x.square().mean().sqrt().item()


def lengths(layer):
    return layer.weight.detach().flatten(1).norm(dim=1) * layer.scale


@pytest.mark.parametrize("harm", ["sgd", "adamw", "scaled", "drawn again"])
def test_weights_have_unit_norm_whatever_the_optimizer_did(harm):
    net = made().train()
    net(X, C, LABEL).square().mean().backward()
    if harm == "sgd":
        torch.optim.SGD(net.parameters(), lr=1000.0).step()
    elif harm == "adamw":
        torch.optim.AdamW(net.parameters(), lr=0.3, weight_decay=0.5).step()
    with torch.no_grad():
        for weight in net.parameters():
            if harm == "scaled":
                weight.mul_(30)
            elif harm == "drawn again":
                weight.uniform_(-3, 5)
    layers = [m for m in net.modules() if isinstance(m, NormalizedWeight)]
    assert max((lengths(layer) - 1).abs().max().item() for layer in layers) > 0.01
    net(X, C, LABEL)
    assert len(layers) == 41
    for layer in layers:
        assert lengths(layer) == pytest.approx(torch.ones(len(layer.weight)), abs=1e-6)


def test_gradients_are_orthogonal_to_weights():
    """In training, where lengths are cut back, and in evaluation, for weights of any length."""
    net = made()
    for mode in (True, False):
        net.train(mode).zero_grad()
        if not mode:
            with torch.no_grad():
                for layer in net.modules():
                    if isinstance(layer, NormalizedWeight):
                        layer.weight.mul_(3)
        (net(X, C, LABEL) - X).square().sum().backward()
        for layer in net.modules():
            if isinstance(layer, NormalizedWeight):
                cosine = F.cosine_similarity(layer.weight.flatten(1), layer.weight.grad.flatten(1), eps=1e-30)
                assert layer.weight.grad.any() and cosine.abs().max() < 1e-4


def test_two_passes_may_share_a_backward():
    """As in consistency training and self-conditioning: cutting back again must not spoil what autograd has saved."""
    net = made().train()
    once = net(X, C, LABEL)
    (once + net(X, C + 1, LABEL)).sum().backward()
    together = [weight.grad.clone() for weight in net.parameters()]
    net.zero_grad()
    net(X, C, LABEL).sum().backward()
    net(X, C + 1, LABEL).sum().backward()
    for one, other in zip(together, net.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-5)


def test_training_and_evaluation_agree_once_the_weights_are_normalized():
    net = made().eval()
    before = net(X, C, LABEL)
    trained = net.train()(X, C, LABEL)
    torch.testing.assert_close(before, trained)  # drawn weights are not yet of unit length
    assert torch.equal(net.eval()(X, C, LABEL), trained)
    assert torch.equal(net.train()(X, C, LABEL), trained)


def block_squares(net, x, c, cond):
    """The mean square of what each block puts out, by name."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda _, __, out, name=name: found.update({name: magnitude(out) ** 2}))
    with torch.no_grad():
        net(x, c, cond)
    return found


@pytest.mark.parametrize("size", [16, 32])
def test_every_block_expects_unit_magnitude_for_unit_inputs(size):
    """Over six drawings of the weights. Measured: 0.84 to 1.00; zero padding and attention's means take the rest."""
    found = [
        block_squares(
            made(seed, awake=False, size=size, width=32, depth=2, attention=(size // 2,)),
            normal(4, 3, size, size, seed=seed),
            torch.linspace(-2, 2, 4),
            {"label": torch.arange(4) - 1},
        )
        for seed in range(6)
    ]
    assert len(found[0]) == 5 + 2 + 7
    means = {name: (sum(one[name] for one in found) / len(found)) ** 0.5 for name in found[0]}
    assert all(0.8 < one < 1.05 for one in means.values()), means


def shared(a, b, t):
    return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5


@pytest.mark.parametrize("encodes", [True, False])
@pytest.mark.parametrize("resample", ["keep", "down", "up"])
def test_a_block_is_that_of_figure_21(encodes, resample):
    """Written out from the figure; the encoder changes channels and takes pixel norm before it branches."""
    torch.manual_seed(0)
    block = Block(6, 4, 5, encodes=encodes, heads=1, resample=resample).eval()
    x, steer = normal(2, 6, 4, 4), normal(2, 5)
    nn.init.constant_(block.gain, 0.7)
    if resample == "down":
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    elif resample == "up":
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    main = F.conv2d(x, block.skip.unit())
    if encodes:
        x = main = 2 * F.normalize(main, dim=1)
    branch = F.conv2d(F.silu(x) / 0.596, block.first.unit(), padding=1)
    branch = F.silu(branch * (1 + 0.7 * steer @ block.steer.unit().T)[:, :, None, None]) / 0.596
    main = shared(main, F.conv2d(branch, block.second.unit(), padding=1), 0.3)
    torch.testing.assert_close(
        block(normal(2, 6, 4, 4), steer), shared(main, block.attention(main), 0.3), rtol=1e-4, atol=1e-5
    )


def test_blocks_are_told_noise_level_and_class_in_equal_shares():
    net, told = made().eval(), []
    net.decoder[-1].register_forward_hook(lambda _, given, __: told.append(given[1]))
    net(X, C, LABEL)
    level = net.features(C) @ net.level.unit().T
    named = 5**0.5 * net.label.unit().T[LABEL["label"]] * (LABEL["label"] >= 0)[:, None]
    torch.testing.assert_close(told[0], F.silu(shared(level, named, 0.5)) / 0.596)


def test_the_first_word_is_zero():
    out = made(awake=False)(X, C, LABEL)
    assert out.shape == X.shape and not out.any()
    assert made(out_channels=6)(X, C, LABEL).shape == (4, 6, 8, 8)


def test_noise_level_and_class_act_once_the_gains_do():
    net = made().eval()
    with torch.no_grad():
        out = net(X, C, LABEL)
        assert (net(X, C + 0.1, LABEL) - out).abs().mean() > 1e-2
        other = net(X, C, {"label": torch.tensor([1, 3, 0, 2])}) - out
        assert other[:3].flatten(1).abs().mean(1).min() > 1e-2
        torch.testing.assert_close(other[3], torch.zeros_like(other[3]), atol=1e-6, rtol=0)


def test_no_class():
    """No condition is label -1; a network without classes has no weights for them."""
    net = made().eval()
    assert torch.equal(net(X, C), net(X, C, {"label": torch.full((4,), -1)}))
    plain = made(classes=0).eval()
    assert torch.equal(plain(X, C), plain(X, C, LABEL))
    assert not [name for name, _ in plain.named_parameters() if name.startswith("label")]


def test_a_row_does_not_know_its_batch():
    for net in (made().eval(), made(dropout=0.3).train()):
        with torch.no_grad():
            together = net(X, C, LABEL)
            for i in range(4):
                alone = net(X[i : i + 1], C[i : i + 1], {"label": LABEL["label"][i : i + 1]})
                torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_alters_no_bit(dropout):
    grads = []
    for checkpointing in (False, True):
        net = made(checkpointing=checkpointing, dropout=dropout, attention=(8,)).train()
        (net(X, C, LABEL) - X).square().mean().backward()
        grads.append([weight.grad for weight in net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_dropout_is_by_counting():
    net = made(dropout=0.25).train()
    torch.manual_seed(1)
    once = net(X, C, LABEL)
    torch.manual_seed(2)
    assert torch.equal(net(X, C, LABEL), once)  # no generator is asked
    assert not torch.allclose(net.eval()(X, C, LABEL), once, atol=1e-2)
    ones = torch.ones(4, 8, 32, 32)
    drop, other = (Drop(Noise(torch.tensor([5, 6, 7, 8])), stream, 0.25)(ones) for stream in (0, 1))
    assert drop.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (drop == 0).float().mean((1, 2, 3)) == pytest.approx(torch.full((4,), 0.25), abs=0.02)
    for one, two in ((drop[0], drop[1]), (drop, other)):  # samples and blocks draw on their own
        assert ((one == 0) & (two == 0)).float().mean() == pytest.approx(1 / 16, abs=0.01)


@pytest.mark.parametrize(
    ("width", "published"), [(128, 125), (192, 280), (256, 498), (320, 777), (384, 1119), (448, 1523)]
)
def test_the_published_sizes(width, published):
    """Millions of parameters of EDM2-XS to EDM2-XXL (Karras et al. 2024, table 2)."""
    with torch.device("meta"):
        net = Edm2(4, 64, 1000, width=width, attention=(16, 8))
    assert round(sum(weight.numel() for weight in net.parameters()) / 1e6) == published


def test_every_tensor_is_made_where_the_input_is():
    """On the device of shapes without numbers, which refuses to meet any other."""
    with torch.device("meta"):
        net, x, c = made(dropout=0.1), torch.empty(4, 3, 8, 8), torch.empty(4)
        label = {"label": torch.empty(4, dtype=torch.int64)}
    for mode in (True, False):
        assert net.train(mode)(x, c, label).device == net(x, c).device == x.device


def test_it_learns():
    """To say its input, from silence, at a learning rate that unnormalized weights would not bear."""
    net = made(awake=False).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (net(X, C, LABEL) - X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(magnitude(X) ** 2) and losses[-1] < 0.3 * losses[0]


def test_bfloat16_is_near_float32():
    net = made(attention=(8,)).eval()
    with torch.no_grad():
        exact = net(X, C, LABEL)
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(X, C, LABEL)
    assert magnitude(rough.float() - exact) < 0.03 * magnitude(exact)


def test_it_is_read_from_plain_data():
    plain = {"kind": "edm2", **SIZES, "multipliers": [1, 2], "attention": [8], "out_channels": None}
    read = Spec.read(plain, "net")
    assert isinstance(read.build(), Edm2) and Spec.read(read.spec(), "net") == read


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"size": 9}, "size 9: 2 levels want a multiple of 2"),
        ({"head": 12}, "head 12: it must divide the width 32"),
        ({"attention": (16,)}, "attention at 16; a picture of 8 has the sides 8, 4"),
        ({"multipliers": ()}, "one level or more"),
        ({"depth": 0}, "depth 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"out_channels": 0}, "out_channels 0"),
        ({"classes": -1}, "classes -1"),
    ],
)
def test_impossible_sizes_are_refused(sizes, says):
    with pytest.raises(ConfigError, match=says):
        made(**sizes)
    with pytest.raises(ConfigError, match="x is 16x16; this network takes 8x8"):
        made()(normal(1, 3, 16, 16), C[:1])
