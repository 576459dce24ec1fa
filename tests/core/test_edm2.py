"""EDM2: each layer's magnitude by Monte Carlo or quadrature, weights that keep their length, the published sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad

from diffusion_core.errors import ConfigError
from diffusion_core.nets.edm2 import Block, Drop, Edm2
from diffusion_core.nets.magnitude import (
    SILU_GAIN,
    CosineAttention,
    FourierFeatures,
    MPConv,
    MPEmbedding,
    MPLinear,
    NormalizedWeight,
    mp_cat,
    mp_silu,
    mp_sum,
    unit_magnitude,
)
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


# -- primitives ------------------------------------------------------------------------------------------------------


def test_the_gain_of_silu_is_its_magnitude_for_a_normal():
    second = quad(lambda z: (z / (1 + math.exp(-z))) ** 2 * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), -30, 30)[0]
    assert second**0.5 == pytest.approx(SILU_GAIN, abs=5e-4)
    assert magnitude(mp_silu(normal(100_000))) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sums_and_concatenations_keep_the_magnitude(t):
    a, b = normal(50_000, 2), normal(50_000, 6, seed=1)
    assert magnitude(mp_sum(a[:, 0], b[:, 0], t)) == pytest.approx(1, abs=0.02)
    assert mp_sum(a, a, 0.5) == pytest.approx(2**0.5 * a)  # nothing is kept where the two are alike
    both = mp_cat(a, b, t)
    assert both.shape == (50_000, 8) and magnitude(both) == pytest.approx(1, abs=0.02)
    share = both[:, 2:].square().sum() / both.square().sum()
    assert share.item() == pytest.approx(t**2 / ((1 - t) ** 2 + t**2), abs=0.01)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: MPLinear(24, 64), (1000, 24)),
        (lambda: MPConv(5, 64, 1), (8, 5, 16, 16)),
        (lambda: MPConv(5, 64, 3), (8, 5, 64, 64)),
    ],
)
def test_layers_keep_the_magnitude(layer, shape):
    torch.manual_seed(0)
    assert magnitude(layer()(normal(*shape))) == pytest.approx(1, abs=0.04)  # at an edge of 64 a 3x3 kernel loses 1%


def test_an_embedding_is_the_linear_layer_of_one_hot_vectors():
    torch.manual_seed(0)
    embedding, linear = MPEmbedding(7, 32), MPLinear(7, 32)
    linear.load_state_dict(embedding.state_dict())
    label = torch.tensor([3, 0, -1, 6])
    wanted = linear(7**0.5 * F.one_hot(label.clamp_min(0), 7).float())
    wanted[2] = 0
    torch.testing.assert_close(embedding(label), wanted)
    assert magnitude(embedding(torch.arange(7))) == pytest.approx(1, abs=1e-5)
    with pytest.raises(IndexError):
        embedding(torch.tensor([7]))


def test_fourier_features_are_of_magnitude_one_and_always_the_same():
    features = FourierFeatures(256)
    assert magnitude(features(torch.linspace(-3, 3, 400))) == pytest.approx(1, abs=0.02)
    assert features.frequencies.std().item() == pytest.approx(2 * math.pi, rel=0.1)
    assert features.phases.min() < 0.3 and features.phases.max() > 6 and abs(features.frequencies.mean()) < 1
    again = FourierFeatures(256)
    assert all(torch.equal(again.state_dict()[name], kept) for name, kept in features.state_dict().items())
    assert set(features.state_dict()) == {"frequencies", "phases"}
    c = torch.tensor([-3.0, 0.01, 2.5])
    pairs = list(zip(features.frequencies.tolist(), features.phases.tolist(), strict=True))
    for told, out in zip(c.tolist(), features(c).tolist(), strict=True):
        assert out == pytest.approx([2**0.5 * math.cos(f * told + p) for f, p in pairs], abs=1e-4)


def test_pixel_norm():
    x = 5 * normal(4, 6, 3, 3) + 2
    x[0, :, 1, 1] = 0
    x.requires_grad_()
    out = unit_magnitude(x, 1)
    length = out.square().mean(1)
    assert length[0, 1, 1] == 0
    torch.testing.assert_close(length[length > 0], torch.ones(35))
    out.sum().backward()
    assert x.grad.isfinite().all()
    halved = unit_magnitude((x.detach() * 500).to(torch.bfloat16), 1)  # whose squares overflow half precision
    assert halved.dtype == torch.bfloat16 and halved.isfinite().all()


def test_attention_by_cosines():
    """Against the definition, place by place: softmax of √D·cos(q, k) over values of magnitude 1."""
    torch.manual_seed(0)
    attention, x = CosineAttention(8, 2).eval(), 3 * normal(2, 8, 2, 3)
    mixed = F.conv2d(x, attention.mix.unit()).flatten(2).reshape(2, 3, 2, 4, 6)
    seen = torch.zeros(2, 2, 4, 6)
    for b in range(2):
        for h in range(2):
            q, k, v = mixed[b, :, h].detach()
            scores = torch.tensor(
                [[F.cosine_similarity(q[:, i], k[:, j], dim=0) * 2 for j in range(6)] for i in range(6)]
            )
            seen[b, h] = torch.nn.functional.normalize(v, dim=0) * 2 @ scores.softmax(1).T
    wanted = F.conv2d(seen.reshape(2, 8, 2, 3), attention.join.unit())
    torch.testing.assert_close(attention(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention(7 * x), wanted, rtol=1e-4, atol=1e-5)  # a magnitude means nothing to it


# -- weights ---------------------------------------------------------------------------------------------------------


def lengths(layer):
    return layer.weight.detach().flatten(1).norm(dim=1) * layer.scale


@pytest.mark.parametrize("shape", [(64, 16, 3, 3), (100, 7), (5, 1), (8, 3000, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cutting_back_twice_changes_no_bit(shape, dtype):
    torch.manual_seed(0)
    layer = NormalizedWeight(*shape).to(dtype)
    with torch.no_grad():
        layer.weight.mul_((5 * torch.rand(shape[0], *(1,) * (len(shape) - 1))).exp())
    acting, stored = layer.unit().detach(), layer.weight.detach().clone()
    assert lengths(layer) == pytest.approx(torch.ones(shape[0], dtype=dtype), rel=4 * torch.finfo(dtype).eps)
    assert torch.equal(layer.unit(), acting) and torch.equal(layer.weight, stored)
    assert torch.equal(layer.eval().unit(), acting) and torch.equal(layer.weight, stored)


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


def test_the_gradient_is_that_of_the_quotient():
    """By finite differences in float64, at length one, where the norm is taken for exactly 1."""
    torch.manual_seed(0)
    layer, x = MPLinear(4, 3).double(), normal(6, 4).double()
    layer(x)
    layer.eval()
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(layer, {"weight": w}, x), layer.weight)


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


# -- network ---------------------------------------------------------------------------------------------------------


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


def test_a_picture_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match="x is 16x16; this network takes 8x8"):
        made()(normal(1, 3, 16, 16), C[:1])
