"""Sampling: from noise, or any sample on a grid's first level, to pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_core.checks import check_finite
from diffusion_core.codec import Codec
from diffusion_core.denoiser import Condition, Denoiser, Reader
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.grid import Grid, Uniform
from diffusion_core.guidance import CFG
from diffusion_core.noise import Noise, Stream
from diffusion_core.renoise import Keep, Learned, Renoise
from diffusion_core.schedule import Level
from diffusion_core.solver import FirstOrder, Solver
from diffusion_core.table import write
from diffusion_core.walk import Draw, no_noise, walk

DRAWS = 1 << 20  # streams between two draws of one step: a grid may have as many steps


@dataclass(frozen=True)
class Sampling:
    """A bundle's sampling defaults: everything a picture depends on besides weights, seed and condition.

    Raises RefusedError for a solver whose order the grid cannot carry, and for a grid that cannot carry the steps.
    """

    steps: int
    solver: Solver = FirstOrder()
    grid: Grid = Uniform()
    renoise: Renoise = Keep()
    guidance: float = 1.0
    allowed_steps: tuple[int, ...] | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance < 0:
            raise ConfigError(
                f"steps {self.steps} and guidance {self.guidance}: steps >= 1 and guidance >= 0 are wanted"
            )
        if self.allowed_steps is not None and self.steps not in self.allowed_steps:
            raise ConfigError(f"steps {self.steps}: one of {list(self.allowed_steps)} is wanted")
        self.grid.check(self.steps)
        if self.steps < (fewest := self.solver.fewest_steps):
            raise RefusedError(
                f"steps {self.steps}: {self.solver} needs {fewest} readings, so a grid of at least {fewest} steps"
            )

    def changed(self, *, steps: int | None = None, guidance: float | None = None) -> "Sampling":
        """The same defaults with other steps or guidance; raises ConfigError for what this model cannot do."""
        return replace(
            self,
            steps=self.steps if steps is None else steps,
            guidance=self.guidance if guidance is None else guidance,
        )

    @property
    def calls(self) -> int:
        """Network calls a picture, counting both branches of guidance wherever it is on."""
        return self.solver.calls(self.grid.descents(self.steps)) * (1 if self.guidance == 1 else 2)


def sample(
    reader: Reader,
    x: Tensor,
    levels: Sequence[Level],
    solver: Solver = FirstOrder(),  # noqa: B008 (a frozen value)
    *,
    renoise: Renoise = Keep(),  # noqa: B008
    cond: Condition | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Carry x (B, ...), a sample at the first level, along the levels and return it at the last.

    Fresh noise, where the solver or `renoise` asks for it, is drawn from `noise`, one stream a draw and step.
    Raises DataError for an x that is not finite, ConfigError where noise is wanted and none given.
    """
    check_finite("x", x)
    draw = no_noise if noise is None else _draw_from(noise, x)
    if isinstance(renoise, Learned):  # a variance of its own for every pixel is no table
        return walk(
            lambda y, level: reader(y, level.t, cond), x, levels, solver, reader.schedule, renoise=renoise, draw=draw
        )
    return write(tuple(levels), solver, renoise, reader.schedule, reader.target).run(reader, x, cond, draw)


def _draw_from(noise: Noise, x: Tensor) -> Draw:
    return lambda step, number: noise.normal(x.shape[1:], Stream.RENOISE + step + number * DRAWS).to(x)


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    codec: Codec,
    sampling: Sampling,
    shape: Sequence[int],
    seeds: Sequence[int] | Tensor,
    cond: Condition | None = None,
) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] from seeds (B,) and what is asked for; `shape` is that of one latent.

    `cond` is a row a picture of what the network was trained with, such as {"label": (B,)}; `Bundle.condition` puts it
    together from classes and texts. A picture depends on its own seed and row, not on its batch.
    """
    device = next(denoiser.parameters()).device
    noise = Noise(torch.as_tensor(seeds, dtype=torch.int64, device=device))
    cond = cond and {name: value.to(device) for name, value in cond.items()}
    guide: Reader = denoiser if sampling.guidance == 1 else CFG(denoiser, sampling.guidance, sampling.interval)
    levels = sampling.grid.levels(denoiser.schedule, sampling.steps, denoiser.first)
    x = noise.normal(shape, Stream.START) * levels[0].row.b
    return codec.decode(sample(guide, x, levels, sampling.solver, renoise=sampling.renoise, cond=cond, noise=noise))
