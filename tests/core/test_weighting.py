"""Loss weights in the forms their papers print, training times against their distribution functions."""

import math

import pytest
import torch
from scipy import special, stats

from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise
from diffusion_core.schedule import VE, VP, Cosine, Linear, Schedule, log_snr
from diffusion_core.target import Karras, Target
from diffusion_core.weighting import (
    P2,
    Edm,
    Flat,
    LogitNormal,
    LogNormalNoise,
    MinSnr,
    Snr,
    Times,
    UniformTimes,
    Vlb,
    Weight,
    WholeSteps,
)
from tests.core.oracle import BLIND, PURE_NOISE, Gaussian, one_of_each, time

T = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
SNR = (VP()(T).a / VP()(T).b) ** 2
PRINTED = {  # Hang et al. 2023: min(SNR, γ) is the weight of the x₀-loss; the same loss in other words weighs
    "x0": lambda snr, gamma: snr.clamp_max(gamma),
    "eps": lambda snr, gamma: snr.clamp_max(gamma) / snr,
    "v": lambda snr, gamma: snr.clamp_max(gamma) / (snr + 1),
}


def weight_of(weight, schedule, t, target):
    return weight(schedule, t, Target.kinds()[target]()(schedule, t))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("target", PRINTED)
def test_min_snr_in_its_three_forms(target, gamma):
    torch.testing.assert_close(
        weight_of(MinSnr(gamma), VP(), T, target), PRINTED[target](SNR, gamma), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(
    ("weight", "target", "printed"),
    [
        (Snr(), "eps", torch.ones_like(SNR)),  # Ho et al. 2020, eq. 14
        (Snr(), "x0", SNR),
        (Snr(), "v", SNR / (SNR + 1)),
        (P2(), "eps", 1 / (1 + SNR)),  # Choi et al. 2022
        (P2(k=2.0, gamma=0.5), "eps", 1 / (2 + SNR).sqrt()),
        (P2(), "x0", SNR / (1 + SNR)),
        (P2(), "v", SNR / (1 + SNR) ** 2),
    ],
)
def test_weights_in_the_forms_their_papers_print(weight, target, printed):
    torch.testing.assert_close(weight_of(weight, VP(), T, target), printed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sd", [0.5, 2.0])
def test_edm_weighs_the_x0_loss_by_sigma_alone(sd):
    """Karras et al. 2022, table 1, λ(σ), also for a schedule that scales the sample."""
    for schedule in (VE(), VP(), Linear()):
        sigma = schedule(T).b / schedule(T).a
        printed = (sigma**2 + sd**2) / (sigma * sd) ** 2
        torch.testing.assert_close(weight_of(Edm(sd), schedule, T, "x0"), printed, rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", [VE(), VP(), Linear()])
def test_edm_makes_the_effective_target_of_variance_one_at_every_sigma(schedule):
    """√λ·(x₀ - c_skip·x) is what EDM's network is taught; over data of deviation σ_data its variance is one."""
    sd, draws = 0.5, torch.randn(2, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in T[::8]:
        sigma = schedule(t).b / schedule(t).a
        x0 = sd * draws[0]
        taught = x0 - sd**2 / (sigma**2 + sd**2) * (x0 + sigma * draws[1])
        variance = (weight_of(Edm(sd), schedule, t, "x0").sqrt() * taught).var()
        assert variance.item() == pytest.approx(1, abs=0.015)
        assert Edm(sd)(schedule, t, Karras(sd)(schedule, t)).item() == pytest.approx(1, rel=1e-10)


def test_vlb_is_the_weight_of_the_discrete_bound():
    """Ho et al. 2020, eq. 12: β²/(2σ²·α(1 - ᾱ)) on the ε-loss, with σ² = β̃ and in the last step β."""
    steps = 100
    bar = VP()(torch.arange(steps + 1, dtype=torch.float64) / steps).a ** 2
    alpha = bar[1:] / bar[:-1]
    beta = 1 - alpha
    variance = (1 - bar[:-1]) / (1 - bar[1:]) * beta
    variance[0] = beta[0]
    printed = beta**2 / (2 * variance * alpha * (1 - bar[1:]))
    times = WholeSteps(steps)((torch.arange(steps, dtype=torch.float64) + 0.5) / steps, VP())
    torch.testing.assert_close(weight_of(Vlb(steps), VP(), times, "eps"), printed, rtol=1e-9, atol=0)


def test_vlb_between_two_steps_is_that_of_the_step():
    """On x₀, whatever the time: (SNR(s) - SNR(t))/2 of the step that holds it, and finite down to t = 0."""
    t = time(0.301, 0.33, 0.4)
    found = weight_of(Vlb(10), Linear(), t, "x0")
    torch.testing.assert_close(found, torch.full_like(t, ((0.7 / 0.3) ** 2 - (0.6 / 0.4) ** 2) / 2))
    assert weight_of(Vlb(10), Linear(), time(1e-9, 0.05, 0.1), "x0").tolist() == pytest.approx([50.0] * 3)


def test_vlb_adds_up_to_what_the_noise_hides():
    """Σ w·E|x₀ - x̂₀|² over all steps is the information between picture and noise: ½ ln(1 + SNR·s²) for N(m, s²)."""
    law, steps = Gaussian(), 20_000
    t = torch.arange(2_000, steps + 1, dtype=torch.float64) / steps
    level = VP()(t)
    left = law.std**2 * level.b**2 / ((level.a * law.std) ** 2 + level.b**2)  # the posterior's variance
    found = (weight_of(Vlb(steps), VP(), t, "x0") * left).sum().item()
    known = [0.5 * math.log(1 + law.std**2 * log_snr(VP()(time(at))).exp().item()) for at in (0.1, 1.0)]
    assert found == pytest.approx(known[0] - known[1], rel=1e-3)


@pytest.mark.parametrize("target", Target.kinds())
@pytest.mark.parametrize("schedule", one_of_each(Schedule))
def test_weights_are_finite_wherever_a_network_is_trained(schedule, target):
    t = torch.linspace(1e-6, 0.97 if schedule in PURE_NOISE and target in BLIND else 1.0, 99, dtype=torch.float64)
    schedule = one_of_each(Schedule)[schedule]
    for weight in one_of_each(Weight).values():
        found = weight_of(weight, schedule, t, target)
        assert found.isfinite().all() and (found >= 0).all() and found.shape == t.shape and found.dtype == t.dtype


def test_flat_is_one():
    assert torch.equal(weight_of(Flat(), VP(), T, "v"), torch.ones_like(T))


def test_times_follow_their_laws():
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for law, cdf in {
        UniformTimes(): lambda t: t,
        LogitNormal(0.3, 1.2): lambda t: stats.norm.cdf(special.logit(t), 0.3, 1.2),
    }.items():
        assert stats.kstest(law(u, VP()).numpy(), cdf).statistic < 1e-4
        assert torch.equal(law(u, VP(), 0.9), 0.9 * law(u, VP()))
    extremes = torch.tensor([0.5, 2**32 - 0.5], dtype=torch.float64) / 2**32  # the ends of what Noise draws
    for law in one_of_each(Times).values():
        for schedule in (VP(), VE(), Linear()):
            assert 0 <= law(extremes, schedule)[0] < law(extremes, schedule)[1] <= 1


@pytest.mark.parametrize("schedule", [VE(), VP(), Cosine(), Linear()])
def test_edms_law_is_one_of_noise_whatever_the_schedule(schedule):
    """ln(σ/α) ~ N(-1.2, 1.2²), in times that the schedule has; up to `first`, where a schedule stops before."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    t = LogNormalNoise()(u, schedule)
    assert stats.kstest((-log_snr(schedule(t)) / 2).numpy(), stats.norm(-1.2, 1.2).cdf).statistic < 1e-3
    assert LogNormalNoise()(u, schedule, 0.5).max() == 0.5
    assert torch.equal(LogNormalNoise()(u, schedule, 0.5), t.clamp_max(0.5))


def test_whole_steps_are_drawn_alike():
    t = WholeSteps(8)(Noise(0, torch.arange(16_000)).uniform(), VP(), 0.8)
    values, counts = (t * 10).round().unique(return_counts=True)
    assert values.tolist() == list(range(1, 9))
    torch.testing.assert_close(t * 10, (t * 10).round())
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("gamma", lambda: MinSnr(0.0)),
        ("k", lambda: P2(k=0.0)),
        ("gamma", lambda: P2(gamma=-1.0)),
        ("sigma_data", lambda: Edm(0.0)),
        ("steps", lambda: Vlb(0)),
        ("count", lambda: WholeSteps(0)),
        ("std", lambda: LogNormalNoise(std=0.0)),
    ],
)
def test_impossible_numbers_are_refused(name, refused):
    with pytest.raises(ConfigError, match=f"{name} .*wanted"):
        refused()
