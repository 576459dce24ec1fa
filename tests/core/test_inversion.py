"""DDIM inversion against the sampler it inverts, and arcs between latents."""

import math

import pytest
import torch

from diffusion_core.errors import ConfigError
from diffusion_core.inversion import invert, slerp
from diffusion_core.sampler import sample
from diffusion_core.schedule import CLEAN, VP, Linear
from diffusion_core.solver import FirstOrder
from tests.core.oracle import Mixture, perfect

LAW = Mixture()
X = torch.linspace(-1.6, 2.1, 23, dtype=torch.float64)[:, None]


def path(schedule, steps, first=0.9):
    return (*schedule.levels([first * (1 - i / steps) for i in range(steps)]), CLEAN)


@pytest.mark.parametrize("schedule", [VP(), Linear()], ids=["vp", "linear"])
def test_plain_inversion_converges_at_first_order(schedule):
    reader, errors = perfect(LAW, schedule, "v"), []
    x = X[((X + 1).abs() < 0.6) | ((X - 1.5).abs() < 0.6)][
        :, None
    ]  # between the modes paths part, and errors with them
    for steps in (200, 400):
        levels = path(schedule, steps, 0.6)
        errors.append((sample(reader, invert(reader, x, levels), levels, FirstOrder()) - x).abs().max().item())
    assert errors[1] < 0.05
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("schedule", [VP(), Linear()], ids=["vp", "linear"])
def test_the_fixed_point_comes_back_at_50_steps(schedule):
    reader, levels = perfect(LAW, schedule, "v"), path(schedule, 50)
    found = sample(reader, invert(reader, X, levels, guesses=60), levels, FirstOrder())
    torch.testing.assert_close(found, X, rtol=0, atol=1e-6)
    plain = sample(reader, invert(reader, X, levels), levels, FirstOrder())
    assert (plain - X).abs().max() > 1e-3


def test_inversion_needs_a_guess():
    with pytest.raises(ConfigError, match="guesses 0"):
        invert(perfect(LAW, VP(), "v"), X, path(VP(), 3), guesses=0)


def test_arcs_have_exact_ends_and_keep_the_norm():
    one, other = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = other * (one.flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
    assert torch.equal(slerp(one, other, 0), one) and torch.equal(slerp(one, other, 1), other)
    for share in (0.25, 0.5, 0.9):
        found = slerp(one, other, share).flatten(1)
        torch.testing.assert_close(found.norm(dim=1), one.flatten(1).norm(dim=1))
        turned = torch.nn.functional.cosine_similarity(found, one.flatten(1), 1).arccos()
        whole = torch.nn.functional.cosine_similarity(other.flatten(1), one.flatten(1), 1).arccos()
        torch.testing.assert_close(turned, share * whole)
    torch.testing.assert_close(slerp(one, 2 * one, 0.5), 1.5 * one)
