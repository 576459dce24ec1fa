"""EDM2's layers: magnitudes by Monte Carlo or quadrature, and weights that keep their length."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad

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


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def magnitude(x):
    return x.square().mean().sqrt().item()


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
    halved = unit_magnitude((x.detach() * 500).half(), 1)  # whose squares overflow
    assert halved.dtype == torch.float16
    torch.testing.assert_close(halved.float(), out.detach(), rtol=2e-3, atol=1e-3)


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


def test_the_gradient_is_that_of_the_quotient():
    """By finite differences in float64, at length one, where the norm is taken for exactly 1."""
    torch.manual_seed(0)
    layer, x = MPLinear(4, 3).double(), normal(6, 4).double()
    layer(x)
    layer.eval()
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(layer, {"weight": w}, x), layer.weight)
