"""Thresholds: what is read of the picture is kept in the range that pictures have. For pixels, not for latents."""

import math

from torch import Tensor

from diffusion_core.denoiser import Condition, Reader, Said
from diffusion_core.errors import ConfigError
from diffusion_core.guidance import Guide
from diffusion_core.target import X0


class Clip(Guide):
    """Static thresholding: every x₀ in [-limit, limit] (Ho et al. 2020's code; named by Saharia et al. 2022, 2.3)."""

    def __init__(self, denoiser: Reader, limit: float = 1.0):
        super().__init__(denoiser)
        if not 0 < limit < math.inf:
            raise ConfigError(f"limit {limit}: a number above 0 is wanted")
        self.target, self.limit = X0(), limit

    def read(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """The clipped x₀ in x (B, ...) at times t (B,) or at one for all."""
        x0, _, spread = self.denoiser(x, t, cond)
        return Said(x0.clamp(-self.limit, self.limit), spread)


class DynamicThreshold(Guide):
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3): x₀ <- clip(x₀, -s, s)/s.

    s is the `quantile` of the sample's |x₀|, or 1 where that is less: such a sample is only clipped to [-1, 1].
    """

    def __init__(self, denoiser: Reader, quantile: float = 0.995):
        super().__init__(denoiser)
        if not 0 < quantile <= 1:
            raise ConfigError(f"quantile {quantile}: a number in (0, 1] is wanted")
        self.target, self.quantile = X0(), quantile

    def read(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """The thresholded x₀ in x (B, ...) at times t (B,) or at one for all."""
        x0, _, spread = self.denoiser(x, t, cond)
        s = quantile(x0.flatten(1).abs(), self.quantile).clamp_min(1).reshape(-1, *(1,) * (x0.ndim - 1))
        return Said(x0.clamp(-s, s) / s, spread)


def quantile(values: Tensor, part: float) -> Tensor:
    """The quantile of each row (B, N), linear between its neighbours; for any N, which torch.quantile is not."""
    place = part * (values.shape[1] - 1)
    below = int(place)
    largest = values.topk(values.shape[1] - below, 1).values  # the last is the one below, the one before it above
    return largest[:, -1].lerp(largest[:, -2:][:, 0], place - below)
