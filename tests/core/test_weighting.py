"""Loss weights in the forms their papers print, training times against their distribution functions."""

import pytest
import torch
from scipy import special, stats

from diffusion_core.errors import ConfigError
from diffusion_core.schedule import VP, Schedule
from diffusion_core.target import Target
from diffusion_core.weighting import Flat, LogitNormal, MinSnr, Times
from tests.core.oracle import BLIND, PURE_NOISE, one_of_each

T = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
SNR = (VP()(T).a / VP()(T).b) ** 2
PRINTED = {  # Hang et al. 2023: min(SNR, γ) is the weight of the x₀-loss; the same loss in other words weighs
    "x0": lambda snr, gamma: snr.clamp_max(gamma),
    "eps": lambda snr, gamma: snr.clamp_max(gamma) / snr,
    "v": lambda snr, gamma: snr.clamp_max(gamma) / (snr + 1),
}


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("target", PRINTED)
def test_min_snr_in_its_three_forms(target, gamma):
    found = MinSnr(gamma)(VP()(T), Target.kinds()[target]()(VP(), T))
    torch.testing.assert_close(found, PRINTED[target](SNR, gamma), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", Target.kinds())
@pytest.mark.parametrize("schedule", one_of_each(Schedule))
def test_weights_are_finite_wherever_a_network_is_trained(schedule, target):
    t = torch.linspace(1e-6, 0.97 if schedule in PURE_NOISE and target in BLIND else 1.0, 99, dtype=torch.float64)
    schedule, target = one_of_each(Schedule)[schedule], Target.kinds()[target]()
    for weight in (Flat(), MinSnr()):
        found = weight(schedule(t), target(schedule, t))
        assert found.isfinite().all() and (found >= 0).all() and found.shape == t.shape


def test_flat_is_one():
    assert torch.equal(Flat()(VP()(T), VP()(T)), torch.ones_like(T))


def test_times_follow_their_laws():
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for law, cdf in {
        Times.kinds()["uniform_times"](): lambda t: t,
        LogitNormal(0.3, 1.2): lambda t: stats.norm.cdf(special.logit(t), 0.3, 1.2),
    }.items():
        assert stats.kstest(law(u).numpy(), cdf).statistic < 1e-4
    extremes = torch.tensor([0.5, 2**32 - 0.5], dtype=torch.float64) / 2**32  # the ends of what Noise draws
    for law in one_of_each(Times).values():
        assert 0 < law(extremes)[0] < law(extremes)[1] < 1


def test_gamma_must_be_positive():
    with pytest.raises(ConfigError, match="gamma"):
        MinSnr(0.0)
