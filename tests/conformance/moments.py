"""Fresh noise: the mean and variance with which samples land, computed and not sampled.

On Gaussian data every step is affine in the sample and in its fresh noise, so one batch, whose rows are nothing, the
sample alone and each draw alone, reads off all coefficients; the landing's law follows and is held against the
law of the noisy data there. The distance between two Gaussians is √((m - m')² + (s - s')²).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_core.denoiser import Reader
from diffusion_core.errors import ConfigError
from diffusion_core.multistep import Multistep
from diffusion_core.pair import Pair
from diffusion_core.renoise import Ancestral, Full, Keep, Learned, Renoise
from diffusion_core.sampler import sample
from diffusion_core.schedule import Level, Schedule
from diffusion_core.solver import FirstOrder, Heun, Solver
from diffusion_core.stochastic import Churn, Langevin
from tests.conformance.cell import Cell, exact, slope
from tests.core.oracle import Answering, Gaussian
from tests.core.paths import levels

LAW = Gaussian(0.7, 0.4)
HIGH, LOW = 0.8, 0.2
COARSE, FINE = 60, 120  # on any chain in the tests, levels are whole steps or halfway
WITHIN = 0.2
CLOSE = 1e-7
UP_AND_DOWN = (0.8, 0.6, 0.4, 0.7, 0.3, 0.5, 0.2)
CHURN = Churn(Heun(), amount=20.0, low=0.0, high=math.inf, inflate=1.0)
CONVERGE: dict[str, tuple[Solver, Renoise, int]] = {  # to the law, at an order
    "DDPM, ancestral": (FirstOrder(), Ancestral(1.0), 1),
    "DDIM, η = 0.5": (FirstOrder(), Ancestral(0.5), 1),
    "DPM-Solver++(2M), SDE": (Multistep(), Ancestral(1.0), 2),
    "churn around Heun": (CHURN, Keep(), 2),
}
EXACT = ("multistep consistency", "learned variance", "learned variance, back up", "Langevin")


class Rows:
    """Stands for a Noise: the first draw is one in row 2 and zero elsewhere, the second in row 3, and so on."""

    def __init__(self, count: int):
        self.count, self.drawn = count, dict[int, int]()

    def normal(self, shape: Sequence[int], stream: int) -> Tensor:
        row = self.drawn.setdefault(stream, 2 + len(self.drawn))
        drawn = torch.zeros(self.count, *shape, dtype=torch.float64)
        drawn[row : row + 1] = 1.0
        return drawn


def landed(reader: Reader, path: Sequence[Level], solver: Solver, renoise: Renoise) -> tuple[float, float]:
    """Mean and standard deviation at the last level of samples that have the law's at the first."""
    count = 2 + 2 * len(path)  # no case here draws more than twice a step
    x = torch.zeros(count, 1, dtype=torch.float64)
    x[1] = 1.0
    rows = Rows(count)
    found = sample(reader, x, path, solver, renoise=renoise, noise=rows)[:, 0]  # type: ignore[arg-type]
    if 2 + len(rows.drawn) > count:
        raise ConfigError(f"{len(rows.drawn)} draws in {len(path)} levels; at most {count - 2} are wanted")
    shift, of_sample, *of_noise = [found[0], *(found[1:] - found[0])]
    mean, std = law_at(path[0])
    variance = (of_sample * std) ** 2 + sum(one**2 for one in of_noise)
    return (of_sample * mean + shift).item(), math.sqrt(variance.item())


def law_at(level: Level) -> tuple[float, float]:
    """Mean and standard deviation of the noisy data."""
    a, b = level.row
    return a * LAW.means[0], math.hypot(a * LAW.std, b)


def cells(name: str, schedule: Schedule) -> Iterator[Cell]:
    """The order at which what converges does, and the distance of what must be exact in any number of steps."""
    posterior = Answering(schedule, lambda x, t, cond: LAW.pair(x, schedule.level(t).row))
    for row, (solver, renoise, order) in CONVERGE.items():
        far = []
        for steps in (COARSE, FINE):
            path = levels(schedule, steps, HIGH, LOW)
            far.append(math.dist(landed(posterior, path, solver, renoise), law_at(path[-1])))
        yield slope("fresh noise", name, row, "law", math.log2(far[0] / far[1]), order, WITHIN)
    down, back_up = (schedule.levels(times) for times in ((HIGH, 0.5, 0.4, LOW), UP_AND_DOWN))
    consistency = Answering(schedule, lambda x, t, cond: LAW.clean(x, schedule.level(t).row))
    runs = (
        (EXACT[0], landed(consistency, down, FirstOrder(), Full()), law_at(down[-1])),
        (EXACT[1], landed(knowing_spread(schedule, down), down, FirstOrder(), Learned()), law_at(down[-1])),
        (EXACT[2], landed(knowing_spread(schedule, back_up), back_up, FirstOrder(), Learned()), law_at(back_up[-1])),
        (EXACT[3], landed(posterior, down, Langevin(FirstOrder(), 2, 0.3), Keep()), walked(down, 2, 0.3)),
    )
    for row, found, wanted in runs:
        yield exact("fresh noise", name, row, "law", math.dist(found, wanted), CLOSE)


def knowing_spread(schedule: Schedule, path: Sequence[Level]) -> Reader:
    """The posterior mean, and the spread by which q(xₛ | xₜ) of Gaussian data has its variance, so is exact.

    Var[xₛ | xₜ] by conditioning the joint law of (xₛ, xₜ); the bounds are β̃ = σₛ²β/σₜ² and β = σₜ² - (αₜ/αₛ)²σₛ².
    """
    spreads = {}
    for high, low in pairwise(path):
        if low.t > high.t:
            continue
        (a, b), (c, d) = high.row, low.row
        joint = a * c * LAW.std**2 + a / c * d**2
        wanted = law_at(low)[1] ** 2 - joint**2 / law_at(high)[1] ** 2
        upper = b**2 - (a / c * d) ** 2
        lower = d**2 * upper / b**2
        spreads[high.t] = math.log(wanted / lower) / math.log(upper / lower)

    def answer(x: Tensor, t: float, cond: object) -> Pair:
        return LAW.pair(x, schedule.level(t).row)._replace(spread=torch.full_like(x, spreads[t]))

    return Answering(schedule, answer)


def walked(path: Sequence[Level], walks: int, snr: float) -> tuple[float, float]:
    """Mean and deviation after DDIM with walks: x <- x + ε·score + √(2ε)·z keeps the mean and turns V into
    (1 - ε/V')²V + 2ε, V' the law's variance there; a step of DDIM scales what is off the mean."""
    variance = law_at(path[0])[1] ** 2
    for high, low in pairwise(path):
        (a, b), (c, d) = high.row, low.row
        law, size = law_at(high)[1] ** 2, 2 * (snr * b) ** 2
        for _ in range(walks):
            variance = (1 - size / law) ** 2 * variance + 2 * size
        variance *= ((c * a * LAW.std**2 + d * b) / law) ** 2
    return law_at(path[-1])[0], math.sqrt(variance)
