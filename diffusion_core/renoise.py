"""Renoise rules: how far the noise of the held pair is turned toward fresh noise on arrival.

ε <- √(1-ρ²)·ε + ρ·z        ρ = 0 DDIM, Ancestral(1) DDPM, Full multistep consistency sampling
"""

import math
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from diffusion_core.chain import jump, posterior
from diffusion_core.errors import ConfigError
from diffusion_core.pair import Pair
from diffusion_core.schedule import Level
from diffusion_core.solver import Fresh
from diffusion_core.spec import Kind


class Renoise(Kind):
    """How much fresh noise a step brings."""

    @abstractmethod
    def share(self, level: Level, to: Level) -> float:
        """ρ in [0, 1] for a step between two levels."""

    def turn(self, pair: Pair, level: Level, to: Level, fresh: Fresh) -> Pair:
        """The pair with its noise turned for the step from `level` to `to`; draws noise 0 of the step if any."""
        rho = 0.0 if to.clean else self.share(level, to)
        if rho == 0:
            return pair
        return pair._replace(eps=math.sqrt(1 - rho**2) * pair.eps + rho * fresh(0))


@dataclass(frozen=True)
class Keep(Renoise):
    """No fresh noise: the deterministic path."""

    def share(self, level: Level, to: Level) -> float:
        return 0.0


@dataclass(frozen=True)
class Ancestral(Renoise):
    """DDIM(η): η = 1 has the mean and variance of DDPM's posterior (Song et al. 2021, arXiv 2010.02502, eq. 16)."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"eta {self.eta}: a number in [0, 1] is wanted")

    def share(self, level: Level, to: Level) -> float:
        ratio = level.row.a * to.row.b / (to.row.a * level.row.b)
        return self.eta * math.sqrt(max(0.0, 1 - ratio**2))


@dataclass(frozen=True)
class Full(Renoise):
    """Wholly fresh noise: multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1)."""

    def share(self, level: Level, to: Level) -> float:
        return 1.0


@dataclass(frozen=True)
class Learned(Renoise):
    """DDPM's posterior with the variance the network says (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15).

    Its log lies a share `spread` of the way from the posterior's variance up to the forward step's.
    """

    def share(self, level: Level, to: Level) -> float:
        return Ancestral(1.0).share(level, to)

    def turn(self, pair: Pair, level: Level, to: Level, fresh: Fresh) -> Pair:
        if to.clean:
            return pair
        if pair.spread is None:
            raise ConfigError("renoise 'learned' with a denoiser of fixed variance: build it with variance 'learned'")
        low, high = 2 * math.log(posterior(level, to)[2]), 2 * math.log(jump(to, level)[1])
        std: Tensor = ((low + (high - low) * pair.spread) / 2).exp()
        rho = self.share(level, to)
        return pair._replace(eps=math.sqrt(1 - rho**2) * pair.eps + std / to.row.b * fresh(0))
