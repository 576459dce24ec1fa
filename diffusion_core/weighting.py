"""Which times are trained on, and how much an error counts there.

All weights but `Flat` are written once, as weights on the squared error of x₀. An error e in what the network says
is an error -(σ/det)·e in x₀, so the weight of any other loss is

    w = w_x₀·(σ/det)²        det = the determinant of the sample's row and the row the network says
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.errors import ConfigError
from diffusion_core.pair import Row, determinant
from diffusion_core.schedule import Schedule
from diffusion_core.spec import Kind

WHOLE = 1e-9  # a time this close above a step is on it


class Times(Kind):
    """A law of training times, as the inverse of its distribution function."""

    @abstractmethod
    def __call__(self, u: Tensor, schedule: Schedule, first: float = 1.0) -> Tensor:
        """Times in [0, first] from uniform draws in (0, 1), float64."""


@dataclass(frozen=True)
class UniformTimes(Times):
    """Every time alike."""

    def __call__(self, u: Tensor, schedule: Schedule, first: float = 1.0) -> Tensor:
        return u * first


@dataclass(frozen=True)
class WholeSteps(Times):
    """The steps 1 to `count` of a chain, all alike (Ho et al. 2020, arXiv 2006.11239, algorithm 1)."""

    count: int = 1000

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count {self.count}: at least 1 step is wanted")

    def __call__(self, u: Tensor, schedule: Schedule, first: float = 1.0) -> Tensor:
        return (u * self.count).ceil() / self.count * first


@dataclass(frozen=True)
class LogitNormal(Times):
    """t = sigmoid(mean + std·z): most work where the picture takes shape (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor, schedule: Schedule, first: float = 1.0) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)) * first


@dataclass(frozen=True)
class LogNormalNoise(Times):
    """ln(σ/α) = mean + std·z (Karras et al. 2022, arXiv 2206.00364, table 1); what a schedule lacks goes to its ends.

    The law is one of noise and not of time: it is the same on every schedule.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ConfigError(f"std {self.std}: a number above 0 is wanted")

    def __call__(self, u: Tensor, schedule: Schedule, first: float = 1.0) -> Tensor:
        return schedule.time(-2 * (self.mean + self.std * torch.special.ndtri(u))).clamp(0, first)


class Weight(Kind):
    """How much a squared error of what the network says counts at each time."""

    @abstractmethod
    def __call__(self, schedule: Schedule, t: Tensor, said: Row) -> Tensor:
        """One weight a sample, float64, for a network that says the reading `said` at times t (B,)."""


@dataclass(frozen=True)
class Flat(Weight):
    """One, everywhere, in the network's own space: the "simple" loss (Ho et al. 2020, eq. 14)."""

    def __call__(self, schedule: Schedule, t: Tensor, said: Row) -> Tensor:
        return torch.ones_like(t)


class OnX0(Weight):
    """A weight written for the error of x₀ and moved to what the network says."""

    def __call__(self, schedule: Schedule, t: Tensor, said: Row) -> Tensor:
        """One weight a sample, float64, for a network that says the reading `said` at times t (B,)."""
        level = schedule(t)
        return self.on_x0(schedule, t) * (level.b / determinant(level, said)) ** 2

    @abstractmethod
    def on_x0(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The weight on the squared error of x₀, float64 (B,)."""


@dataclass(frozen=True)
class Snr(OnX0):
    """SNR on the error of x₀, which is one on the error of ε (Salimans and Ho 2022, arXiv 2202.00512, section 4)."""

    def on_x0(self, schedule: Schedule, t: Tensor) -> Tensor:
        return _snr(schedule(t))


@dataclass(frozen=True)
class MinSnr(OnX0):
    """min(SNR, γ) on the error of x₀ (Hang et al. 2023, arXiv 2303.09556).

    The ε-loss so weighs min(SNR, γ)/SNR and the v-loss min(SNR, γ)/(SNR + 1), as in the paper, without being written.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ConfigError(f"gamma {self.gamma}: a number above 0 is wanted")

    def on_x0(self, schedule: Schedule, t: Tensor) -> Tensor:
        return _snr(schedule(t)).clamp_max(self.gamma)


@dataclass(frozen=True)
class P2(OnX0):
    """1/(k + SNR)^γ on the error of ε: less for what cannot be seen (Choi et al. 2022, arXiv 2204.00227, section 3)."""

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.k <= 0 or self.gamma < 0:
            raise ConfigError(f"k {self.k}, gamma {self.gamma}: k > 0 and gamma >= 0 are wanted")

    def on_x0(self, schedule: Schedule, t: Tensor) -> Tensor:
        snr = _snr(schedule(t))
        return snr / (self.k + snr) ** self.gamma


@dataclass(frozen=True)
class Edm(OnX0):
    """(σ² + σ_data²)/(σ·σ_data)² on the error of x₀ at α = 1 (Karras et al. 2022, table 1).

    What is regressed then has variance one at every noise level: the weight of target `karras` is one.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise ConfigError(f"sigma_data {self.sigma_data}: a number above 0 is wanted")

    def on_x0(self, schedule: Schedule, t: Tensor) -> Tensor:
        return _snr(schedule(t)) + 1 / self.sigma_data**2


@dataclass(frozen=True)
class Vlb(OnX0):
    """The weight an error has in the variational bound of a chain whose steps are 1/`steps` long, in nats.

    A step from t to s counts (SNR(s) - SNR(t))/2 on the error of x₀ (Kingma et al. 2021, arXiv 2107.00630, eq. 13),
    and the last, into the clean picture, 1/(2σ²): that of a Gaussian with the variance of the forward step. A time
    between two whole steps counts as the step it lies in.
    """

    steps: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps {self.steps}: at least 1 is wanted")

    def on_x0(self, schedule: Schedule, t: Tensor) -> Tensor:
        step = (t * self.steps - WHOLE).ceil()
        level, to = schedule(step / self.steps), schedule((step - 1) / self.steps)
        return torch.where(step > 1, _snr(to) - _snr(level), 1 / level.b**2) / 2


def _snr(level: Row) -> Tensor:
    return (level.a / level.b) ** 2
