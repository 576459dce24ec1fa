"""How alike two pictures are without learned weights: PSNR, SSIM and MS-SSIM.

In windows of Gaussian weight with means μ, variances σ² and covariance σxy, for pictures x, y in [0, 1],

    l = (2 μx μy + C₁)/(μx² + μy² + C₁)      cs = (2 σxy + C₂)/(σx² + σy² + C₂)      C₁ = 0.01², C₂ = 0.03²

SSIM is the mean of l·cs (Wang et al. 2004, eq. 13); MS-SSIM the product of the mean cs at each scale and of l at the
coarsest, each to a power (Wang, Simoncelli and Bovik 2003, eq. 7). Colours are compared channel by channel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.errors import ConfigError

POWERS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first (Wang et al. 2003, section 3.2)
WINDOW, SIGMA = 11, 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2
LEAST = 1e-6  # what a mean below it counts as, since a power has no slope at 0


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error between pictures in [-1, 1]; 126 dB at most."""
    return 10 * math.log10(4 / max(error, 1e-12))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (B,) of pictures (B, C, H, W) in [-1, 1]; the window is 11 pixels, less where a side is shorter."""
    widest = min(WINDOW, *x.shape[-2:])
    luminance, contrast = _parts(x, y, widest - 1 + widest % 2)
    return (luminance * contrast).mean((1, 2, 3))


def ms_ssim(x: Tensor, y: Tensor, scales: int = len(POWERS), window: int = WINDOW) -> Tensor:
    """MS-SSIM (B,) of pictures (B, C, H, W) in [-1, 1]; each scale averages 2x2 pixels of the one before.

    With fewer than five scales the powers of those that are left sum to 1. Raises ConfigError for pictures too small.
    """
    least = smallest_side(scales, window)
    if min(x.shape[-2:]) < least:
        raise ConfigError(
            f"pictures of {x.shape[-2]}x{x.shape[-1]}: MS-SSIM over {scales} scales with a window of {window} wants "
            f"sides of {least} or more"
        )
    powers, logs = POWERS[:scales], []
    for scale, power in enumerate(powers, 1):
        if scale > 1:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        luminance, contrast = _parts(x, y, window)
        mean = (luminance * contrast if scale == scales else contrast).mean((2, 3))
        logs.append(power / sum(powers) * mean.clamp(min=LEAST).log())
    return torch.stack(logs).sum(0).exp().mean(1)


def smallest_side(scales: int, window: int) -> int:
    """The shortest side of a picture, in pixels, that still holds a window at the coarsest scale."""
    return window << (scales - 1)


def _parts(x: Tensor, y: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """l and cs (B, C, h, w) of every whole window."""
    exact = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # a variance is a difference of near numbers
        x, y = ((one.to(exact) + 1) / 2 for one in (x, y))
        means = _windows(torch.stack((x, y, x * x, y * y, x * y)), window)
        mx, my, xx, yy, xy = means
        luminance = (2 * mx * my + C1) / (mx * mx + my * my + C1)
        contrast = (2 * (xy - mx * my) + C2) / (xx - mx * mx + yy - my * my + C2)
    return luminance, contrast


def _windows(x: Tensor, window: int) -> Tensor:
    """Gaussian means over every whole window of the last two axes."""
    distance = torch.arange(window, device=x.device, dtype=x.dtype) - (window - 1) / 2
    weights = (-(distance**2) / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    flat = F.conv2d(F.conv2d(flat, weights[None, None, :, None]), weights[None, None, None, :])
    return flat.reshape(*x.shape[:-2], *flat.shape[-2:])
