"""CLIP's text transformer (Radford et al. 2021, arXiv 2103.00020, section 2.4): each token sees those before it."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.errors import ConfigError
from diffusion_core.nets.blocks import attend
from diffusion_core.nets.text_encoder import TextEncoder

Activation = Literal["quick_gelu", "gelu"]


class ClipEncoder(TextEncoder):
    """The last tokens of CLIP's text transformer, after the final norm; positions are learned.

    `activation` is x·sigmoid(1.702 x) in the first published weights (`quick_gelu`), the exact GELU in later ones.
    Raises ConfigError for numbers that do not fit each other.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        inner: int,
        length: int = 77,
        activation: Activation = "quick_gelu",
        eps: float = 1e-5,
    ):
        super().__init__()
        check_widths(width, heads, depth, length)
        self.vocabulary, self.width, self.length = vocabulary, width, length
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner, activation, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token numbers (B, L) -> (B, L, D); pads come last, so no real token sees one."""
        tokens = self.tokens(ids) + self.places.weight
        earlier = torch.ones(self.length, self.length, dtype=torch.bool, device=ids.device).tril()
        for block in self.blocks:
            tokens = block(tokens, earlier)
        out: Tensor = self.norm(tokens)
        return out


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, inner: int, activation: Activation, eps: float = 1e-5):
        super().__init__()
        self.heads = heads
        self.activation: Callable[[Tensor], Tensor] = quick_gelu if activation == "quick_gelu" else F.gelu
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.mix, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, L, D), mask that broadcasts to (B, heads, L, L), True where attention may look -> (B, L, D)."""
        q, k, v = self.mix(self.norm1(tokens)).chunk(3, -1)
        tokens = tokens + self.join(attend(q, k, v, self.heads, mask))
        out: Tensor = tokens + self.narrow(self.activation(self.widen(self.norm2(tokens))))
        return out


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702 x), an approximation of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


def check_widths(width: int, heads: int, depth: int, length: int) -> None:
    """Raises ConfigError if `heads` does not divide `width`, or there is no block or no token."""
    if min(width, heads, depth, length) < 1 or width % heads:
        raise ConfigError(
            f"width {width}, heads {heads}, depth {depth}, length {length}: "
            "numbers from 1 are wanted, and heads must divide width"
        )
