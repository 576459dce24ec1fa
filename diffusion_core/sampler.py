"""Grids of levels, renoise rules, and the only sampling loop in the library."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffusion_core.codec import Codec
from diffusion_core.denoiser import Condition, Denoiser
from diffusion_core.errors import ConfigError
from diffusion_core.guidance import CFG
from diffusion_core.noise import Noise, Stream
from diffusion_core.pair import Pair, Row, mix, row
from diffusion_core.schedule import Schedule, log_snr
from diffusion_core.solver import FirstOrder, Level, Solver
from diffusion_core.spec import Kind

LOWEST_LOG_SNR = -13.8  # a signal of a thousandth of the noise


class Grid(Kind):
    """Where a sampler stops: n + 1 levels from `first` down to the clean picture."""

    @abstractmethod
    def times(self, schedule: Schedule, steps: int, first: float) -> Tensor:
        """The n times at which the network may be called, falling, float64."""

    def levels(self, schedule: Schedule, steps: int, first: float = 1.0) -> tuple[Level, ...]:
        """The levels of the grid; the last is the clean picture itself, whether or not the schedule reaches it."""
        if steps < 1:
            raise ConfigError(f"steps {steps}: at least 1 is wanted")
        times = self.times(schedule, steps, first)
        end = Level(torch.zeros((), dtype=torch.float64), row(1, 0))
        return (*(Level(t, schedule(t)) for t in times), end)


@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps in t."""

    def times(self, schedule: Schedule, steps: int, first: float) -> Tensor:
        return torch.linspace(first, 0, steps + 1, dtype=torch.float64)[:-1]


@dataclass(frozen=True)
class LogSnr(Grid):
    """Equal steps in log-SNR down to time `last` (Lu et al. 2022)."""

    last: float = 0.02

    def times(self, schedule: Schedule, steps: int, first: float) -> Tensor:
        ends = _log_snr_ends(schedule, first, self.last)
        inner = schedule.time(torch.linspace(ends[0].item(), ends[1].item(), steps, dtype=torch.float64))
        inner[0] = first
        return inner


@dataclass(frozen=True)
class Karras(Grid):
    """Noise ratios spaced evenly in their power 1/rho, down to time `last` (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0
    last: float = 0.02

    def times(self, schedule: Schedule, steps: int, first: float) -> Tensor:
        high, low = (-_log_snr_ends(schedule, first, self.last) / 2 / self.rho).exp()
        ratio = torch.linspace(high.item(), low.item(), steps, dtype=torch.float64) ** self.rho
        inner = schedule.time(-2 * ratio.log())
        inner[0] = first
        return inner


def _log_snr_ends(schedule: Schedule, first: float, last: float) -> Tensor:
    """The log-SNR of the first and the last call, the first raised where pure noise has none."""
    return log_snr(schedule(torch.tensor([first, last], dtype=torch.float64))).clamp_min(LOWEST_LOG_SNR)


class Renoise(Kind):
    """How far the noise of the held pair is turned toward fresh noise on arrival: ε <- √(1-ρ²) ε + ρ z."""

    @abstractmethod
    def share(self, level: Row, to: Row) -> float:
        """ρ in [0, 1] for a step between two levels."""


@dataclass(frozen=True)
class Keep(Renoise):
    """No fresh noise: the deterministic path."""

    def share(self, level: Row, to: Row) -> float:
        return 0.0


@dataclass(frozen=True)
class Ancestral(Renoise):
    """DDIM(η): η = 1 has the mean and variance of DDPM's posterior (Song et al. 2021, arXiv 2010.02502, eq. 16)."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"eta {self.eta}: a number in [0, 1] is wanted")

    def share(self, level: Row, to: Row) -> float:
        ratio = (level.a * to.b / (to.a * level.b)).item()
        return self.eta * math.sqrt(max(0.0, 1 - ratio**2))


@dataclass(frozen=True)
class Full(Renoise):
    """Wholly fresh noise: multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1)."""

    def share(self, level: Row, to: Row) -> float:
        return 1.0


@dataclass(frozen=True)
class Sampling:
    """A bundle's sampling defaults: everything a picture depends on besides weights, seed and condition."""

    steps: int
    solver: Solver = FirstOrder()
    grid: Grid = Uniform()
    renoise: Renoise = Keep()
    guidance: float = 1.0
    allowed_steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance < 0:
            raise ConfigError(
                f"steps {self.steps} and guidance {self.guidance}: steps >= 1 and guidance >= 0 are wanted"
            )
        if self.allowed_steps is not None and self.steps not in self.allowed_steps:
            raise ConfigError(f"steps {self.steps}: one of {list(self.allowed_steps)} is wanted")

    def changed(self, *, steps: int | None = None, guidance: float | None = None) -> "Sampling":
        """The same defaults with other steps or guidance; raises ConfigError for what this model cannot do."""
        return replace(
            self,
            steps=self.steps if steps is None else steps,
            guidance=self.guidance if guidance is None else guidance,
        )

    @property
    def calls(self) -> int:
        """Network calls a picture, counting both branches of guidance."""
        return self.solver.calls(self.steps) * (1 if self.guidance == 1 else 2)


def sample(
    denoise: Callable[[Tensor, Tensor, Condition | None], Pair],
    x: Tensor,
    levels: Sequence[Level],
    solver: Solver,
    *,
    renoise: Renoise = Keep(),  # noqa: B008 (a frozen value)
    cond: Condition | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Carry x (B, ...), a sample at the first level, along the levels and return it at the last.

    Fresh noise, where `renoise` asks for it, is drawn from `noise`, one stream a step.
    """
    memory: tuple[tuple[float, Tensor], ...] = ()
    for index, (level, to) in enumerate(zip(levels, levels[1:], strict=False)):
        pair, memory = solver.hold(lambda y, t: denoise(y, t, cond), x, level, to, memory)
        rho = 0.0 if to.clean else renoise.share(level.row, to.row)
        if rho > 0:
            if noise is None:
                raise ConfigError(f"{renoise} draws fresh noise; give sample() a Noise")
            fresh = noise.normal(x.shape[1:], Stream.RENOISE + index).to(x)
            pair = Pair(pair.x0, math.sqrt(1 - rho**2) * pair.eps + rho * fresh)
        x = mix(pair, to.row)
    return x


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    codec: Codec,
    sampling: Sampling,
    shape: Sequence[int],
    seeds: Sequence[int] | Tensor,
    labels: Tensor | None,
) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] from seeds (B,) and class labels (B,); `shape` is that of one latent.

    A picture depends on its own seed and label, not on its batch.
    """
    device = next(denoiser.parameters()).device
    noise = Noise(torch.as_tensor(seeds, dtype=torch.int64, device=device))
    cond = None if labels is None else {"label": labels.to(device)}
    guide: nn.Module = denoiser if sampling.guidance == 1 else CFG(denoiser, sampling.guidance)
    levels = sampling.grid.levels(denoiser.schedule, sampling.steps, denoiser.first)
    x = noise.normal(shape, Stream.START) * levels[0].row.b.to(device, torch.float32)
    latent = sample(guide, x, levels, sampling.solver, renoise=sampling.renoise, cond=cond, noise=noise)
    return codec.decode(latent)
