"""Thresholding, on tensors made by hand: nothing happens to a picture that is in range."""

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_core.denoiser import Denoiser
from diffusion_core.errors import ConfigError
from diffusion_core.schedule import VP, Cosine
from diffusion_core.target import X0, V
from diffusion_core.thresholding import Clip, DynamicThreshold, quantile

X = torch.zeros(2, 1, 2, 2)


def saying(*pictures, spread=False):
    """A denoiser that reads these x₀ in anything."""

    class Net(nn.Module):
        def forward(self, x, c, cond):
            said = torch.tensor(pictures).reshape(-1, 1, 2, 2)
            return torch.cat((said, torch.ones_like(said)), 1) if spread else said

    return Denoiser(Net(), VP(), X0(), variance="learned" if spread else "fixed")


def read(guide):
    pair = guide(X, 0.5)
    assert torch.equal(pair.x0, guide(X, torch.tensor([0.5, 0.5])).x0)
    return pair.x0.flatten(1).tolist()


def test_clip():
    found = read(Clip(saying([0.5, -1.5, 3.0, -0.25], [1.0, -1.0, 0.0, 0.125])))
    assert found == [[0.5, -1.0, 1.0, -0.25], [1.0, -1.0, 0.0, 0.125]]
    assert read(Clip(saying([0.5, -1.5, 3.0, 0.0], [0.0, 0.0, 0.0, 9.0]), 2.0))[0] == [0.5, -1.5, 2.0, 0.0]


def test_dynamic_threshold_shrinks_only_what_is_over():
    """|x₀| = 1, 2, 3, 4: the median is 2.5, so clip to [-2.5, 2.5] and divide; the second picture is left alone."""
    guide = DynamicThreshold(saying([1.0, -2.0, 3.0, -4.0], [0.3, -0.7, 0.9, 0.1]), 0.5)
    assert read(guide) == [pytest.approx([0.4, -0.8, 1.0, -1.0]), torch.tensor([0.3, -0.7, 0.9, 0.1]).tolist()]
    assert read(DynamicThreshold(saying([1.0, -2.0, 3.0, -4.0], [1.0, 0.0, 0.0, 0.0]), 1.0))[0] == [
        0.25,
        -0.5,
        0.75,
        -1,
    ]


def test_below_the_threshold_it_is_static():
    """The median of 0, 0, 0, 4 is 0 < 1: s = 1, and the bright pixel is clipped."""
    assert read(DynamicThreshold(saying([0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, -4.0]), 0.5))[1] == [0, 0, 0, -1]


@pytest.mark.parametrize("guide", [Clip, DynamicThreshold])
def test_a_picture_in_range_is_untouched_bit_for_bit(guide):
    """Through a reader that says v, in float32: what is said is the reader's own x₀."""
    net = nn.Conv2d(1, 1, 3, padding=1)

    class Net(nn.Module):
        def forward(self, x, c, cond):
            return net(x) / 9

    inner = Denoiser(Net(), Cosine(), V())
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    for t in (0.3, torch.tensor([0.1, 0.2, 0.3, 0.4])):
        plain = inner(x, t).x0
        assert plain.abs().max() < 1
        assert torch.equal(guide(inner)(x, t).x0, plain)


@pytest.mark.parametrize("part", [0.001, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_the_quantile_is_numpys(part, count):
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(count)).double()
    wanted = torch.from_numpy(np.quantile(values.numpy(), part, axis=1))
    torch.testing.assert_close(quantile(values, part), wanted, rtol=0, atol=1e-12)


def test_the_spread_is_passed_on_and_bad_numbers_refused():
    inner = saying([2.0] * 4, [0.0] * 4, spread=True)
    for guide in (Clip(inner), DynamicThreshold(inner)):
        assert torch.equal(guide(X, 0.5).spread, torch.ones(2, 1, 2, 2))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="limit"):
            Clip(inner, limit)
    for part in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="quantile"):
            DynamicThreshold(inner, part)
