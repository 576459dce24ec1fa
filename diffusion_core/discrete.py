"""Schedules of discrete chains, given by their betas: β₁ .. β_T -> ᾱᵢ = ∏ (1 - βⱼ), read at t = i/T.

t = i/T is the chain after i steps (a chain that counts its steps k from 0 reads k at t = (k + 1)/T), t = 0 the clean
picture. Between two steps ln ᾱ is a straight line, so every time has a level: a chain is a schedule like any other.

    α = √ᾱ,   σ = √(1 - ᾱ)        (Ho et al. 2020, arXiv 2006.11239, eq. 4)
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_core.errors import ConfigError
from diffusion_core.schedule import Schedule

Table = NDArray[np.float64]  # NumPy, not torch: what is kept must not depend on the mode or device it was first read in


class Betas(Schedule):
    """A chain by the variances of its steps."""

    @abstractmethod
    def table(self) -> Table:
        """β₁ .. β_T, all inside (0, 1), float64."""

    @cached_property
    def log_bar(self) -> Table:
        """ln ᾱ₀ .. ln ᾱ_T, float64 (T + 1,)."""
        return np.concatenate(([0.0], np.log1p(-self.table()).cumsum()))

    def alpha(self, t: Tensor) -> Tensor:
        return (_read(self.log_bar, t * (len(self.log_bar) - 1)) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(_read(self.log_bar, t * (len(self.log_bar) - 1)))).sqrt()


class _Ramp(Betas):
    """Betas that rise from one end to the other over `steps` steps."""

    steps: int
    beta_start: float
    beta_end: float

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"steps {self.steps}, beta_start {self.beta_start}, beta_end {self.beta_end}: "
                "steps >= 1 and 0 < beta_start <= beta_end < 1 are wanted"
            )


@dataclass(frozen=True)
class LinearBetas(_Ramp):
    """Betas on a line: DDPM (Ho et al. 2020, section 4)."""

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def table(self) -> Table:
        return np.linspace(self.beta_start, self.beta_end, self.steps)


@dataclass(frozen=True)
class ScaledLinearBetas(_Ramp):
    """Square roots of the betas on a line, with latent diffusion's ends (Rombach et al. 2022, arXiv 2112.10752)."""

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def table(self) -> Table:
        return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps) ** 2


@dataclass(frozen=True)
class QuadraticBetas(ScaledLinearBetas):
    """The same law with DDPM's ends, as DDIM's authors call it (Song et al. 2021, arXiv 2010.02502)."""

    beta_start: float = 1e-4
    beta_end: float = 0.02


@dataclass(frozen=True)
class SigmoidBetas(_Ramp):
    """Betas along a sigmoid over [-6, 6]: GeoDiff (Xu et al. 2022, arXiv 2203.02923), with DDPM's ends."""

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def table(self) -> Table:
        share = 1 / (1 + np.exp(-np.linspace(-6, 6, self.steps)))
        return self.beta_start + share * (self.beta_end - self.beta_start)


@dataclass(frozen=True)
class CosineBetas(Betas):
    """Betas of the squared cosine, clipped lest the last be 1: iDDPM (Nichol and Dhariwal 2021, arXiv 2102.09672,
    eq. 17 and the text after it)."""

    steps: int = 1000
    shift: float = 0.008
    clip: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 1 or not (0 <= self.shift < 1 and 0 < self.clip < 1):
            raise ConfigError(
                f"steps {self.steps}, shift {self.shift}, clip {self.clip}: "
                "steps >= 1, shift in [0, 1) and clip inside (0, 1) are wanted"
            )

    def table(self) -> Table:
        t = np.arange(self.steps + 1) / self.steps
        bar = np.cos((t + self.shift) / (1 + self.shift) * np.pi / 2) ** 2
        betas: Table = np.minimum(1 - bar[1:] / bar[:-1], self.clip)
        return betas


@dataclass(frozen=True)
class Tabulated(Betas):
    """Betas as they are, one a step."""

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.betas:
            raise ConfigError("no betas: at least one is wanted")
        for place, beta in enumerate(self.betas):
            if not 0 < beta < 1:
                raise ConfigError(f"beta {beta} at place {place}: numbers inside (0, 1) are wanted")

    def table(self) -> Table:
        return np.array(self.betas, dtype=np.float64)


@dataclass(frozen=True)
class ZeroTerminal(Schedule):
    """A chain moved and stretched so that its end has no signal (Lin et al. 2023, arXiv 2305.08891, algorithm 1).

    Over the last step, where ln ᾱ has no bound, α itself is a straight line. Raises ConfigError for a chain of one.
    """

    inner: Betas

    def __post_init__(self) -> None:
        if len(self.inner.table()) < 2:
            raise ConfigError("a chain of one step: at least two are wanted, the first keeps its signal")

    @cached_property
    def log_bar(self) -> Table:
        """ln ᾱ₀ .. ln ᾱ_{T-1}, float64 (T,)."""
        alpha = np.exp(self.inner.log_bar[1:] / 2)
        stretched = (alpha[:-1] - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        return np.concatenate(([0.0], 2 * np.log(stretched)))

    def _parts(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether t is in the last step, ln ᾱ before it and α in it."""
        place, last = t * len(self.log_bar), len(self.log_bar) - 1
        tail = (len(self.log_bar) - place).clamp_max(1) * float(np.exp(self.log_bar[-1] / 2))
        return place > last, _read(self.log_bar, place.clamp_max(last)), tail

    def alpha(self, t: Tensor) -> Tensor:
        in_tail, log_bar, tail = self._parts(t)
        return torch.where(in_tail, tail, (log_bar / 2).exp())

    def sigma(self, t: Tensor) -> Tensor:
        in_tail, log_bar, tail = self._parts(t)
        return torch.where(in_tail, 1 - tail**2, -torch.expm1(log_bar)).sqrt()


def _read(table: Table, place: Tensor) -> Tensor:
    """The table at a place between its entries 0, 1, .., on the straight line between two."""
    entries = torch.as_tensor(table, device=place.device)
    low = place.detach().floor().long().clamp(0, len(table) - 2)
    return entries[low] + (place - low) * (entries[low + 1] - entries[low])
