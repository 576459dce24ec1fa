"""Distillers: a student that already is what it should become has nothing left to learn.

Progressive: the student that lands in one step where two DDIM steps land. Consistency: the exact consistency function,
which a teacher's step leaves alone but for that step's own error, of third order in its length inside the schedule.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffusion_core.denoiser import Condition
from diffusion_core.distill.consistency import Consistency, ConsistencyDistillation
from diffusion_core.distill.progressive import Progressive
from diffusion_core.noise import Noise, Stream
from diffusion_core.objective import Batch, Objective
from diffusion_core.pair import Pair
from diffusion_core.schedule import Schedule
from diffusion_core.weighting import Flat
from tests.conformance.cell import Cell, exact, slope
from tests.core.oracle import Answering, Gaussian, per_sample

LAW = Gaussian(0.7, 0.4)
IDS = torch.arange(64)
DATA = 0.7 + 0.4 * torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
STEPS = 4
COARSE, FINE = 64, 128
FIRST = 0.8
WITHIN = 0.2
CLOSE = 1e-7
Answer = Callable[[Tensor, Tensor, Condition | None], Pair]


def cells(name: str, schedule: Schedule) -> Iterator[Cell]:
    """The root of the loss that is left to progressive distillation, and the order at which consistency's falls."""

    def reader(answer: Answer) -> Answering:
        return Answering(schedule, answer, first=FIRST)

    teacher = reader(lambda x, t, cond: LAW.pair(x, schedule(t)))
    exactly = reader(lambda x, t, cond: LAW.clean(x, schedule(t)))
    left = loss(Progressive(reader(two_steps(schedule)), teacher, STEPS, Flat()))
    yield exact("distillers", name, "progressive", "loss", math.sqrt(left), CLOSE)
    far = [loss(ConsistencyDistillation(exactly, teacher, Consistency(pieces, pieces), 1)) for pieces in (COARSE, FINE)]
    found = math.log(far[0] / far[1]) / 2 / math.log(FINE / COARSE)
    yield slope("distillers", name, "consistency", "loss", found, 3, WITHIN)


def loss(objective: Objective) -> float:
    ((_, found),) = objective.losses(Batch(DATA, {"label": torch.full((64,), -1)}, IDS), 0, Inside(3, IDS, 0))
    return found.item()


class Inside(Noise):
    """Draws no interval near the clean end, where a step's error has no order."""

    def uniform(self, shape: Sequence[int] = (), stream: int = Stream.TIME) -> Tensor:
        return 0.25 + 0.75 * super().uniform(shape, stream)


def two_steps(schedule: Schedule) -> Answer:
    """The pair by which one step lands where two of DDIM land (Salimans and Ho 2022, appendix G)."""

    def ddim(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        (a, b), (c, d) = ([per_sample(part, x) for part in schedule(one)] for one in (t, s))
        x0 = LAW.pair(x, schedule(t)).x0
        return c * x0 + d * (x - a * x0) / b

    def answer(x: Tensor, t: Tensor, cond: Condition | None) -> Pair:
        s = t - FIRST / STEPS
        (a, b), (c, d) = ([per_sample(part, x) for part in schedule(one)] for one in (t, s))
        landed = ddim(ddim(x, t, (t + s) / 2), (t + s) / 2, s)
        x0 = (landed - d / b * x) / (c - d / b * a)
        return Pair(x0, (x - a * x0) / b)

    return answer
