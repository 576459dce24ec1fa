"""How far latents spread over many pictures, from running sums: one pass, and memory that does not grow with them.

The variance of a latent drawn from its moments is that of its mean plus its own: Var[z] = E[μ² + σ²] - E[μ]².
"""

import torch
from torch import Tensor

from diffusion_core.codec import Moments
from diffusion_core.errors import DataError


class Spread:
    """Mean and standard deviation of the latents added so far, of each channel and of all together, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = torch.zeros(2, 1, dtype=torch.float64)

    def add(self, moments: Moments) -> None:
        """Take in the latents (B, c, h, w) of some pictures; sides may differ from call to call."""
        mean, std = (part.detach().double() for part in moments)
        axes = (0, 2, 3)
        self.sums = self.sums + torch.stack((mean.sum(axes), (mean.square() + std.square()).sum(axes))).cpu()
        self.count += mean.shape[0] * mean.shape[2] * mean.shape[3]

    def channels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (c,) both; raises DataError if no finite latent was added."""
        if not self.count or not self.sums.isfinite().all():
            told = "none was added" if not self.count else "they are not finite"
            raise DataError(f"the spread of latents cannot be measured: {told}")
        mean, second = self.sums / self.count
        return mean, (second - mean.square()).clamp(min=0).sqrt()

    def overall(self) -> float:
        """The standard deviation over all channels; raises DataError as `channels` does."""
        mean, std = self.channels()
        return (std.square().mean() + mean.var(unbiased=False)).sqrt().item()
