"""Which times are trained on, and how much an error counts there."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.errors import ConfigError
from diffusion_core.pair import Row, determinant
from diffusion_core.spec import Kind


class Times(Kind):
    """A law of training times, as the inverse of its distribution function."""

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """Times in (0, 1) from uniform draws in (0, 1), float64."""


@dataclass(frozen=True)
class UniformTimes(Times):
    """Every time alike."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal(Times):
    """t = sigmoid(mean + std·z): most work where the picture takes shape (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Weight(Kind):
    """How much a squared error of what the network says counts at each level."""

    @abstractmethod
    def __call__(self, level: Row, said: Row) -> Tensor:
        """One weight a sample for a network that says the reading `said` at `level`."""


@dataclass(frozen=True)
class Flat(Weight):
    """One, everywhere: the "simple" loss in the network's own space."""

    def __call__(self, level: Row, said: Row) -> Tensor:
        return torch.ones_like(level.a)


@dataclass(frozen=True)
class MinSnr(Weight):
    """min(SNR, γ) on the error of x₀ (Hang et al. 2023, arXiv 2303.09556), moved to any other space by the determinant.

    An error e in what the network says is an error -(σ/det)·e in x₀; so the ε-loss weighs min(SNR, γ)/SNR and
    the v-loss min(SNR, γ)/(SNR + 1), as in the paper, without being written.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ConfigError(f"gamma {self.gamma}: a number above 0 is wanted")

    def __call__(self, level: Row, said: Row) -> Tensor:
        snr = (level.a / level.b) ** 2
        return snr.clamp_max(self.gamma) * (level.b / determinant(level, said)) ** 2
