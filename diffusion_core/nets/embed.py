"""Embeddings: numbers, classes and places as vectors."""

import math

import torch
from torch import Tensor, nn

from diffusion_core.denoiser import NULL


class Sinusoids(nn.Module):
    """sin and cos of c at `width`/2 frequencies spaced geometrically from `low` to `high` radians a unit."""

    frequencies: Tensor

    def __init__(self, width: int, low: float = 0.25, high: float = 64.0):
        super().__init__()
        spread = torch.linspace(math.log(low), math.log(high), width // 2).exp()
        self.register_buffer("frequencies", spread, persistent=False)

    def forward(self, c: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        angles = c[:, None] * self.frequencies
        return torch.cat((angles.sin(), angles.cos()), 1)


class LabelEmbedding(nn.Embedding):
    """A vector for each class, and a last one for "no class" (label -1)."""

    def __init__(self, classes: int, width: int):
        super().__init__(classes + 1, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, label: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        return super().forward(torch.where(label == NULL, self.num_embeddings - 1, label))


def grid_positions(side: int, width: int) -> Tensor:
    """Fixed sine-cosine vectors (side*side, width) of the places of a square grid, half for rows, half for columns."""
    quarter = torch.arange(width // 4) / (width // 4)
    place = torch.arange(side)[:, None] * 10_000**-quarter
    axis = torch.cat((place.sin(), place.cos()), 1)  # (side, width/2)
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1)
