"""The forward chain and its posterior against Gaussian conditioning by matrices and DDPM's printed formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest

from diffusion_core.chain import jump, posterior
from diffusion_core.discrete import LinearBetas
from diffusion_core.errors import RefusedError
from diffusion_core.pair import Numbers
from diffusion_core.schedule import CLEAN, VE, VP, Cosine, Edm, Level, Linear, Schedule
from tests.core.oracle import one_of_each

SCHEDULES = one_of_each(Schedule)
T = 1000
BETAS = np.linspace(1e-4, 0.02, T)  # Ho et al. 2020, section 4
BARS = np.cumprod(1 - BETAS)
CHAIN = [LinearBetas().level(i / T) for i in range(T + 1)]


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def test_the_product_of_one_step_jumps_is_the_direct_jump():
    kept, variance = 1.0, 0.0
    for i, (level, to) in enumerate(pairwise(CHAIN)):
        factor, std = jump(level, to)
        assert factor == pytest.approx(math.sqrt(1 - BETAS[i]), rel=1e-12)
        assert std**2 == pytest.approx(BETAS[i], rel=1e-10)
        kept, variance = kept * factor, factor**2 * variance + std**2
        assert kept == pytest.approx(math.sqrt(BARS[i]), rel=1e-12)
        assert variance == pytest.approx(1 - BARS[i], rel=1e-12)


def test_jumps_compose_on_every_schedule(schedule):
    """q(x_u | x_s) = ∫ q(x_u | x_t) q(x_t | x_s) dx_t: factors multiply, variances add, into pure noise too."""
    for times in ((0.1, 0.4, 0.7), (0.3, 0.31, 1.0)):
        s, t, u = (schedule.level(time) for time in times)
        (first, one), (second, other), (both, std) = jump(s, t), jump(t, u), jump(s, u)
        assert both == pytest.approx(first * second, rel=1e-12)
        assert std**2 == pytest.approx((second * one) ** 2 + other**2, rel=1e-9)
    assert jump(CLEAN, u) == pytest.approx(u.row, rel=1e-12)


def conditioned(level, to):
    """x_s given (x₀, x_t), from the joint covariance of x₀ ~ N(0, 1), x_s and x_t, by solving for the two."""
    (a, b), (c, d) = level.row, to.row
    r = a / c
    made = np.array([[1, 0, 0], [c, d, 0], [a, r * d, math.sqrt(b**2 - (r * d) ** 2)]])  # x₀, x_s, x_t from unit noises
    joint = made @ made.T
    weights = np.linalg.solve(joint[np.ix_([0, 2], [0, 2])], joint[[0, 2], 1])
    return *weights, math.sqrt(joint[1, 1] - weights @ joint[[0, 2], 1])


@pytest.mark.parametrize("times", [(0.9, 0.7), (0.5, 0.1), (0.31, 0.3), (1.0, 0.2)], ids=str)
def test_posterior_is_gaussian_conditioning(schedule, times):
    level, to = (schedule.level(time) for time in times)
    assert posterior(level, to) == pytest.approx(conditioned(level, to), rel=1e-5, abs=1e-9)


def test_posterior_is_the_one_ddpm_prints():
    """Ho et al. 2020, eq. 6 and 7: μ̃ = √ᾱ' β/(1-ᾱ) x₀ + √α (1-ᾱ')/(1-ᾱ) x_t and β̃ = (1-ᾱ')/(1-ᾱ) β."""
    for i in range(1, T):
        beta, bar, before = BETAS[i], BARS[i], BARS[i - 1]
        found = posterior(CHAIN[i + 1], CHAIN[i])
        assert found.x0 == pytest.approx(math.sqrt(before) * beta / (1 - bar), rel=1e-9)
        assert found.xt == pytest.approx(math.sqrt(1 - beta) * (1 - before) / (1 - bar), rel=1e-9)
        assert found.std**2 == pytest.approx((1 - before) / (1 - bar) * beta, rel=1e-9)


def test_what_is_clean_is_the_picture_itself(schedule):
    assert posterior(schedule.level(0.6), CLEAN) == pytest.approx((1, 0, 0), abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "zero_terminal"])
def test_nothing_leads_back_out_of_pure_noise(name):
    end, inside = SCHEDULES[name].level(1.0), SCHEDULES[name].level(0.5)
    assert jump(inside, end) == (0, 1)
    assert posterior(end, inside) == pytest.approx((inside.row.a, 0, inside.row.b), abs=1e-15)
    with pytest.raises(RefusedError, match="no forward jump from t = 1 to t = 0.5"):
        jump(end, inside)


@pytest.mark.parametrize("schedule", [VP(), VE(), Edm(), Cosine(), Linear()], ids=str)
def test_the_wrong_way_is_refused(schedule):
    noisy, cleaner = schedule.level(0.6), schedule.level(0.4)
    for refused in (lambda: jump(noisy, cleaner), lambda: posterior(cleaner, noisy), lambda: jump(noisy, CLEAN)):
        with pytest.raises(RefusedError, match="no forward jump .*less noise"):
            refused()
    with pytest.raises(RefusedError, match="no way back from t = 0"):
        posterior(CLEAN, CLEAN)
    assert jump(noisy, Level(0.6, Numbers(*noisy.row))) == pytest.approx((1, 0), abs=1e-7)
