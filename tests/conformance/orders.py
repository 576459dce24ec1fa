"""The order of convergence of each solver on each schedule, against the exact flow of a mixture.

A mixture and not one Gaussian, whose symmetry lets errors cancel; a root mean square over many starts and not the
worst, which changes place. Steps are even in t inside [0.2, 0.8], on a chain its own whole steps and every other one,
so that its kinks are levels. A multistep solver is given as many exact readings of earlier levels as its order; what
it does by itself, from one reading on, is measured beside it.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from diffusion_core.discrete import Betas, ZeroTerminal
from diffusion_core.multistep import Multistep, UniPC
from diffusion_core.pair import mix
from diffusion_core.schedule import Level, Schedule
from diffusion_core.solver import FRAMES, Kept, Memory, SingleStep, Solver
from diffusion_core.walk import walk
from tests.conformance.cell import Cell, slope
from tests.core.oracle import Mixture
from tests.core.paths import at, levels

LAW = Mixture((-0.8, 0.9), (0.4, 0.6), 0.6)
MEAN, STD = 0.22, 1.03  # of that law
HIGH, LOW = 0.8, 0.2
WITHIN = 0.2
FINE, FINE_SINGLE = 480, 60  # steps; the fewer for solvers that read inside the step, wherever that is on a chain


def starts(level: tuple[float, float]) -> Tensor:
    """Points spread over the noisy law (10, 1)."""
    a, b = level
    return a * MEAN + math.hypot(a * STD, b) * torch.linspace(-1.8, 1.8, 10, dtype=torch.float64)[:, None]


def error(solver: Solver, schedule: Schedule, steps: int, seeded: bool) -> float:
    """How far a path of so many steps lands from the exact flow."""
    path = levels(schedule, steps, HIGH, LOW)
    first = starts(path[0].row)

    def exact(level: Level) -> Tensor:
        return LAW.flow(first, path[0].row, level.row)

    known = solver.order if seeded and isinstance(solver, Multistep | UniPC) else 0
    kept = [Kept(level, mix(at(LAW)(exact(level), level), FRAMES[solver.frame])) for level in path[:known]]
    found = walk(at(LAW), exact(path[known]), path[known:], solver, schedule, memory=Memory(tuple(reversed(kept))))
    return (found - exact(path[-1])).square().mean().sqrt().item()


def measured(solver: Solver, schedule: Schedule, seeded: bool) -> float:
    """The slope between two numbers of steps, one twice the other."""
    fine = FINE_SINGLE if isinstance(solver, SingleStep) else steps_of(schedule)
    return math.log2(error(solver, schedule, fine // 2, seeded) / error(solver, schedule, fine, seeded))


def steps_of(schedule: Schedule) -> int:
    """A number of steps that is fine enough: on a chain, as many as it has there."""
    chain = schedule.inner if isinstance(schedule, ZeroTerminal) else schedule
    return round((HIGH - LOW) * len(chain.table())) if isinstance(chain, Betas) else FINE


def cells(name: str, schedule: Schedule, solvers: Mapping[str, Solver]) -> Iterator[Cell]:
    """The order of each solver beside the one it states, and that without exact starting values, which is only told."""
    for row, solver in solvers.items():
        stated = solver.order_on(schedule)
        yield slope("solvers", name, row, "order", measured(solver, schedule, True), stated, WITHIN)
        if isinstance(solver, Multistep | UniPC) and solver.order > 1:
            yield slope("solvers", name, row, "self-started", measured(solver, schedule, False), stated, math.inf)
