"""Distillation of a perfect teacher of Gaussian data, whose paths and their two-step composition are known."""

import pytest
import torch
from torch import nn

from diffusion_core.distill.consistency import Consistency, ConsistencyDistillation
from diffusion_core.distill.progressive import Progressive, draw_interval
from diffusion_core.errors import ConfigError
from diffusion_core.grid import Uniform
from diffusion_core.noise import Noise, Stream
from diffusion_core.objective import Batch
from diffusion_core.pair import Pair
from diffusion_core.sampler import sample
from diffusion_core.schedule import VP, Linear, Schedule
from diffusion_core.solver import FirstOrder
from diffusion_core.target import Target
from diffusion_core.weighting import Flat, MinSnr
from tests.core.oracle import BLIND, PURE_NOISE, Gaussian, one_of_each, per_sample, perfect

LAW, SCHEDULES = Gaussian(0.7, 0.4), one_of_each(Schedule)
IDS = torch.arange(64)
DATA = 0.7 + 0.4 * torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCH = Batch(DATA, {"label": torch.full((64,), -1)}, IDS)


def loss_of(objective, step=0, batch=BATCH):
    ((name, loss),) = objective.losses(batch, step, Noise(3, batch.ids, step))
    assert name == "student"
    return loss


def ddim(x, high, low):
    """Song et al. 2021, eq. 12, from the law's own posterior mean."""
    (a, b), (c, d) = ([per_sample(part, x) for part in level] for level in (high, low))
    x0 = LAW.pair(x, high).x0
    return c * x0 + d * (x - a * x0) / b


def two_steps(schedule, steps):
    """What a student must say: the x₀ whose single step from t lands where two teacher steps land (appendix G)."""

    def answer(x, level, labels=None):
        t = schedule.time(2 * torch.log(level[0] / level[1])) if level[0].min() > 0 else _time(schedule, level)
        s = t - 1 / steps
        a, b = (per_sample(part, x) for part in level)
        landed = ddim(ddim(x, level, schedule((t + s) / 2)), schedule((t + s) / 2), schedule(s))
        c, d = (per_sample(part, x) for part in schedule(s))
        x0 = (landed - d / b * x) / (c - d / b * a)
        return Pair(x0, (x - a * x0) / b)

    return answer


def _time(schedule, level):
    assert isinstance(schedule, Linear)
    return level[1]


@pytest.mark.parametrize("weight", [Flat(), MinSnr()])
@pytest.mark.parametrize("target", ["x0", "v", "velocity"])
@pytest.mark.parametrize("schedule", [Linear(), VP()])
def test_progressive_wants_the_composition_of_two_steps(schedule, target, weight):
    steps = 4
    teacher = perfect(LAW, schedule, target)
    exact = perfect(LAW, schedule, target, answer=two_steps(schedule, steps))
    assert loss_of(Progressive(exact, teacher, steps, weight)).item() < 1e-12
    assert loss_of(Progressive(perfect(LAW, schedule, target), teacher, steps, weight)).item() > 1e-5


def test_progressive_lands_where_the_teacher_lands():
    """From t = 1 down: the exact student in 4 steps is the teacher in 8."""
    student, teacher = perfect(LAW, Linear(), "v", answer=two_steps(Linear(), 4)), perfect(LAW, Linear(), "v")
    x = torch.randn(16, 1, 2, 2, dtype=torch.float64)
    few, many = (
        sample(one, x, Uniform().levels(Linear(), steps), FirstOrder()) for one, steps in ((student, 4), (teacher, 8))
    )
    torch.testing.assert_close(few, many, rtol=0, atol=1e-9)


def test_intervals_are_equal_pieces_all_drawn_alike():
    t, s = draw_interval(Noise(1, torch.arange(8000)), 4, 0.8)
    torch.testing.assert_close(t - s, torch.full_like(t, 0.2))
    assert sorted({round(one, 12) for one in s.tolist()}) == [0.0, 0.2, 0.4, 0.6]
    assert ((s / 0.2).round().long().bincount() - 2000).abs().max() < 4 * (8000 * 3 / 16) ** 0.5


@pytest.mark.parametrize("target", Target.kinds())
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_every_schedule_and_target_can_be_distilled(method, schedule, target):
    """No interval, not even the one that ends clean, may give a loss that is not a number, or a gradient."""
    first = 0.97 if schedule in PURE_NOISE and target in BLIND else 1.0
    student, teacher = (perfect(LAW, SCHEDULES[schedule], target, first=first) for _ in range(2))
    made = {
        "progressive": lambda: Progressive(student, teacher, 4, Flat()),
        "consistency": lambda: ConsistencyDistillation(student, teacher, Consistency(fewest=4, most=4), 10),
    }[method]()
    loss = loss_of(made)
    loss.backward()
    assert loss.isfinite() and student.net.weight.grad.isfinite()


