"""A denoiser: network + schedule + target -> the hidden pair. The only thing samplers, guides and objectives know.

A `Reader` says one reading of the pair; with the noisy sample itself that is two, so the pair follows. Denoisers
are readers, and so are guides around them: any reading will do, since at fixed x all are affine in each other.
EDM's c_skip and c_out are not written anywhere: they are two entries of the 2x2 inverse in `unmix`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffusion_core.errors import ConfigError, RefusedError, suggest
from diffusion_core.pair import Numbers, Pair, Row, determinant, plain, unmix
from diffusion_core.schedule import Schedule, log_snr
from diffusion_core.spec import Kind, snake
from diffusion_core.target import Target

Condition = Mapping[str, Tensor]
SMALLEST_DETERMINANT = 1e-3
NULL = -1  # the label of "no class"
REMEMBERED = 1024  # times whose numbers a denoiser keeps
ROUNDING = 1e-12  # a factor this close to one is one


class Scale(Kind):
    """What the noisy sample is multiplied with before the network sees it."""

    @abstractmethod
    def __call__(self, level: Row) -> Tensor:
        """The factor at each level."""


@dataclass(frozen=True)
class UnitVariance(Scale):
    """EDM's c_in for data of standard deviation `sigma_data` (Karras et al. 2022, table 1)."""

    sigma_data: float = 1.0

    def __call__(self, level: Row) -> Tensor:
        return (level.a**2 * self.sigma_data**2 + level.b**2).rsqrt()


@dataclass(frozen=True)
class Plain(Scale):
    """One: the network sees the sample as it is, as DDPM's and the networks trained like it do."""

    def __call__(self, level: Row) -> Tensor:
        return torch.ones_like(level.a)


class Label(Kind):
    """The number by which the network is told the noise level."""

    @abstractmethod
    def __call__(self, level: Row, t: Tensor) -> Tensor:
        """One number a sample."""


@dataclass(frozen=True)
class QuarterLogNoise(Label):
    """EDM's c_noise = ln(σ/α)/4 (Karras et al. 2022, table 1), kept finite at both ends."""

    limit: float = 3.0

    def __call__(self, level: Row, t: Tensor) -> Tensor:
        return (-log_snr(level) / 8).clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class Time(Label):
    """The time itself, stretched to [-1, 1]."""

    def __call__(self, level: Row, t: Tensor) -> Tensor:
        return 2 * t - 1


@dataclass(frozen=True)
class StepNumber(Label):
    """The step of a chain of `count`, from 0 (Ho et al. 2020): what networks trained on whole steps were told."""

    count: int = 1000

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count {self.count}: at least 1 step is wanted")

    def __call__(self, level: Row, t: Tensor) -> Tensor:
        return (t * self.count - 1).clamp_min(0)


class Said(NamedTuple):
    """What a reader says: one reading of the pair (B, C, ...) and, where a network learns it, the `spread`."""

    reading: Tensor
    spread: Tensor | None = None


