"""What a network is asked to say: (schedule, t) -> the row of a reading.

Also the *frames* in which a solver holds a reading constant or extrapolates it: X0, EPS and FLOW are rows
that do not depend on time.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.errors import ConfigError
from diffusion_core.pair import Row
from diffusion_core.schedule import Schedule
from diffusion_core.spec import Kind


class Target(Kind):
    """A reading of the hidden pair, as a row at each time."""

    @abstractmethod
    def __call__(self, schedule: Schedule, t: Tensor) -> Row:
        """The row at time t, float64, in the shape of t."""


def _constant(t: Tensor, a: float, b: float) -> Row:
    return Row(torch.full_like(t, a, dtype=torch.float64), torch.full_like(t, b, dtype=torch.float64))


@dataclass(frozen=True)
class X0(Target):
    """The clean sample."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Row:
        return _constant(t, 1, 0)


@dataclass(frozen=True)
class EPS(Target):
    """The noise (Ho et al. 2020, arXiv 2006.11239, eq. 14)."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Row:
        return _constant(t, 0, 1)


@dataclass(frozen=True)
class FLOW(Target):
    """Noise minus clean sample: the velocity of the straight path, whatever the schedule."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Row:
        return _constant(t, -1, 1)


@dataclass(frozen=True)
class V(Target):
    """αε - σx₀ (Salimans and Ho 2022, arXiv 2202.00512, appendix D)."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Row:
        level = schedule(t)
        return Row(-level.b, level.a)


@dataclass(frozen=True)
class Velocity(Target):
    """α'x₀ + σ'ε: the speed of the sample along its own path (Lipman et al. 2023, arXiv 2210.02747)."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Row:
        return schedule.rate(t)


@dataclass(frozen=True)
class Score(Target):
    """-ε/σ: the gradient of the log-density of the noisy sample (Song et al. 2021)."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Row:
        sigma = schedule(t).b
        return Row(torch.zeros_like(sigma), -1 / sigma)


@dataclass(frozen=True)
class Karras(Target):
    """EDM's network output F for data of standard deviation `sigma_data` (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise ConfigError(f"sigma_data {self.sigma_data}: a number above 0 is wanted")

    def __call__(self, schedule: Schedule, t: Tensor) -> Row:
        level = schedule(t)
        norm = (level.a**2 * self.sigma_data**2 + level.b**2).sqrt()
        return Row(level.b / self.sigma_data / norm, -level.a * self.sigma_data / norm)
