"""A denoiser: network + schedule + target -> the hidden pair. The only thing samplers, guides and objectives know.

EDM's c_skip and c_out are not written anywhere: they are two entries of the 2x2 inverse in `unmix`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_core.errors import RefusedError
from diffusion_core.pair import Pair, Row, determinant, unmix
from diffusion_core.schedule import Schedule, log_snr
from diffusion_core.spec import Kind, snake
from diffusion_core.target import Target

Condition = Mapping[str, Tensor]
SMALLEST_DETERMINANT = 1e-3
NULL = -1  # the label of "no class"


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


class Label(Kind):
    """The number by which the network is told the noise level."""

    @abstractmethod
    def __call__(self, level: Row, t: Tensor) -> Tensor:
        """One number a sample, of order one."""


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


class Denoiser(nn.Module):
    """Reads the hidden pair off a noisy sample.

    The net is called as net(x, c, cond) with x (B, C, H, W), c (B,) and cond a mapping such as
    {"label": (B,)}; it returns a tensor like x. Raises RefusedError if the target cannot be inverted at
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
    ):
        super().__init__()
        self.net, self.schedule, self.target, self.first = net, schedule, target, first
        self.scale, self.label = scale or UnitVariance(), label or QuarterLogNoise()
        _check_invertible(schedule, target, first)

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Pair:
        """The pair seen in x (B, ...) at times t (B,) or a scalar; float32 algebra whatever the net's dtype."""
        t = t.to(x.device, torch.float64).expand(len(x))
        level = self.schedule(t)
        scaled = x * self.scale(level).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        said = self.net(scaled, self.label(level, t).to(x.dtype), cond)
        return unmix(x, level, said.to(x.dtype), self.target(self.schedule, t))


def without_condition(cond: Condition) -> Condition:
    """The same batch with every class label replaced by "no class"."""
    return {**cond, "label": torch.full_like(cond["label"], NULL)}


def _check_invertible(schedule: Schedule, target: Target, first: float) -> None:
    t = torch.tensor(first, dtype=torch.float64)
    level, said = schedule(t), target(schedule, t)
    det = determinant(level, Row(said.a / torch.hypot(said.a, said.b), said.b / torch.hypot(said.a, said.b)))
    if not abs(det.item()) >= SMALLEST_DETERMINANT:
        raise RefusedError(
            f"target '{snake(type(target).__name__)}' cannot be inverted at t = {first:g} of schedule "
            f"'{snake(type(schedule).__name__)}' (signal {level.a.item():.2g}, determinant {det.item():.1e}): "
            "what the network says tells nothing about the picture there; predict x0 or v, or start below pure noise"
        )
