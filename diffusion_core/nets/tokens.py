"""What the transformers share: pictures as tokens and back, text as tokens, adaptive layer norm, recomputed blocks.

A picture of side S becomes (S/p)² tokens, one for each p x p square, rows first (Dosovitskiy et al. 2021,
arXiv 2010.11929, eq. 1). Adaptive layer norm is (1 + scale)·LN(h) + shift, scale and shift spoken by the condition
(Peebles and Xie 2023, arXiv 2212.09748, section 3.2).
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_core.denoiser import NULL, Condition
from diffusion_core.errors import ConfigError

T = TypeVar("T")


def check_sizes(size: int, patch: int, width: int, heads: int) -> None:
    """Raises ConfigError if `patch` does not divide `size`, or `heads` or 4 do not divide `width`."""
    if min(size, patch, width, heads) < 1 or size % patch or width % heads or width % 4:
        raise ConfigError(
            f"size {size}, patch {patch}, width {width}, heads {heads}: "
            "patch must divide size, heads and 4 must divide width"
        )


def check_picture(x: Tensor, channels: int, size: int) -> None:
    """Raises ConfigError if x is not (B, channels, size, size)."""
    if x.shape[1] != channels:
        raise ConfigError(f"x has {x.shape[1]} channels; this network takes {channels}")
    if x.shape[2:] != (size, size):
        raise ConfigError(f"x is {x.shape[2]}x{x.shape[3]}; this network takes {size}x{size}")


def patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, T, C p p), the squares row by row."""
    return F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)


def picture(tokens: Tensor, patch: int) -> Tensor:
    """(B, T, C p p) -> (B, C, S, S), T a square number: the inverse of `patches`."""
    side = round(tokens.shape[1] ** 0.5)
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), patch)


def modulated(tokens: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """(1 + scale)·LN(tokens) + shift, with tokens (B, T, D), shift and scale (B, 1, D)."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=eps) * (1 + scale) + shift


def classes_of(cond: Condition | None, c: Tensor) -> Tensor:
    """cond["label"] (B,), or "no class" for every sample of c (B,) where there is none."""
    label = None if cond is None else cond.get("label")
    return torch.full(c.shape, NULL, device=c.device) if label is None else label


class Words(nn.Module):
    """Text tokens behind a learned one that stands for "no text", so that a row of pads alone still has something."""

    def __init__(self, width: int):
        super().__init__()
        self.nothing = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, cond: Condition | None, batch: int) -> tuple[Tensor, Tensor]:
        """cond {"text": (B, L, D), "mask": (B, L)} -> tokens (B, 1 + L, D), zero for pads, and their mask (B, 1 + L).

        Without "mask" every token is real, without "text" there is none. Raises ConfigError for text of another width.
        """
        tokens = self.nothing.expand(batch, 1, -1)
        real = torch.ones(batch, 1, dtype=torch.bool, device=tokens.device)
        if cond is None or "text" not in cond:
            return tokens, real
        text = cond["text"]
        if text.shape[-1] != len(self.nothing):
            raise ConfigError(f"text is {text.shape[-1]} wide; this network takes {len(self.nothing)}")
        mask = cond.get("mask", torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))
        text = text.masked_fill(~mask[..., None], 0)  # what a pad holds, NaN included, is nowhere seen
        return torch.cat((tokens, text.to(tokens.dtype)), 1), torch.cat((real, mask), 1)


def through(block: Callable[..., T], recompute: bool, *inputs: object) -> T:
    """block(*inputs); with `recompute` its inside is not kept for the backward pass but computed again there."""
    if recompute and torch.is_grad_enabled():
        again: T = checkpoint(block, *inputs, use_reentrant=False)
        return again
    return block(*inputs)
