"""Renoise rules against the posterior of a Markov chain, the published η, and the law they must leave."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion_core.errors import ConfigError
from diffusion_core.grid import Uniform
from diffusion_core.noise import Noise, Stream
from diffusion_core.renoise import Ancestral, Full, Keep, Learned, Renoise
from diffusion_core.sampler import sample
from diffusion_core.schedule import CLEAN, VP, Linear, Schedule
from diffusion_core.solver import FirstOrder
from diffusion_core.walk import walk
from tests.core.oracle import Gaussian, one_of_each, perfect
from tests.core.paths import LAW, at, levels, start

SCHEDULES = one_of_each(Schedule)


def affine(denoise, path, renoise):
    """The step of linear-Gaussian data is A·x + b + c·z; read A, b, c off three runs of it."""

    def run(x, z):
        x = torch.full((1, 1), x, dtype=torch.float64)
        return walk(denoise, x, path, FirstOrder(), VP(), renoise=renoise, draw=lambda *_: torch.full_like(x, z)).item()

    b = run(0.0, 0.0)
    return run(1.0, 0.0) - b, b, run(0.0, 1.0) - b


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_is_the_ddpm_posterior(schedule):
    """q(x_s | x_t, x₀) by conditioning the joint Gaussian of a Markov chain, as matrices."""
    schedule, x0 = SCHEDULES[schedule], -0.8
    for t, s in ((0.9, 0.7), (0.5, 0.1)):
        high, low = schedule.levels([t, s])
        (a, b), (c, d) = high.row, low.row
        r = a / c
        build = np.array([[d, 0], [r * d, math.sqrt(b**2 - (r * d) ** 2)]])  # (x_s, x_t) - mean, from two unit noises
        covariance = build @ build.T
        gain = covariance[0, 1] / covariance[1, 1]
        variance = covariance[0, 0] - gain * covariance[1, 0]
        point = Gaussian(x0, 0.0)
        found = affine(at(point), (high, low), Ancestral(1.0))
        assert found == pytest.approx((gain, c * x0 - gain * a * x0, math.sqrt(variance)), rel=1e-6)
        none = affine(at(point), (high, low), Ancestral(0.0))
        assert none == pytest.approx(affine(at(point), (high, low), Keep()), abs=1e-12)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_is_that_of_the_paper(eta):
    """Song et al. 2021, eq. 16: σ(η) = η √((1-ᾱ')/(1-ᾱ)) √(1 - ᾱ/ᾱ')."""
    (_, (a, _)), (_, (c, _)) = high, low = levels(VP(), 1)
    wanted = eta * math.sqrt((1 - c**2) / (1 - a**2)) * math.sqrt(1 - a**2 / c**2)
    assert affine(at(), (high, low), Ancestral(eta))[2] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_samples_have_the_moments_of_the_data(schedule, eta):
    """Mean and variance carried through the affine steps, with no sampling error: they converge at first order."""
    schedule, errors = SCHEDULES[schedule], []
    for steps in (200, 400):
        path = levels(schedule, steps)
        (a, b), (c, d) = path[0].row, path[-1].row
        mean, variance = a * LAW.means[0], (a * LAW.std) ** 2 + b**2
        for leg in pairwise(path):
            slope, shift, fresh = affine(at(), leg, Ancestral(eta))
            mean, variance = slope * mean + shift, slope**2 * variance + fresh**2
        wanted = math.sqrt((c * LAW.std) ** 2 + d**2)
        assert mean == pytest.approx(c * LAW.means[0], abs=0.02)
        errors.append(abs(math.sqrt(variance) / wanted - 1))
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.25)


def test_full_renoise_is_multistep_consistency_sampling():
    """Song et al. 2023, algorithm 1: x <- f(α x + σ z, τ); the exact f gives the data's law."""
    schedule, noise = Linear(), Noise(range(4000))
    path = Uniform().levels(schedule, 4)
    x = noise.normal((1,), Stream.START).double()
    reader = perfect(LAW, schedule, "x0", answer=lambda y, level, labels: LAW.clean(y, level))
    wanted = LAW.clean(x, path[0].row).x0
    for index, (_, (a, b)) in enumerate(path[1:-1]):
        z = noise.normal((1,), Stream.RENOISE + index).double()
        wanted = LAW.clean(a * wanted + b * z, (a, b)).x0
    found = sample(reader, x, path, FirstOrder(), renoise=Full(), noise=noise)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert found.mean().item() == pytest.approx(0.7, abs=4 * 0.4 / math.sqrt(4000))
    assert found.std().item() == pytest.approx(0.4, rel=0.05)


def test_a_learned_variance_lies_between_the_two_bounds():
    """Nichol and Dhariwal 2021, eq. 15: exp(v log β + (1 - v) log β̃), pixel by pixel; the mean is the posterior's."""
    high, low = VP().levels([0.6, 0.5])
    (a, b), (c, d) = high.row, low.row
    beta = b**2 - (a / c * d) ** 2
    tilde = beta * d**2 / b**2
    spread = torch.tensor([[0.0], [0.25], [1.0]], dtype=torch.float64)

    def denoise(x, level):
        return LAW.pair(x, level.row)._replace(spread=spread)

    x = start(high)
    runs = [
        walk(denoise, x, (high, low), FirstOrder(), VP(), renoise=Learned(), draw=lambda *_, z=z: torch.full_like(x, z))
        for z in (0.0, 1.0)
    ]
    wanted = torch.sqrt(beta**spread * tilde ** (1 - spread))
    torch.testing.assert_close(runs[1] - runs[0], wanted, rtol=1e-12, atol=0)
    mean = walk(
        denoise, x, (high, low), FirstOrder(), VP(), renoise=Ancestral(1.0), draw=lambda *_: torch.zeros_like(x)
    )
    torch.testing.assert_close(runs[0], mean, rtol=0, atol=1e-14)
    with pytest.raises(ConfigError, match="build it with variance 'learned'"):
        walk(at(), x, (high, low), FirstOrder(), VP(), renoise=Learned(), draw=lambda *_: x)
    kept = walk(denoise, x, (high, CLEAN), FirstOrder(), VP(), renoise=Learned())
    torch.testing.assert_close(kept, LAW.pair(x, high.row).x0, rtol=0, atol=1e-14)


@pytest.mark.parametrize("renoise", [Ancestral(1.0), Full()])
def test_fresh_noise_needs_a_noise(renoise):
    path = levels(VP(), 2)
    with pytest.raises(ConfigError, match="give the sampler a Noise"):
        sample(perfect(LAW, VP(), "v"), start(path[0]), path, FirstOrder(), renoise=renoise)


def test_renoise_keeps_the_noise_standard():
    for renoise in one_of_each(Renoise).values():
        share = [renoise.share(high, low) for high, low in pairwise(levels(VP(), 8))]
        assert all(0 <= rho <= 1 for rho in share)
