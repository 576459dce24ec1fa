"""What is looked at before work begins: numbers that are finite, tensors that fit."""

import torch
from torch import Tensor

from diffusion_core.errors import DataError


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise DataError naming the tensor and the first bad place if it holds NaN or infinity."""
    if torch.isfinite(tensor.sum()):  # one pass; a sum that overflows is looked at again
        return
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise DataError(f"{name} holds {len(bad)} numbers that are not finite, the first at {where}: {tensor[where]}")
