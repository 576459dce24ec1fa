"""Solvers that draw fresh noise before a step: EDM's churn and Langevin correction, around any other solver.

Noise on arrival is not here: that is a renoise rule (renoise.py), and with it DDPM, DDIM(η), Euler-ancestral and
the SDE form of DPM-Solver++ are the deterministic solvers.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from diffusion_core.chain import jump
from diffusion_core.errors import ConfigError
from diffusion_core.pair import Pair
from diffusion_core.schedule import Schedule
from diffusion_core.solver import Denoise, Fresh, Heun, Leg, Memory, Solver
from diffusion_core.target import Target

MOST_CHURN = math.sqrt(2) - 1  # never more fresh noise in one step than there is noise


class _Around(Solver):
    """A solver that does something to the sample and then asks another one."""

    inner: Solver

    @property
    def frame(self) -> Target | None:  # type: ignore[override]
        return self.inner.frame

    def order_on(self, schedule: Schedule) -> int:
        return self.inner.order_on(schedule)

    @property
    def fewest_steps(self) -> int:
        return self.inner.fewest_steps


@dataclass(frozen=True)
class Churn(_Around):
    """Raise the noise a little before each step and solve from there (Karras et al. 2022, algorithm 2).

    `amount`, `low`, `high` and `inflate` are the paper's S_churn, S_tmin, S_tmax and S_noise; σ is the ratio σ/α.
    A schedule that ends at t = 1 cannot be raised beyond it.
    """

    inner: Solver = Heun()
    amount: float = 40.0
    low: float = 0.05
    high: float = 50.0
    inflate: float = 1.003

    def __post_init__(self) -> None:
        if not (self.amount >= 0 and 0 <= self.low <= self.high and self.inflate > 0):
            raise ConfigError(
                f"amount {self.amount}, low {self.low}, high {self.high}, inflate {self.inflate}: "
                "amount >= 0, 0 <= low <= high and inflate > 0 are wanted"
            )

    def hold(self, denoise: Denoise, x: Tensor, leg: Leg, memory: Memory, fresh: Fresh) -> tuple[Pair, Memory]:
        a, b = leg.level.row
        gamma = min(self.amount / leg.steps, MOST_CHURN)
        if a == 0 or gamma == 0 or not self.low <= b / a <= self.high:
            return self.inner.hold(denoise, x, leg, memory, fresh)
        raised = leg.at(leg.level.log_snr - 2 * math.log1p(gamma))
        kept, spread = jump(leg.level, raised)
        x = kept * x + spread * self.inflate * fresh(1)
        return self.inner.hold(denoise, x, leg._replace(level=raised), memory, fresh)

    def calls(self, steps: int) -> int:
        return self.inner.calls(steps)


@dataclass(frozen=True)
class Langevin(_Around):
    """Walk along the score at each level before the step from it (Song et al. 2021, algorithms 4 and 5).

    The paper sizes a walk by the norms of noise and score over the batch; so that a picture depends on its own
    seed alone, the norms here are those expected at the level: a walk of ε = 2(snr·σ)², σ the noise there.
    """

    inner: Solver
    walks: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        if self.walks < 1 or not 0 < self.snr < 1:
            raise ConfigError(f"walks {self.walks}, snr {self.snr}: walks >= 1 and 0 < snr < 1 are wanted")

    def hold(self, denoise: Denoise, x: Tensor, leg: Leg, memory: Memory, fresh: Fresh) -> tuple[Pair, Memory]:
        sigma = leg.level.row.b
        size = 2 * (self.snr * sigma) ** 2
        for walk in range(self.walks):
            score = -1 / sigma * denoise(x, leg.level).eps
            x = x + size * score + math.sqrt(2 * size) * fresh(2 + walk)
        return self.inner.hold(denoise, x, leg, memory, fresh)

    def calls(self, steps: int) -> int:
        return self.inner.calls(steps) + self.walks * steps
