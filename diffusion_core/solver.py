"""Solvers: each answers one question, which pair is held over this step?

A step from level t to level s is: hold a pair, mix it at s. Holding what the network says now gives DDIM,
DPM-Solver-1 and flow Euler at once, since they are the same step (the pair reproduces x at t exactly). Higher
orders hold the mean of a *reading* over the step: here of readings taken inside it, in multistep.py of those
remembered from earlier steps. The frame in which a reading is held is what tells the published solvers apart:

    frame EPS    DPM-Solver; EDM's Heun       frame X0    DPM-Solver++       frame FLOW    rectified flows
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_core.denoiser import SMALLEST_DETERMINANT
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.pair import Numbers, Pair, determinant, mix, unmix
from diffusion_core.polynomial import mean_weights
from diffusion_core.schedule import Level, Schedule
from diffusion_core.spec import Kind
from diffusion_core.target import EPS, FLOW, X0, Target

Denoise = Callable[[Tensor, Level], Pair]
Fresh = Callable[[int], Tensor]  # the step's own standard normal noise number k
FRAMES = {X0(): Numbers(1.0, 0.0), EPS(): Numbers(0.0, 1.0), FLOW(): Numbers(-1.0, 1.0)}
LOWEST_LOG_SNR = -13.8  # a signal of a thousandth of the noise


class Leg(NamedTuple):
    """One step of a grid of `steps`: from one level to the next, on a schedule."""

    level: Level
    to: Level
    schedule: Schedule
    steps: int

    def at(self, log_snr: float) -> Level:
        """The level of the schedule with this log-SNR."""
        return self.schedule.level(self.schedule.time(torch.tensor([log_snr], dtype=torch.float64)).item())


class Kept(NamedTuple):
    """A reading remembered from an earlier level."""

    level: Level
    reading: Tensor


class Memory(NamedTuple):
    """What a solver remembers between steps: readings, newest first.

    `exact` says that the sample was not reached by a step from them, so that nothing is to be corrected.
    """

    kept: tuple[Kept, ...] = ()
    exact: bool = False


class Solver(Kind):
    """Which pair is held over the step from one level to the next.

    `frame` is the reading it remembers; none means whichever the network says.
    """

    frame: Target | None = None

    @abstractmethod
    def hold(self, denoise: Denoise, x: Tensor, leg: Leg, memory: Memory, fresh: Fresh) -> tuple[Pair, Memory]:
        """The held pair and what is remembered for the next step."""

    def calls(self, steps: int) -> int:
        """How many network calls `steps` steps take when the last lands on a clean picture."""
        return steps

    def order_on(self, schedule: Schedule) -> int:
        """The order at which it converges on a schedule, once started; one unless a solver says more."""
        del schedule
        return 1

    @property
    def fewest_steps(self) -> int:
        """The fewest steps on which it can be what it is called."""
        return 1


@dataclass(frozen=True)
class FirstOrder(Solver):
    """Hold what the network says at the start of the step: DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12), Euler."""

    def hold(self, denoise: Denoise, x: Tensor, leg: Leg, memory: Memory, fresh: Fresh) -> tuple[Pair, Memory]:
        return denoise(x, leg.level), memory


@dataclass(frozen=True)
class Heun(Solver):
    """Hold the mean of the readings at both ends of a trial step (Karras et al. 2022, algorithm 1).

    The step into a clean end is first order: there is nothing left to read there.
    """

    frame: Target = EPS()

    def __post_init__(self) -> None:
        check_frame(self.frame)

    def hold(self, denoise: Denoise, x: Tensor, leg: Leg, memory: Memory, fresh: Fresh) -> tuple[Pair, Memory]:
        pair = denoise(x, leg.level)
        return (pair if leg.to.clean else both_ends(denoise, x, leg, pair, FRAMES[self.frame])), memory

    def calls(self, steps: int) -> int:
        return 2 * steps - 1

    def order_on(self, schedule: Schedule) -> int:
        return 2


@dataclass(frozen=True)
class SingleStep(Solver):
    """Hold a mean of readings taken inside the step: DPM-Solver-2 and -3 (Lu et al. 2022, arXiv 2206.00927,
    algorithms 1 and 2) in frame EPS, DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1) in frame X0.

    The step into a clean end is first order: its log-SNR is infinite, so nothing lies halfway.
    """

    frame: Target = EPS()
    order: Literal[2, 3] = 2

    def __post_init__(self) -> None:
        check_frame(self.frame)
        if self.order not in (2, 3):
            raise ConfigError(f"order {self.order}: 2 or 3 is wanted")

    def hold(self, denoise: Denoise, x: Tensor, leg: Leg, memory: Memory, fresh: Fresh) -> tuple[Pair, Memory]:
        pair = denoise(x, leg.level)
        if leg.to.clean:
            return pair, memory
        frame = FRAMES[self.frame]
        check_leaves(leg.level, frame, self)
        start, end = max(leg.level.log_snr, LOWEST_LOG_SNR), leg.to.log_snr
        inside, later = (leg.at(start + (end - start) * part / self.order) for part in (1, 2))
        first = mix(pair, frame)
        then = mix(denoise(mix(pair, inside.row), inside), frame)
        if self.order == 2:
            return unmix(x, leg.level.row, then, frame), memory

        def held(other: Level, reading: Tensor, over: Level) -> Pair:
            """The exact mean of the line through the first reading and another."""
            weights = mean_weights([start, other.log_snr], start, over.log_snr, self.frame)
            return unmix(x, leg.level.row, weights[0] * first + weights[1] * reading, frame)

        last = mix(denoise(mix(held(inside, then, later), later.row), later), frame)
        return held(later, last, leg.to), memory

    def calls(self, steps: int) -> int:
        return self.order * (steps - 1) + 1

    def order_on(self, schedule: Schedule) -> int:
        return self.order


def both_ends(denoise: Denoise, x: Tensor, leg: Leg, pair: Pair, frame: Numbers) -> Pair:
    """The pair that reads, in the frame, the mean of the readings at both ends of a trial step with `pair`."""
    check_leaves(leg.level, frame, "the mean of both ends of a step")
    there = denoise(mix(pair, leg.to.row), leg.to)
    return unmix(x, leg.level.row, (mix(pair, frame) + mix(there, frame)) / 2, frame)


def check_leaves(level: Level, frame: Numbers, who: object) -> None:
    """Raise RefusedError where readings in `frame` tell nothing about the picture at a level."""
    if not abs(float(determinant(level.row, frame))) >= SMALLEST_DETERMINANT:
        raise RefusedError(
            f"{who} cannot leave t = {level.t:g} (signal {level.row.a:.2g}): its frame tells nothing "
            "about the picture in pure noise; use frame x0 or flow, or start below pure noise"
        )


def check_frame(frame: Target) -> None:
    """Raise ConfigError for a frame that depends on time."""
    if frame not in FRAMES:
        raise ConfigError(f"frame {frame}: a reading that does not depend on time is wanted: x0, eps or flow")
