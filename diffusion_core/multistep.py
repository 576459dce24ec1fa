"""Multistep solvers: hold the mean over the step of the polynomial through the last few readings, in some clock.

    frame EPS,  clock t            PNDM's linear multistep (Liu et al. 2022, arXiv 2202.09778)
    frame EPS,  clock step         iPNDM (Zhang and Chen 2023, arXiv 2204.13902): the same weights on any grid
    frame EPS,  clock ratio        Katherine Crowson's LMS
    frame X0,   clock log_snr      DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): 2M as published
    ..., exact                     the same polynomial, averaged as the step itself weighs it: 3M
    frame FLOW, clock t            Adams-Bashforth on rectified flows

An even mean in a clock in which the step itself is not even has order two, however many readings it takes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffusion_core.errors import ConfigError
from diffusion_core.pair import Pair, mix, unmix
from diffusion_core.polynomial import mean_weights
from diffusion_core.schedule import Level, Linear, Schedule
from diffusion_core.solver import (
    FRAMES,
    LOWEST_LOG_SNR,
    Denoise,
    Fresh,
    Kept,
    Leg,
    Memory,
    Solver,
    both_ends,
    check_frame,
)
from diffusion_core.target import EPS, FLOW, X0, Target

Clock = Literal["t", "step", "log_snr", "ratio"]


@dataclass(frozen=True)
class Multistep(Solver):
    """Hold the mean over the step of the polynomial, in `clock`, through the last `order` readings in `frame`.

    The mean is even in the clock or, if `exact`, as the step itself weighs it (clock log_snr only). It starts at
    first order, or by `start` with one step of Heun's as PNDM's linear form does, and grows; into a clean end,
    where log-SNR is infinite, it is first order in that clock.
    """

    frame: Target = X0()
    clock: Clock = "log_snr"
    order: int = 2
    exact: bool = False
    start: Literal["first_order", "heun"] = "first_order"

    def __post_init__(self) -> None:
        check_frame(self.frame)
        if not 1 <= self.order <= 4:
            raise ConfigError(f"order {self.order}: 1 to 4 is wanted")
        if self.exact and self.clock != "log_snr":
            raise ConfigError(f"exact in clock '{self.clock}': the weight of a step is known in clock 'log_snr'")

    def hold(self, denoise: Denoise, x: Tensor, leg: Leg, memory: Memory, fresh: Fresh) -> tuple[Pair, Memory]:
        frame = FRAMES[self.frame]
        pair = denoise(x, leg.level)
        kept = (Kept(leg.level, mix(pair, frame)), *memory.kept)[: self.order]
        if self.start == "heun" and not memory.kept and not leg.to.clean:
            return both_ends(denoise, x, leg, pair, frame), Memory(kept)
        if self.clock == "step":
            places, then = [-float(i) for i in range(len(kept))], 1.0
        else:
            *places, then = _places(self.clock, [*(one.level for one in kept), leg.to])
        places = finite_run(places)
        if len(places) < 2 or not math.isfinite(then):  # what the network says, which needs no frame to be read in
            return pair, Memory(kept)
        weights = mean_weights(places, places[0], then, self.frame if self.exact else None)
        return unmix(x, leg.level.row, weighted(weights, kept), frame), Memory(kept)

    def calls(self, steps: int) -> int:
        return steps + (self.start == "heun" and steps > 1)

    def order_on(self, schedule: Schedule) -> int:
        straight = (self.frame, self.clock) == (FLOW(), "t") and isinstance(schedule, Linear)
        even = self.exact or straight or (self.frame, self.clock) == (EPS(), "ratio")
        return self.order if even else min(self.order, 2)

    @property
    def fewest_steps(self) -> int:
        return self.order


@dataclass(frozen=True)
class UniPC(Solver):
    """Multistep in frame X0 whose every new reading first corrects the step that led to it (Zhao et al. 2023,
    arXiv 2302.04867, algorithms 5 and 6 with B₂): one order more for no further call.

    Means of two readings are even in log-SNR, as the paper's; of more, exact.
    """

    order: int = 2
    frame = X0()  # the paper's data prediction

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 3:
            raise ConfigError(f"order {self.order}: 1 to 3 is wanted")

    def hold(self, denoise: Denoise, x: Tensor, leg: Leg, memory: Memory, fresh: Fresh) -> tuple[Pair, Memory]:
        kept = (Kept(leg.level, denoise(x, leg.level).x0), *memory.kept)
        if memory.kept and not memory.exact and math.isfinite(memory.kept[0].level.log_snr):
            # what the step that led here would have held, had it known, moves where it landed
            (a, b), before = leg.level.row, memory.kept[0].level
            known, held = (self._mean(some, before, leg.level) for some in (kept, memory.kept))
            x = x + (a - before.row.a * b / before.row.b) * (known - held)
        kept = kept[: self.order]
        return unmix(x, leg.level.row, self._mean(kept, leg.level, leg.to), FRAMES[self.frame]), Memory(kept)

    def _mean(self, kept: tuple[Kept, ...], start: Level, end: Level) -> Tensor:
        """The mean of the readings over [start, end]; the newest usable alone where log-SNR is infinite."""
        places = finite_run([one.level.log_snr for one in kept])
        if len(places) < 2 or not math.isfinite(end.log_snr):
            return kept[0].reading
        frame = self.frame if len(places) > 2 else None
        return weighted(mean_weights(places, max(start.log_snr, LOWEST_LOG_SNR), end.log_snr, frame), kept)

    def order_on(self, schedule: Schedule) -> int:
        return self.order + 1

    @property
    def fewest_steps(self) -> int:
        return self.order


def weighted(weights: Sequence[float], kept: Sequence[Kept]) -> Tensor:
    """The weighted sum of the newest readings, one a weight."""
    total = weights[0] * kept[0].reading
    for weight, one in zip(weights[1:], kept[1:], strict=False):
        total = total + weight * one.reading
    return total


def finite_run(places: Sequence[float]) -> list[float]:
    """The places before the first that is infinite."""
    return [*itertools.takewhile(math.isfinite, places)]


def _places(clock: Clock, levels: Sequence[Level]) -> list[float]:
    """Where levels lie in a clock."""
    if clock == "log_snr":
        return [level.log_snr for level in levels]
    if clock == "ratio":
        return [level.row.b / level.row.a if level.row.a > 0 else math.inf for level in levels]
    return [level.t for level in levels]
