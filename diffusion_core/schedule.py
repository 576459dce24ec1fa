"""Noise schedules: t in [0, 1] -> the row (αₜ, σₜ) of the noisy sample; t = 0 is clean, t = 1 is noise.

Flow-matching papers often run the other way; here they are turned. A schedule writes `alpha` and `sigma`;
the base gives its rate by forward-mode autodiff and its inverse in log-SNR λ = 2 ln(α/σ) by bisection.
All times and rows are float64: a network's dtype must never touch the coefficients.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from diffusion_core.errors import ConfigError
from diffusion_core.pair import Numbers, Row, plain
from diffusion_core.spec import Kind

BISECTIONS = 80


class Level(NamedTuple):
    """A place on a grid: the time by which the denoiser knows it and the row of the sample there, as plain numbers."""

    t: float
    row: Numbers

    @property
    def clean(self) -> bool:
        """Whether no noise is left."""
        return self.row.b == 0

    @property
    def log_snr(self) -> float:
        """λ = 2 ln(α/σ); +inf for a clean level, -inf for pure noise."""
        return 2 * (_log(self.row.a) - _log(self.row.b))


CLEAN = Level(0.0, Numbers(1.0, 0.0))  # the picture itself, whether or not a schedule reaches it


class Schedule(Kind):
    """How much signal and how much noise there is at each time."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The signal's coefficient; falls in t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The noise's coefficient; rises in t."""

    def __call__(self, t: Tensor) -> Row:
        """The level at time t, float64, in the shape of t."""
        t = t.double()
        return Row(self.alpha(t), self.sigma(t))

    def level(self, t: float) -> Level:
        """The level at time t as plain numbers."""
        return Level(t, plain(self(torch.tensor(t, dtype=torch.float64))))

    def levels(self, times: Sequence[float]) -> tuple[Level, ...]:
        """The levels at some times as plain numbers."""
        rows = self(torch.tensor(times, dtype=torch.float64))
        return tuple(Level(*at) for at in zip(times, map(Numbers, rows.a.tolist(), rows.b.tolist()), strict=True))

    def rate(self, t: Tensor) -> Row:
        """(α', σ') at time t, by forward-mode autodiff."""
        t = t.double().contiguous()  # forward-mode autodiff refuses an expanded scalar
        rates = [jvp(function, (t,), (torch.ones_like(t),))[1] for function in (self.alpha, self.sigma)]
        return Row(rates[0], rates[1])

    def time(self, level_log_snr: Tensor) -> Tensor:
        """The time with this log-SNR; values outside the schedule's range give the nearest end.

        Schedules whose noise explodes have no noisy end: there the time goes on beyond 1.
        """
        low, high = torch.zeros_like(level_log_snr), torch.ones_like(level_log_snr)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            noisier = log_snr(self(middle)) > level_log_snr
            low, high = torch.where(noisier, middle, low), torch.where(noisier, high, middle)
        return (low + high) / 2


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def log_snr(level: Row) -> Tensor:
    """λ = 2 ln(α/σ); +inf for a clean level, -inf for pure noise."""
    return 2 * (level.a.log() - level.b.log())


@dataclass(frozen=True)
class VP(Schedule):
    """Variance preserving with a linear rate β(t) (Song et al. 2021, arXiv 2011.13456, eq. 33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ConfigError(
                f"beta_min {self.beta_min} and beta_max {self.beta_max}: 0 < beta_min <= beta_max is wanted"
            )

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t * self.beta_min / 2 - t**2 * (self.beta_max - self.beta_min) / 4

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()


@dataclass(frozen=True)
class SubVP(VP):
    """VP's signal with less noise, σ = 1 - α² (Song et al. 2021, eq. 29)."""

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self._log_alpha(t))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Squared cosine (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17) in continuous time; ends in pure noise."""

    shift: float = 0.008

    def __post_init__(self) -> None:
        if not 0 <= self.shift < 1:
            raise ConfigError(f"shift {self.shift}: a number in [0, 1) is wanted")

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.shift) / (1 + self.shift) * (math.pi / 2)

    def alpha(self, t: Tensor) -> Tensor:
        return self._angle(t).cos() / math.cos(self.shift / (1 + self.shift) * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t) ** 2).clamp_min(0).sqrt()


@dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding (Song et al. 2021, eq. 31): α = 1 and σ geometric between its two ends."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError(
                f"sigma_min {self.sigma_min}, sigma_max {self.sigma_max}: 0 < sigma_min < sigma_max is wanted"
            )

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def time(self, level_log_snr: Tensor) -> Tensor:
        grown = -level_log_snr / 2 - math.log(self.sigma_min)
        return (grown / math.log(self.sigma_max / self.sigma_min)).clamp_min(0)


@dataclass(frozen=True)
class Edm(VE):
    """α = 1 and σ even in its power 1/rho (Karras et al. 2022, arXiv 2206.00364, eq. 5): a uniform grid is Karras'."""

    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho <= 0:
            raise ConfigError(f"rho {self.rho}: a number above 0 is wanted")

    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self._ends()
        return (low + t * (high - low)) ** self.rho

    def time(self, level_log_snr: Tensor) -> Tensor:
        low, high = self._ends()
        return (((-level_log_snr / 2 / self.rho).exp() - low) / (high - low)).clamp_min(0)


@dataclass(frozen=True)
class Linear(Schedule):
    """The straight path of flow matching and rectified flow (Lipman et al. 2023, Liu et al. 2023): (1 - t, t)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t


@dataclass(frozen=True)
class Shifted(Schedule):
    """Another schedule with time bent toward noise, for larger pictures (Esser et al. 2024, eq. 23)."""

    inner: Schedule
    factor: float = 3.0

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ConfigError(f"factor {self.factor}: a number above 0 is wanted")

    def _bent(self, t: Tensor) -> Tensor:
        return self.factor * t / (1 + (self.factor - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        return self.inner.alpha(self._bent(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.inner.sigma(self._bent(t))
