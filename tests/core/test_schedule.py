"""Schedules against published values, finite differences and quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from diffusion_core.denoiser import SMALLEST_DETERMINANT
from diffusion_core.errors import ConfigError
from diffusion_core.schedule import CLEAN, VE, VP, Cosine, Edm, Linear, Schedule, Shifted, SubVP, log_snr
from tests.core.oracle import PURE_NOISE, one_of_each, slope, time

SCHEDULES = one_of_each(Schedule)
INSIDE = torch.linspace(0.0105, 0.9905, 99, dtype=torch.float64)  # within the pieces of a schedule given by a table


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def test_runs_from_clean_to_noise_without_turning(schedule):
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    level = schedule(t)
    assert (level.a.diff() <= 0).all() and (level.b.diff() > 0).all()
    assert level.a[0] == pytest.approx(1) and level.b[0] < 0.01
    assert (log_snr(level)[1:-1].diff() < 0).all()
    ends_blind = level.a[-1].item() < SMALLEST_DETERMINANT  # then noise says nothing of the picture there
    assert ends_blind == (next(name for name, one in SCHEDULES.items() if one == schedule) in PURE_NOISE)


def test_rate_is_the_slope(schedule):
    rate = schedule.rate(INSIDE)
    for found, function in zip(rate, (schedule.alpha, schedule.sigma), strict=True):
        torch.testing.assert_close(found, slope(function, INSIDE, 1e-4), rtol=1e-7, atol=1e-8)


def test_time_inverts_log_snr(schedule):
    torch.testing.assert_close(schedule.time(log_snr(schedule(INSIDE))), INSIDE, rtol=0, atol=1e-9)
    clean, noise = schedule.time(time(1e9, -1e9)).tolist()
    assert clean == pytest.approx(0)
    assert noise > 1 if isinstance(schedule, VE) else noise == pytest.approx(1)


@pytest.mark.parametrize("schedule", [VE(), Edm(), Edm(0.01, 50.0, 3.0)], ids=str)
def test_exploding_noise_does_not_end_at_one(schedule):
    """Churn raises the noise above the first level's: there must be a time for it."""
    wanted = time(schedule.sigma_max, 1.1 * schedule.sigma_max, 2 * schedule.sigma_max)
    beyond = schedule.time(-2 * wanted.log())
    assert beyond[0].item() == pytest.approx(1) and (beyond.diff() > 0).all()
    torch.testing.assert_close(schedule(beyond).b, wanted)


def test_rows_are_float64_whatever_the_time_is(schedule):
    assert {part.dtype for part in (*schedule(torch.rand(3)), *schedule.rate(torch.rand(3)))} == {torch.float64}


def test_a_level_is_the_row_in_plain_numbers(schedule):
    level, (a, b) = schedule.level(0.3), schedule(time(0.3))
    assert level == (0.3, (a.item(), b.item())) and {type(part) for part in level.row} == {float}
    assert level.log_snr == pytest.approx(log_snr(schedule(time(0.3))).item()) and not level.clean
    assert CLEAN.clean and CLEAN.log_snr == math.inf
    assert Linear().level(1.0).log_snr == -math.inf


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


def test_sub_vp_is_the_solution_of_its_equation():
    """Song et al. 2021, eq. 12: the variance V of dx = -β/2 x dt + √(β(1 - exp(-2∫β))) dw, here dV/dt = -βV + g²."""

    def slope(t, variance):
        beta = 0.1 + t * (20 - 0.1)
        return -beta * variance + beta * (1 - math.exp(-2 * (0.1 * t + t**2 * (20 - 0.1) / 2)))

    times = [0.1, 0.3, 0.6, 1.0]
    solved = integrate.solve_ivp(slope, (0, 1), [0.0], t_eval=times, rtol=1e-10, atol=1e-14).y[0]
    (a, b), vp = SubVP()(time(*times)), VP()(time(*times))
    torch.testing.assert_close(b**2, torch.from_numpy(solved), rtol=1e-7, atol=1e-12)
    assert torch.equal(a, vp.a) and (b < vp.b).all()


def test_edm_is_even_in_the_power_of_eq_5():
    """Karras et al. 2022, eq. 5, at N = 18: σᵢ = (σmax^(1/ρ) + i/(N-1) (σmin^(1/ρ) - σmax^(1/ρ)))^ρ."""
    i = np.arange(18)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    found = Edm()(torch.linspace(1, 0, 18, dtype=torch.float64))
    assert np.allclose(found.b, wanted, rtol=1e-12) and (found.a == 1).all()


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
        lambda: Edm(2.0, 1.0),
        lambda: Edm(rho=0.0),
        lambda: Shifted(Linear(), 0.0),
    ],
)
def test_impossible_numbers_are_refused(refused):
    with pytest.raises(ConfigError, match="wanted"):
        refused()
