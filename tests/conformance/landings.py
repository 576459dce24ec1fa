"""The full product: every schedule, target and solver, and what of it is refused.

Each combination is sampled through its table with a perfect network that says the target, and must land where the
readable loop lands with the law's own pair: on a path inside the schedule, and on one from t = 1 to the clean
picture, unless there is no such thing, which then must be refused with a sentence.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

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
BELOW = 0.97  # a time below pure noise
CLOSE = 1e-7  # the oracle's rates are differences, good to 1e-9


def cells(name: str, schedule: Schedule, solvers: Mapping[str, Solver]) -> Iterator[Cell]:
    """The larger difference of the two paths for every solver and target."""
    inside, whole = schedule.levels(INSIDE), (*schedule.levels(WHOLE), CLEAN)
    for row, solver in solvers.items():
        for target in Target.kinds():
            off, _ = landed(target, solver, schedule, inside, BELOW)
            further, refused = landed(target, solver, schedule, whole, 1.0)
            if name in PURE_NOISE and (target in BLIND or row in STUCK):
                off = off if refused else math.inf
            else:
                off = max(off, further)
            yield exact("solvers", name, row, target, off, CLOSE, refused)


def landed(target: str, solver: Solver, schedule: Schedule, path: tuple[Level, ...], first: float) -> tuple[float, str]:
    """How far sampling with a network that says `target` lands from the readable loop with the law's own pair.

    Infinite where it is refused, with the sentence.
    """
    try:
        found = sample(perfect(LAW, schedule, target, first=first), starts(path[0].row), path, solver)
        return difference(found, looped(solver, schedule, path)), ""
    except RefusedError as error:
        return math.inf, str(error)


@lru_cache(2)  # the two paths of one solver, for all targets
def looped(solver: Solver, schedule: Schedule, path: tuple[Level, ...]) -> Tensor:
    """Where the readable loop lands with the law's own pair."""
    return walk(at(LAW), starts(path[0].row), path, solver, schedule)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, of the largest number wanted where that is above one; infinite for what is not a number."""
    off = (found - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
    return off if torch.isfinite(found).all() else math.inf
