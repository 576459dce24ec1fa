"""The full product: every schedule, target and solver, and what of it is refused.

Each combination is sampled through its table with a perfect network that says the target, and must land where the
readable loop lands with the law's own pair: on a path inside the schedule, and on one from t = 1 to the clean
picture, unless there is no such thing, which then must be refused with a sentence.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from diffusion_core.errors import RefusedError
from diffusion_core.sampler import sample
from diffusion_core.schedule import CLEAN, Level, Schedule
from diffusion_core.solver import Solver
from diffusion_core.target import Target
from diffusion_core.walk import walk
from tests.conformance.cell import Cell, exact
from tests.conformance.orders import LAW, starts
from tests.core.oracle import BLIND, PURE_NOISE, perfect
from tests.core.paths import at

STUCK = {"Heun (EDM)", "DPM-Solver-2", "DPM-Solver-3", "PNDM (PLMS)"}  # average noise over a step out of pure noise
INSIDE = (0.8005, 0.6705, 0.5105, 0.3605, 0.2005)  # between the steps of a chain, where it has one slope
WHOLE = (1.0, 0.7105, 0.4305, 0.1605)
CLOSE = 1e-7  # the oracle's rates are differences, good to 1e-9


def cells(name: str, schedule: Schedule, solvers: Mapping[str, Solver]) -> Iterator[Cell]:
    """The larger difference of the two paths for every solver and target."""
    inside, whole = schedule.levels(INSIDE), (*schedule.levels(WHOLE), CLEAN)
    for row, solver in solvers.items():
        landing = loop(solver, schedule, inside)
        for target in Target.kinds():
            due = name in PURE_NOISE and (target in BLIND or row in STUCK)
            first = 0.97 if name in PURE_NOISE and target in BLIND else 1.0
            off, refused = difference(through(target, solver, schedule, inside, first), landing), ""
            try:
                off = max(off, difference(through(target, solver, schedule, whole, 1.0), loop(solver, schedule, whole)))
            except RefusedError as error:
                refused = str(error)
            if due != bool(refused):  # refused where it should not be, or not where it should
                off = math.inf
            yield exact("solvers", name, row, target, off, CLOSE, refused)


def loop(solver: Solver, schedule: Schedule, levels: Sequence[Level]) -> Tensor:
    """Where the readable loop lands with the law's own pair."""
    return walk(at(LAW), starts(levels[0].row), levels, solver, schedule)


def through(target: str, solver: Solver, schedule: Schedule, levels: Sequence[Level], first: float) -> Tensor:
    """Where sampling lands with a network that says `target`."""
    return sample(perfect(LAW, schedule, target, first=first), starts(levels[0].row), levels, solver)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, of the largest number wanted where that is above one; infinite for what is not a number."""
    off = (found - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
    return off if torch.isfinite(found).all() else math.inf
