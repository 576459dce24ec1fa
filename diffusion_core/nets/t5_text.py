"""T5's encoder (Raffel et al. 2020, arXiv 1910.10683, section 2.1): places are told by a bias on attention alone.

The bias depends on how far two tokens are apart: exactly for near ones, in ever wider buckets for far ones. Norms
divide by the root mean square and subtract nothing, no map has a bias, and scores are not divided by a root.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.errors import ConfigError
from diffusion_core.nets.text_encoder import TextEncoder

Feed = Literal["relu", "gated-gelu"]


class T5Encoder(TextEncoder):
    """The last tokens of T5's encoder, after the final norm; `head_width` times `heads` need not be `width`.

    `feed` is `relu` in the first weights, `gated-gelu` since version 1.1 (Shazeer 2020, arXiv 2002.05202, section 2).
    Raises ConfigError for numbers out of range.
    """

    places: Tensor

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        head_width: int,
        inner: int,
        length: int = 128,
        feed: Feed = "gated-gelu",
        buckets: int = 32,
        farthest: int = 128,
        eps: float = 1e-6,
    ):
        super().__init__()
        if min(vocabulary, width, depth, heads, head_width, inner, length) < 1:
            raise ConfigError(
                f"vocabulary {vocabulary}, width {width}, depth {depth}, heads {heads}, head_width {head_width}, "
                f"inner {inner}, length {length}: numbers from 1 are wanted"
            )
        if buckets < 4 or buckets % 4 or farthest <= buckets // 4:
            raise ConfigError(
                f"buckets {buckets}, farthest {farthest}: a multiple of 4 and more than a quarter of it are wanted"
            )
        self.vocabulary, self.width, self.length = vocabulary, width, length
        self.tokens = nn.Embedding(vocabulary, width)
        self.bias = nn.Embedding(buckets, heads)
        self.register_buffer("places", buckets_of(length, buckets, farthest), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, head_width, inner, feed, eps) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token numbers (B, L) and which are real (B, L) -> (B, L, D)."""
        tokens = self.tokens(ids)
        bias = self.bias(self.places).permute(2, 0, 1)[None]  # (1, heads, L, L)
        bias = bias.masked_fill(~mask[:, None, None], -math.inf)
        for block in self.blocks:
            tokens = block(tokens, bias)
        out: Tensor = self.norm(tokens)
        return out


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, head_width: int, inner: int, feed: Feed, eps: float):
        super().__init__()
        self.heads, self.gated = heads, feed == "gated-gelu"
        self.norm1, self.norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.mix = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.join = nn.Linear(heads * head_width, width, bias=False)
        self.widen = nn.Linear(width, 2 * inner if self.gated else inner, bias=False)  # gated: gate, then value
        self.narrow = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """tokens (B, L, D), bias (B, heads, L, L), -inf where attention may not look -> (B, L, D)."""
        rows = self.mix(self.norm1(tokens)).chunk(3, -1)
        q, k, v = (row.unflatten(-1, (self.heads, -1)).transpose(1, 2) for row in rows)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        tokens = tokens + self.join(seen.transpose(1, 2).flatten(2))
        h = self.widen(self.norm2(tokens))
        if self.gated:
            gate, value = h.chunk(2, -1)
            h = F.gelu(gate, approximate="tanh") * value
        else:
            h = F.relu(h)
        out: Tensor = tokens + self.narrow(h)
        return out


def buckets_of(length: int, buckets: int, farthest: int) -> Tensor:
    """The bucket (L, L) of every distance from an asking token to a seen one: half for each side.

    On a side, half the buckets hold one distance each, the others grow geometrically up to `farthest`.
    """
    apart = torch.arange(length)[None] - torch.arange(length)[:, None]
    side, far = buckets // 2, apart.abs()
    exact = side // 2
    # In float32, like those behind published weights: an exact logarithm would move some edges.
    grown = torch.log(far.clamp_min(1).float() / exact) / math.log(farthest / exact) * (side - exact)
    bucket = torch.where(far < exact, far, (exact + grown.long()).clamp_max(side - 1))
    return bucket + side * (apart > 0)
