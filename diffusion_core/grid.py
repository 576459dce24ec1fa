"""Grids: where a sampler stops, from a schedule's noisy end down to the clean picture.

A training schedule and a sampling grid are different things: any grid goes with any schedule. None stops above
`first`, the noisiest time its model may be asked about.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.schedule import CLEAN, Level, Schedule, log_snr
from diffusion_core.solver import LOWEST_LOG_SNR
from diffusion_core.spec import Kind

GRIDS = 256  # how many grids are kept
ROUNDING = 1e-9  # a whole step of a chain missed by this much is met


class Grid(Kind):
    """Where a sampler stops: n + 1 levels from `first` down to the clean picture."""

    def check(self, steps: int) -> None:
        """Raise RefusedError for a number of steps it cannot carry from t = 1, whatever the schedule."""

    @abstractmethod
    def times(self, schedule: Schedule, steps: int, first: float) -> Sequence[float]:
        """The n times at which the network may be called, falling, none above `first` nor where all is clean."""

    def levels(self, schedule: Schedule, steps: int, first: float = 1.0) -> tuple[Level, ...]:
        """The levels of the grid; the last is the clean picture itself, whether or not the schedule reaches it.

        Raises ConfigError for no steps, RefusedError for a number that the grid cannot carry on this schedule.
        """
        if steps < 1:
            raise ConfigError(f"steps {steps}: at least 1 is wanted")
        self.check(steps)
        return _levels(self, schedule, steps, first)

    def descents(self, steps: int) -> int:
        """How many legs go down, each with the network calls of a step; more than `steps` where some are repeated."""
        return steps


@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps in t."""

    def times(self, schedule: Schedule, steps: int, first: float) -> Sequence[float]:
        times: list[float] = torch.linspace(first, 0, steps + 1, dtype=torch.float64)[:-1].tolist()
        return times


class _Whole(Grid):
    """A grid on the whole steps 1..`count` of a chain (Lin et al. 2023, arXiv 2305.08891, table 2)."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count {self.count}: at least 1 step is wanted")

    @abstractmethod
    def numbers(self, steps: int, count: int) -> Sequence[int]:
        """Of the steps 1..count those at which the network is called, falling."""

    def check(self, steps: int) -> None:
        self._numbers(steps, self.count)

    def times(self, schedule: Schedule, steps: int, first: float) -> Sequence[float]:
        return [number / self.count for number in self._numbers(steps, math.floor(first * self.count + ROUNDING))]

    def _numbers(self, steps: int, count: int) -> Sequence[int]:
        numbers = self.numbers(steps, count) if steps <= count else ()
        if not numbers or numbers[0] > count:
            raise RefusedError(f"{self} cannot carry {steps} steps: they do not fit into 1..{count} of {self.count}")
        return numbers


@dataclass(frozen=True)
class Leading(_Whole):
    """Every so many steps counted from the clean end, so the noisiest are left out; DDPM's and DDIM's own."""

    count: int = 1000
    offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offset < 0:
            raise ConfigError(f"offset {self.offset}: 0 or more is wanted")

    def numbers(self, steps: int, count: int) -> Sequence[int]:
        return [place * (count // steps) + 1 + self.offset for place in reversed(range(steps))]


@dataclass(frozen=True)
class Trailing(_Whole):
    """Every so many steps counted from the noisy end, which is always the first."""

    count: int = 1000

    def numbers(self, steps: int, count: int) -> Sequence[int]:
        return [round(count - place * count / steps) for place in range(steps)]


@dataclass(frozen=True)
class Linspace(_Whole):
    """Steps spread evenly with both ends among them; one alone is the clean end, as in the paper."""

    count: int = 1000

    def numbers(self, steps: int, count: int) -> Sequence[int]:
        return [1 + round(place * (count - 1) / max(steps - 1, 1)) for place in reversed(range(steps))]


class _Even(Grid):
    """A grid even in some function of the noise ratio σ/α, from `first` down to time `last`."""

    last: float

    def __post_init__(self) -> None:
        if not 0 <= self.last < 1:
            raise ConfigError(f"last {self.last}: a time in [0, 1) is wanted")

    @abstractmethod
    def log_ratios(self, high: float, low: float, down: Tensor) -> Tensor:
        """ln(σ/α) from `high` to `low`, for `down` in equal steps from 1 to 0."""

    def times(self, schedule: Schedule, steps: int, first: float) -> Sequence[float]:
        ends = log_snr(schedule(torch.tensor([first, self.last], dtype=torch.float64)))
        if not ends[1].isfinite() or not self.last < first:
            raise RefusedError(f"{self}: a last time with some noise below t = {first:g} is wanted on {schedule}")
        high, low = (-ends.clamp_min(LOWEST_LOG_SNR) / 2).tolist()  # pure noise has no ratio
        down = torch.linspace(1, 0, steps, dtype=torch.float64)
        inner: list[float] = schedule.time(-2 * self.log_ratios(high, low, down)).tolist()
        return [first, *inner[1:]]


@dataclass(frozen=True)
class LogSnr(_Even):
    """Equal steps in log-SNR down to time `last` (Lu et al. 2022, arXiv 2206.00927)."""

    last: float = 0.02

    def log_ratios(self, high: float, low: float, down: Tensor) -> Tensor:
        return low + (high - low) * down


@dataclass(frozen=True)
class Exponential(LogSnr):
    """k-diffusion's exponential grid, which is the one even in log-SNR; its polyexponential one for other powers."""

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise ConfigError(f"power {self.power}: a number above 0 is wanted")

    def log_ratios(self, high: float, low: float, down: Tensor) -> Tensor:
        return super().log_ratios(high, low, down**self.power)


