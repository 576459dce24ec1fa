"""Averages of weights over the course of training: what is sampled from, scored and served.

All are θ̄ <- β·θ̄ + (1 - β)·θ after each step; they differ in the share β of the past that a step keeps:

    Ema        β = min(decay, (1 + n)/(10 + n))    the last 1/(1 - decay) steps count, however long the training
    PowerEma   β = (1 - 1/n)^(γ+1)                 θ(τ) counts as τ^γ: a fixed share of the training so far counts

(Karras et al. 2024, arXiv 2312.02696, eq. 121 and 127).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_core.errors import ConfigError

WARM_UP = 10.0
WIDEST = 12**-0.5  # the relative standard deviation of the plain mean, γ = 0


class WeightAverage(ABC):
    """A running average of a module's weights; `updates` counts the steps it has taken in."""

    def __init__(self, module: nn.Module):
        self.updates = 0
        self.average = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @abstractmethod
    def kept(self) -> float:
        """The share β of the average so far that update number `updates` keeps."""

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's weights as they are now; what is not floating point is copied."""
        self.updates += 1
        decay = self.kept()
        pairs = [(self.average[name], tensor.detach()) for name, tensor in module.state_dict().items()]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([old for old, _ in floating], [new for _, new in floating], 1 - decay)
        for old, new in pairs:
            if not old.is_floating_point():
                old.copy_(new)

    def copy_to(self, module: nn.Module) -> None:
        """Put the averaged weights into a module."""
        module.load_state_dict(self.average)

    def restore(self, average: Mapping[str, Tensor], updates: int) -> None:
        """Go on from a saved average."""
        self.average = {name: tensor.clone() for name, tensor in average.items()}
        self.updates = updates


class Ema(WeightAverage):
    """θ̄ <- d·θ̄ + (1-d)·θ after each step; d rises to `decay` as (1 + n)/(10 + n), so that the start is forgotten."""

    def __init__(self, module: nn.Module, decay: float):
        super().__init__(module)
        self.decay = decay

    def kept(self) -> float:
        return min(self.decay, (1 + self.updates) / (WARM_UP + self.updates))


class PowerEma(WeightAverage):
    """θ̄(t) = (γ+1)/t^(γ+1) ∫₀ᵗ τ^γ θ(τ) dτ, for a θ that is constant during each step (Karras et al. 2024, eq. 121).

    `std` is the standard deviation of τ/t under that weight, the paper's σ_rel: 0.05 to 0.15 are usual. The
    start has no weight. Raises ConfigError unless 0 < std < 0.2887, the value of the plain mean.
    """

    def __init__(self, module: nn.Module, std: float):
        super().__init__(module)
        self.std, self.exponent = std, power_exponent(std)

    def kept(self) -> float:
        return float((1 - 1 / self.updates) ** (self.exponent + 1))


def power_exponent(std: float) -> float:
    """The γ of the profile τ^γ with relative standard deviation `std`: (γ+1) / ((γ+2)² (γ+3)) = std².

    The greatest root of a cubic (Karras et al. 2024, eq. 126 and algorithm 2): γ is 16.97 at 0.05 and 6.94 at
    0.10. Raises ConfigError unless 0 < std < 0.2887.
    """
    if not 0 < std < WIDEST:
        raise ConfigError(f"std {std}: a relative standard deviation above 0 and below {WIDEST:.4f} is wanted")
    return float(np.roots((std**2, std**2, -1.0, 1.0)).real.max()) - 2
