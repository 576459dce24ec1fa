"""A denoiser around a perfect network gives the posterior mean, whatever the schedule, target and input scaling."""

import pytest
import torch
from torch import nn

from diffusion_core.denoiser import Denoiser, Label, QuarterLogNoise, Scale, UnitVariance, without_condition
from diffusion_core.errors import RefusedError
from diffusion_core.schedule import VE, Linear, Schedule
from diffusion_core.target import X0, Karras, Target
from tests.core.oracle import BLIND, PURE_NOISE, Gaussian, Mixture, one_of_each, perfect, time

SCHEDULES, TARGETS, SCALES = one_of_each(Schedule), one_of_each(Target), one_of_each(Scale)
MIXED = Mixture()
T = time(0.0205, 0.3005, 0.5005, 0.8005, 0.9705, 1.0)  # between the steps of a chain, where slopes are defined


def noisy(schedule, t, seed=0):
    x0, eps = torch.randn(2, len(t), 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    level = schedule(t)
    return level.a.reshape(-1, 1, 1, 1) * x0 + level.b.reshape(-1, 1, 1, 1) * eps, level


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_is_the_posterior_mean(schedule, target, scale):
    blind = schedule in PURE_NOISE and target in BLIND
    by_step = schedule.endswith("betas")  # a chain has no slope at its end
    schedule, t = SCHEDULES[schedule], T[:-1] if blind or by_step else T
    denoiser = perfect(MIXED, schedule, target, scale=SCALES[scale], first=0.97 if blind else 1.0)
    x, level = noisy(schedule, t)
    labels = torch.tensor([-1, 0, 1, -1, 1, 0])[: len(t)]
    for cond, wanted in ((None, MIXED.pair(x, level)), ({"label": labels}, MIXED.pair(x, level, labels))):
        for found, part in zip(denoiser(x, t, cond)[:2], wanted[:2], strict=True):
            torch.testing.assert_close(found, part, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_has_no_answer_is_refused_when_it_is_built(schedule, target):
    made = (nn.Identity(), SCHEDULES[schedule], TARGETS[target])
    if schedule in PURE_NOISE and target in BLIND:
        with pytest.raises(RefusedError, match=f"target '{target}' cannot be inverted at t = 1 .*predict x0 or v"):
            Denoiser(*made)
        Denoiser(*made, first=0.98)
    else:
        Denoiser(*made)


def test_edm_scalars_are_those_of_the_paper():
    """Karras et al. 2022, table 1: D = c_skip·x + c_out·F(c_in·x; c_noise), with σ_data = 0.5."""
    asked = []

    class Net(nn.Module):
        def forward(self, x, c, cond):
            asked.append((x, c))
            return torch.sin(x)

    denoiser = Denoiser(Net(), VE(), Karras(0.5), scale=UnitVariance(0.5), label=QuarterLogNoise())
    x, (_, sigma) = noisy(VE(), T)
    s = sigma.reshape(-1, 1, 1, 1)
    c_skip, c_out = 0.25 / (s**2 + 0.25), 0.5 * s / torch.sqrt(s**2 + 0.25)
    c_in, c_noise = 1 / torch.sqrt(s**2 + 0.25), torch.log(sigma) / 4
    found = denoiser(x, T).x0
    torch.testing.assert_close(asked[0][0], c_in * x, rtol=0, atol=1e-12)
    torch.testing.assert_close(asked[0][1], c_noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, c_skip * x + c_out * torch.sin(c_in * x), rtol=1e-12, atol=1e-12)


def test_algebra_is_float32_and_a_scalar_time_is_the_same_for_all():
    class Half(nn.Module):
        def forward(self, x, c, cond):
            return x.bfloat16()

    x = torch.randn(3, 1, 2, 2)
    pair = Denoiser(Half(), Linear(), X0())(x, time(0.5))
    assert {part.dtype for part in pair[:2]} == {torch.float32}
    many = perfect(Gaussian(), Linear(), "v")(x.double(), time(0.5, 0.5, 0.5))
    assert torch.equal(many.x0, perfect(Gaussian(), Linear(), "v")(x.double(), time(0.5)).x0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_network_is_told_a_small_finite_number_everywhere(schedule):
    schedule = SCHEDULES[schedule]
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for label in one_of_each(Label).values():
        told = label(schedule(t), t)
        assert told.isfinite().all() and (told.diff() >= 0).all()
        assert told.abs().max() <= getattr(label, "count", 3)


def test_no_class_is_minus_one():
    assert without_condition({"label": torch.tensor([3, 0])})["label"].tolist() == [-1, -1]