@dataclass(frozen=True)
class Karras(_Even):
    """Noise ratios spaced evenly in their power 1/rho, down to time `last` (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0
    last: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho <= 0:
            raise ConfigError(f"rho {self.rho}: a number above 0 is wanted")

    def log_ratios(self, high: float, low: float, down: Tensor) -> Tensor:
        most, least = math.exp(high / self.rho), math.exp(low / self.rho)
        return self.rho * (least + (most - least) * down).log()


@dataclass(frozen=True)
class Given(Grid):
    """Times as given, falling: what a search found, or another library's grid."""

    at: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.at or self.at[0] > 1 or not _fall(self.at):
            raise ConfigError(f"at {list(self.at)}: falling times in [0, 1] are wanted")

    def check(self, steps: int) -> None:
        if steps != len(self.at):
            raise RefusedError(f"steps {steps}: the grid given has {len(self.at)} times, one a step")

    def times(self, schedule: Schedule, steps: int, first: float) -> Sequence[float]:
        return self.at


@dataclass(frozen=True)
class Resampled(Grid):
    """RePaint's path over another grid: every `jump` steps are walked `repeats` times, with a jump of the forward
    process back up before each repetition (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1 and appendix B).

    The stretches end at the last call; the noisy end keeps what is left over, which is walked once.
    """

    inner: Grid
    jump: int = 10
    repeats: int = 10

    def __post_init__(self) -> None:
        if self.jump < 1 or self.repeats < 1:
            raise ConfigError(f"jump {self.jump}, repeats {self.repeats}: both at least 1 are wanted")
        if isinstance(self.inner, Resampled):
            raise ConfigError(f"inner {self.inner}: a grid that only falls is wanted")

    def check(self, steps: int) -> None:
        self.inner.check(steps)
        if self.repeats > 1 and steps <= self.jump:
            raise RefusedError(f"steps {steps}: jumps of {self.jump} need a grid of at least {self.jump + 1} steps")

    def times(self, schedule: Schedule, steps: int, first: float) -> Sequence[float]:
        return self.inner.times(schedule, steps, first)

    def levels(self, schedule: Schedule, steps: int, first: float = 1.0) -> tuple[Level, ...]:
        self.check(steps)
        once, found = self.inner.levels(schedule, steps, first), list[Level]()
        for place, level in enumerate(once):
            found.append(level)
            if place >= self.jump and place < steps and (steps - 1 - place) % self.jump == 0:
                found += once[place - self.jump : place + 1] * (self.repeats - 1)
        return tuple(found)

    def descents(self, steps: int) -> int:
        return steps + (steps - 1) // self.jump * self.jump * (self.repeats - 1)


@lru_cache(GRIDS)
def _levels(grid: Grid, schedule: Schedule, steps: int, first: float) -> tuple[Level, ...]:
    times = grid.times(schedule, steps, first)
    levels = schedule.levels(times)
    if not times[0] <= first or not _fall(times) or levels[-1].clean:
        raise RefusedError(
            f"{grid} cannot carry {steps} steps from t = {first:g}: its times do not fall through noise alone"
        )
    return (*levels, CLEAN)


def _fall(times: Sequence[float]) -> bool:
    return times[-1] >= 0 and all(high > low for high, low in pairwise(times))
