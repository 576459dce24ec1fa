"""Schedules against published values, finite differences and quadrature."""

import math

import pytest
import torch
from scipy import integrate

from diffusion_core.errors import ConfigError
from diffusion_core.schedule import VE, VP, Cosine, Linear, Schedule, Shifted, log_snr
from tests.core.oracle import PURE_NOISE, one_of_each, slope, time

SCHEDULES = one_of_each(Schedule)
INSIDE = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def test_runs_from_clean_to_noise_without_turning(schedule):
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    level = schedule(t)
    assert (level.a.diff() <= 0).all() and (level.b.diff() > 0).all()
    assert level.a[0] == pytest.approx(1) and level.b[0] < 0.01
    assert (log_snr(level)[1:-1].diff() < 0).all()
    ends_blind = level.a[-1].item() < 1e-6
    assert ends_blind == (next(name for name, one in SCHEDULES.items() if one == schedule) in PURE_NOISE)


def test_rate_is_the_slope(schedule):
    rate = schedule.rate(INSIDE)
    for found, function in zip(rate, (schedule.alpha, schedule.sigma), strict=True):
        torch.testing.assert_close(found, slope(function, INSIDE, 1e-4), rtol=1e-7, atol=1e-8)


def test_time_inverts_log_snr(schedule):
    torch.testing.assert_close(schedule.time(log_snr(schedule(INSIDE))), INSIDE, rtol=0, atol=1e-9)
    assert schedule.time(time(1e9, -1e9)).tolist() == pytest.approx([0, 1])


def test_rows_are_float64_whatever_the_time_is(schedule):
    assert {part.dtype for part in (*schedule(torch.rand(3)), *schedule.rate(torch.rand(3)))} == {torch.float64}


def test_vp_is_the_integral_of_its_rate():
    """Song et al. 2021: ᾱ(t) = exp(-∫β), and α² + σ² = 1; DDPM's thousand steps end at 4.04e-5."""
    for t in (0.1, 0.5, 1.0):
        noise = integrate.quad(lambda s: 0.1 + s * (20 - 0.1), 0, t)[0]
        a, b = VP()(time(t))
        assert a.item() ** 2 == pytest.approx(math.exp(-noise), rel=1e-12)
        assert a.item() ** 2 + b.item() ** 2 == pytest.approx(1, rel=1e-14)
    discrete = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).prod().item()
    assert discrete == pytest.approx(4.04e-5, rel=1e-2)
    assert VP()(time(1.0)).a.item() ** 2 == pytest.approx(4.32e-5, rel=1e-2)


def test_cosine_has_the_published_betas():
    """Nichol and Dhariwal 2021: √β₁ is a little under the pixel bin 1/127.5; β clipped at .999 leaves ᾱ_T = 2.43e-9."""
    bar = Cosine()(torch.arange(1001, dtype=torch.float64) / 1000).a ** 2
    beta = (1 - bar[1:] / bar[:-1]).clamp_max(0.999)
    assert 0.75 / 127.5 < beta[0].sqrt() < 1 / 127.5
    assert (1 - beta).prod().item() == pytest.approx(2.43e-9, rel=1e-2)


def test_ve_and_linear_ends():
    assert VE()(time(0.0, 0.5, 1.0)).b.tolist() == pytest.approx([0.002, 0.4, 80])  # the middle is the geometric mean
    assert [part.tolist() for part in Linear()(time(0.0, 0.25, 1.0))] == [[1, 0.75, 0], [0, 0.25, 1]]


def test_shifting_multiplies_the_noise_ratio_of_the_straight_path():
    """Esser et al. 2024, eq. 23, is the time at which σ/α is `factor` times what it was."""
    (a, b), (c, d) = Shifted(Linear(), 3.0)(INSIDE), Linear()(INSIDE)
    torch.testing.assert_close(b / a, 3 * d / c)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: VP(2.0, 1.0),
        lambda: VP(0.0, 1.0),
        lambda: Cosine(1.0),
        lambda: VE(0.0, 1.0),
        lambda: VE(2.0, 1.0),
        lambda: Shifted(Linear(), 0.0),
    ],
)
def test_impossible_numbers_are_refused(refused):
    with pytest.raises(ConfigError, match="wanted"):
        refused()