class Exact:
    """A student that is the exact consistency function of its schedule, and its teacher."""

    def __init__(self, schedule, intervals):
        self.student = perfect(LAW, schedule, "v", answer=lambda x, level, labels=None: LAW.clean(x, level))
        self.objective = ConsistencyDistillation(
            self.student, perfect(LAW, schedule, "v"), Consistency(fewest=intervals, most=intervals), 10
        )


@pytest.mark.parametrize("schedule", [Linear(), VP()])
def test_the_exact_consistency_function_has_no_loss(schedule):
    """What is left is the error of one Heun step, cubic in the interval; its square falls at sixth order."""
    coarse, fine = (loss_of(Exact(schedule, n).objective).item() for n in (16, 64))
    assert fine < 1e-8 and fine < coarse / 4**5
    wrong = ConsistencyDistillation(
        perfect(LAW, schedule, "v"), perfect(LAW, schedule, "v"), Consistency(fewest=64, most=64), 10
    )
    assert loss_of(wrong).item() > 1e3 * fine  # the posterior mean is no consistency function


def test_the_boundary_is_exact():
    """At the last interval the goal is the sample itself, whatever the follower says: f(x, 0) = x."""
    made = Exact(Linear(), 1).objective  # one interval: every s is 0
    for parameter in made.follower.parameters():
        nn.init.constant_(parameter, 1e6)
    x = DATA * 0 + Noise(3, IDS).normal((1, 2, 2), Stream.NOISE)
    t = torch.ones(64, dtype=torch.float64)
    wanted = made._teacher_step(x, t, torch.zeros_like(t), BATCH.cond)
    error = (LAW.clean(x, Linear()(t)).x0 - wanted).square().flatten(1).mean(1)
    huber = made.method.huber
    assert loss_of(made).item() == pytest.approx(((error + huber**2).sqrt() - huber).mean().item(), rel=1e-9)


def test_the_distance_is_pseudo_huber():
    """Song and Dhariwal 2024: √(|x - y|² + c²) - c, here a mean over pixels; quadratic when near, linear when far."""
    student, teacher = perfect(LAW, Linear(), "x0"), perfect(LAW, Linear(), "v")
    far, near = (ConsistencyDistillation(student, teacher, Consistency(2, 2, huber), 1) for huber in (1e-9, 1e4))
    nn.init.constant_(student.net.weight, 100.0)
    assert loss_of(far).item() == pytest.approx(100, rel=0.05)
    assert loss_of(near).item() == pytest.approx(100**2 / 2e4, rel=0.05)


def test_the_number_of_intervals_doubles_from_fewest_to_most():
    """Song and Dhariwal 2024, algorithm 1: N(k) = min(s₀ 2^⌊k/K'⌋, s₁), K' = K / (log₂(s₁/s₀) + 1)."""
    for fewest, most, steps in ((8, 64, 100), (10, 1280, 400_000), (3, 3, 7), (4, 20, 90)):
        method = Consistency(fewest=fewest, most=most)
        pieces = int(torch.tensor(most / fewest).log2().floor()) + 1
        wanted = [min(fewest * 2 ** int(k * pieces / steps), most) for k in range(0, steps, max(1, steps // 50))]
        found = [method.intervals(k, steps) for k in range(0, steps, max(1, steps // 50))]
        assert found == wanted
        assert method.intervals(0, steps) == fewest


def test_the_follower_follows_and_is_never_trained():
    made = Exact(Linear(), 4).objective
    nn.init.constant_(made.student.net.weight, 1.0)
    made.after_step(0)
    assert made.follower.net.weight.item() == pytest.approx(1 - made.method.follow)
    loss_of(made).backward()
    assert made.follower.net.weight.grad is None and not made.follower.net.weight.requires_grad
    assert set(made.carried) == {"follower"}


@pytest.mark.parametrize(
    "refused",
    [
        lambda: Consistency(fewest=9, most=8),
        lambda: Consistency(huber=0.0),
        lambda: Consistency(follow=1.0),
        lambda: Progressive(perfect(LAW, Linear(), "v"), perfect(LAW, Linear(), "v"), 0, Flat()),
    ],
)
def test_impossible_numbers_are_refused(refused):
    with pytest.raises(ConfigError, match="wanted"):
        refused()
