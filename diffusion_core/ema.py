"""Exponential moving averages of weights: what is sampled from, scored and served."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

WARM_UP = 10.0


class Ema:
    """θ̄ <- d·θ̄ + (1-d)·θ after each step; d rises to `decay` as (1 + n)/(10 + n), so that the start is forgotten."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.average = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's weights as they are now; what is not floating point is copied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (WARM_UP + self.updates))
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