class Reader(nn.Module, ABC):
    """Whatever reads the hidden pair off a noisy sample: a denoiser, or a guide around one.

    `target` names the reading it says, `first` the noisiest time that will ever be asked for.
    """

    schedule: Schedule
    target: Target
    first: float

    @abstractmethod
    def read(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """The reading seen in x (B, ...) at times t (B,), or at one time for all samples as a plain number."""

    def forward(self, x: Tensor, t: Tensor | float, cond: Condition | None = None) -> Pair:
        """The pair seen in x (B, ...) at times t (B,) or a scalar; float32 algebra whatever the net's dtype."""
        if isinstance(t, Tensor):
            t = t.to(x.device, torch.float64).expand(len(x))
        said = self.read(x, t, cond)
        level, of = rows(self.schedule, self.target, t)
        x0, eps, _ = unmix(x, level, said.reading, of)
        return Pair(x0, eps, said.spread)


class Denoiser(Reader):
    """Reads the hidden pair off a noisy sample with a network.

    The net is called as net(x, c, cond) with x (B, C, H, W), c (B,) and cond a mapping such as
    {"label": (B,)}; it returns a tensor like x or, if the `variance` is learned, one of twice the channels
    (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15). Raises RefusedError if the target cannot be inverted at
    `first`, the noisiest time that will ever be used.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        target: Target,
        *,
        scale: Scale | None = None,
        label: Label | None = None,
        first: float = 1.0,
        variance: Literal["fixed", "learned"] = "fixed",
    ):
        super().__init__()
        if variance not in ("fixed", "learned"):
            raise ConfigError(f"variance {variance!r}; {suggest(variance, ('fixed', 'learned'))}")
        self.net, self.schedule, self.target, self.first = net, schedule, target, first
        self.scale, self.label, self.variance = scale or UnitVariance(), label or QuarterLogNoise(), variance
        # sampling asks for the same few times again and again
        self._told: dict[tuple[float, int, torch.dtype, torch.device], Told] = {}
        _check_invertible(schedule, target, first)

    def read(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """What the network says of x (B, ...) at times t (B,) or at one for all; the reading is `target`'s."""
        if isinstance(t, Tensor):
            level = self.schedule(t)
            scaled = x * self.scale(level).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
            said = self.net(scaled, self.label(level, t).to(x.dtype), cond)
        else:
            key = (t, len(x), x.dtype, x.device)
            scale, label = self._told.get(key) or self._tell(*key)
            scaled = x if scale == 1 else x * scale
            said = self.net(scaled, label, cond)
        if said.dtype != x.dtype:
            said = said.to(x.dtype)
        if self.variance == "fixed":
            return Said(said)
        reading, raw = said.chunk(2, 1)
        return Said(reading, (raw + 1) / 2)

    @torch.inference_mode(False)  # what is kept must serve training too
    def _tell(self, t: float, batch: int, dtype: torch.dtype, device: torch.device) -> "Told":
        at = torch.tensor(t, dtype=torch.float64)
        level = self.schedule(at)
        if len(self._told) >= REMEMBERED:
            self._told.clear()
        scale, label = self.scale(level).item(), self.label(level, at).item()
        labels = torch.full((batch,), label, dtype=dtype, device=device)
        told = Told(1.0 if abs(scale - 1) < ROUNDING else scale, labels)
        self._told[t, batch, dtype, device] = told
        return told


class Told(NamedTuple):
    """What a network is given at one time: the factor on the sample and the number (B,) that tells the noise level."""

    scale: float
    label: Tensor


def rows(schedule: Schedule, target: Target, t: Tensor | float) -> tuple[Row | Numbers, Row | Numbers]:
    """The rows of the noisy sample and of the target's reading at t, plain numbers for a plain number."""
    if isinstance(t, Tensor):
        return schedule(t), target(schedule, t)
    return _numbers(schedule, target, t)


@lru_cache(REMEMBERED)
def _numbers(schedule: Schedule, target: Target, t: float) -> tuple[Numbers, Numbers]:
    return schedule.level(t).row, plain(target(schedule, torch.tensor(t, dtype=torch.float64)))


def without_condition(cond: Condition, dropped: Tensor | None = None) -> Condition:
    """The same batch with nothing asked for: label "no class", and of a text one token of zeros.

    `dropped` (B,) says in which rows; by default in all.
    """
    free = {name: _nothing(name, value) for name, value in cond.items()}
    if dropped is None:
        return free
    return {
        name: torch.where(dropped.reshape(-1, *(1,) * (value.ndim - 1)), free[name], value)
        for name, value in cond.items()
    }


def _nothing(name: str, value: Tensor) -> Tensor:
    if name == "label":
        return torch.full_like(value, NULL)
    if name == "text":
        return torch.zeros_like(value)
    if name == "mask":
        return torch.arange(value.shape[1], device=value.device).expand_as(value) < 1
    return value


def _check_invertible(schedule: Schedule, target: Target, first: float) -> None:
    t = torch.tensor(first, dtype=torch.float64)
    level, said = plain(schedule(t)), plain(target(schedule, t))
    det = float(determinant(level, said)) / math.hypot(*said)
    if not abs(det) >= SMALLEST_DETERMINANT:
        raise RefusedError(
            f"target '{snake(type(target).__name__)}' cannot be inverted at t = {first:g} of schedule "
            f"'{snake(type(schedule).__name__)}' (signal {level.a:.2g}, determinant {det:.1e}): "
            "what the network says tells nothing about the picture there; predict x0 or v, or start below pure noise"
        )
