"""Guides: a denoiser in, a denoiser out, so every sampler gets every guide for nothing.

One convention for the scale w: w = 0 is unconditional, w = 1 plain conditional, above 1 is guided:
pair = (1 - w)·unconditional + w·conditional. The paper's own (Ho and Salimans 2022, arXiv 2207.12598, eq. 6)
counts from plain conditional: w here is 1 + w there. All readings are affine in each other at fixed x, so
guiding the pair is guiding x₀, ε or v.
"""

import torch
from torch import Tensor, nn

from diffusion_core.denoiser import Condition, Denoiser, without_condition
from diffusion_core.errors import ConfigError
from diffusion_core.pair import Pair


class CFG(nn.Module):
    """Classifier-free guidance, for times inside `interval` (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""

    def __init__(self, denoiser: Denoiser, scale: float, interval: tuple[float, float] = (0.0, 1.0)):
        super().__init__()
        if scale < 0:
            raise ConfigError(f"guidance scale {scale}: 0 (unconditional), 1 (conditional) or more is wanted")
        self.denoiser, self.scale, self.interval = denoiser, scale, interval

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Pair:
        """The guided pair; raises ConfigError without a condition to guide to."""
        if cond is None:
            raise ConfigError("guidance without a condition: give a class label, or leave the guide out")
        low, high = self.interval
        times = t.to(x.device).expand(len(x))
        guided = ((times >= low) & (times <= high)).reshape(-1, *(1,) * (x.ndim - 1))
        free = without_condition(cond)
        both = {key: torch.cat((value, free[key])) for key, value in cond.items()}
        pair = self.denoiser(torch.cat((x, x)), torch.cat((times, times)), both)
        halves = [part.chunk(2) for part in pair]
        weight = torch.where(guided, self.scale, 1.0).to(x.dtype)
        return Pair(*(torch.lerp(without, given, weight) for given, without in halves))
