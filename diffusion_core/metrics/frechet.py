"""Squared Fréchet distance between two Gaussians: |m₁ - m₂|² + tr S₁ + tr S₂ - 2 tr (S₁S₂)^½.

The root needs no matrix square root (Dowson & Landau 1982, eq. 4): with S₁ = L Lᵀ the product S₁S₂ has the
eigenvalues of the symmetric matrix Lᵀ S₂ L, so the trace is the sum of their roots. It is called FID only where
the features are those of Inception-v3; elsewhere it carries the name of its extractor.
"""

from typing import cast

import torch
from torch import Tensor

from diffusion_core.errors import RefusedError
from diffusion_core.metrics.moments import Moments


def frechet(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of the Gaussians with these moments, never negative.

    Raises RefusedError if the two have features of different width.
    """
    if a.mean.shape != b.mean.shape:
        raise RefusedError(
            f"no distance between features of width {len(a.mean)} and {len(b.mean)}; equal ones are wanted"
        )
    # Factor the one of fewer samples: if its covariance is singular the factor is thin, and what is zero stays zero.
    few, many = sorted((a, b), key=lambda moments: moments.count)
    factor = _factor(few)
    inner = factor.T @ many.covariance @ factor
    root = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return max(0.0, float(shift + a.covariance.trace() + b.covariance.trace() - 2 * root))


def _factor(moments: Moments) -> Tensor:
    """L (d, r) with L Lᵀ = covariance and r its rank, which is below the number of samples."""
    width = len(moments.mean)
    if moments.count > width:
        lower, failed = torch.linalg.cholesky_ex(moments.covariance)
        if not failed:
            return cast(Tensor, lower)
    values, vectors = torch.linalg.eigh(moments.covariance)
    kept = values > values[-1] * width * torch.finfo(values.dtype).eps
    kept[: max(0, width + 1 - moments.count)] = False
    return cast(Tensor, vectors[:, kept] * values[kept].sqrt())
