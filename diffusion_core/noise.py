"""Randomness by counting: every draw is a pure function of (seed, step, sample id, stream).

There is no generator state. A picture therefore depends on its seed and not on its batch, and a training
step draws the same times, noise and dropout on one worker or on eight. The generator is Philox4x32-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in int64 tensors on any device; normals
are Box-Muller.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Stream(IntEnum):
    """Names for independent draws of one (seed, step, id); a sampler's own noise uses the rest of the range."""

    TIME = 1
    NOISE = 2
    DROPOUT = 3
    LATENT = 4
    AUGMENT = 5
    ORDER = 6
    START = 7
    RENOISE = 1000


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10: four 32-bit words for each counter and key (int64 tensors holding 32-bit words).

    Returns int64 words in the counters' shape with a last axis of 4.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2  # wraps in int64; the bits are those of uint64
        c0, c1, c2, c3 = (high >> 32) & MASK ^ c1 ^ k0, high & MASK, (low >> 32) & MASK ^ c3 ^ k1, low & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return torch.stack((c0, c1, c2, c3), -1)


class Noise:
    """Draws for a batch of B samples, each row a function of its own seed and id alone.

    `seeds` is one number for all rows or one a row (B,), `ids` the samples' numbers (B,), default 0.
    """

    def __init__(self, seeds: int | Sequence[int] | Tensor, ids: Tensor | None = None, step: int = 0):
        seed = torch.as_tensor(seeds, dtype=torch.int64, device=None if ids is None else ids.device)
        rows = torch.zeros_like(seed.reshape(-1)) if ids is None else ids
        self.key = tuple((part.expand_as(rows) & MASK)[:, None] for part in (seed, seed >> 32))
        self.ids, self.step = rows[:, None] & MASK, step

    def bits(self, count: int, stream: int) -> Tensor:
        """(B, count) independent 32-bit words as int64."""
        block = torch.arange(-(-count // 4), device=self.ids.device)[None]
        shape = torch.broadcast_shapes(block.shape, self.ids.shape)
        words = (block, torch.full_like(block, stream), torch.full_like(block, self.step), self.ids)
        counter = tuple(word.expand(shape) for word in words)
        drawn = philox(counter, (self.key[0].expand(shape), self.key[1].expand(shape)))  # type: ignore[arg-type]
        return drawn.flatten(1)[:, :count]

    def uniform(self, shape: Sequence[int] = (), stream: int = Stream.TIME) -> Tensor:
        """(B, *shape) float64 in the open interval (0, 1)."""
        bits = self.bits(math.prod(shape), stream)
        return ((bits.double() + 0.5) / 2**32).reshape(-1, *shape)

    def normal(self, shape: Sequence[int], stream: int = Stream.NOISE) -> Tensor:
        """(B, *shape) standard normal float32."""
        count = math.prod(shape)
        pairs = self.bits(2 * -(-count // 2), stream).reshape(len(self.ids), -1, 2)
        u = (pairs.double() + 0.5) / 2**32
        radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
        drawn = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)
        return drawn[:, :count].float().reshape(-1, *shape)
