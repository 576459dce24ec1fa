"""MM-DiT: pictures and text as two streams that meet in attention (Esser et al. 2024, arXiv 2403.03206, section 4).

Each stream has weights of its own; attention runs over both rows of tokens put together. Queries and keys are
divided by their root mean square (section 5.3.2), which keeps attention from growing in long trainings.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.denoiser import Condition
from diffusion_core.errors import ConfigError
from diffusion_core.nets.blocks import attend, zeroed
from diffusion_core.nets.embed import LabelEmbedding, Sinusoids, grid_positions
from diffusion_core.nets.tokens import (
    Words,
    check_picture,
    check_sizes,
    classes_of,
    modulated,
    patches,
    picture,
    through,
)

EPS = 1e-6  # of every norm, as in Stable Diffusion 3


class MMDiT(nn.Module):
    """Pictures or latents (B, channels, size, size) in, the same shape out; zero at init.

    Text tokens (cond["text"], `text` wide) stand beside those of the picture where cond["mask"] is True; noise level,
    class and the mean of the text steer both streams. No text and no real token are the same. `checkpointing` trades
    one more forward pass for the memory of the blocks' insides.
    Raises ConfigError for numbers that do not fit each other and for an x of another shape.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        text: int,
        patch: int = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        expand: int = 4,
        checkpointing: bool = False,
    ):
        super().__init__()
        check_sizes(size, patch, width, heads)
        if text < 1 or depth < 1:
            raise ConfigError(f"text {text}, depth {depth}: tokens and blocks from 1 are wanted")
        self.channels, self.size, self.patch, self.checkpointing = channels, size, patch, checkpointing
        self.enter = nn.Linear(channels * patch**2, width)
        self.register_buffer("places", grid_positions(size // patch, width), persistent=False)
        self.level = nn.Sequential(Sinusoids(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = LabelEmbedding(classes, width)
        self.words = Words(text)
        self.gist = nn.Sequential(nn.Linear(text, width), nn.SiLU(), nn.Linear(width, width))
        self.read = nn.Linear(text, width)
        self.blocks = nn.ModuleList(Block(width, heads, expand, last=i == depth - 1) for i in range(depth))
        self.steer = zeroed(nn.Linear(width, 2 * width))
        self.leave = zeroed(nn.Linear(width, channels * patch**2))

    def forward(self, x: Tensor, c: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), c (B,), cond {"label": (B,), "text": (B, L, D), "mask": (B, L)} or less -> (B, C, H, W)."""
        check_picture(x, self.channels, self.size)
        words, real = self.words(cond, len(x))
        gist = self.gist(words.sum(1) / real.sum(1, keepdim=True))  # pads are zero and "no text" is always counted
        steer = F.silu(self.level(c) + self.label(classes_of(cond, c)) + gist)  # (B, D)
        tokens = self.enter(patches(x, self.patch)) + self.places  # (B, T, D)
        told = self.read(words)  # (B, L, D)
        mask = torch.cat((real.new_ones(tokens.shape[:2]), real), 1)[:, None, None]
        for block in self.blocks:
            tokens, told = through(block, self.checkpointing, tokens, told, steer, mask)
        shift, scale = self.steer(steer)[:, None].chunk(2, -1)
        return picture(self.leave(modulated(tokens, shift, scale, EPS)), self.patch)


class Block(nn.Module):
    """Two streams, one attention; the identity at init. In the `last` block nobody reads the text any more."""

    def __init__(self, width: int, heads: int, expand: int, last: bool = False):
        super().__init__()
        self.heads, self.last = heads, last
        self.seen, self.told = Stream(width, heads, expand), Stream(width, heads, expand, mute=last)

    def forward(self, seen: Tensor, told: Tensor, steer: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Picture (B, T, D) and text (B, L, D), steer (B, D), mask over both, broadcast to (B, heads, T + L, T + L)."""
        turns, asides = self.seen.turns(steer), self.told.turns(steer)
        rows = zip(self.seen.asks(seen, turns), self.told.asks(told, asides), strict=True)
        q, k, v = (torch.cat(both, 1) for both in rows)
        found, noted = attend(q, k, v, self.heads, mask).split((seen.shape[1], told.shape[1]), 1)
        return self.seen.takes(seen, found, turns), told if self.last else self.told.takes(told, noted, asides)


class Stream(nn.Module):
    """The weights of one kind of token in a block; a `mute` one is only asked, so it has no way to answer."""

    def __init__(self, width: int, heads: int, expand: int, mute: bool = False):
        super().__init__()
        self.heads, self.count = heads, 2 if mute else 6
        self.steer = zeroed(nn.Linear(width, self.count * width))
        self.mix = nn.Linear(width, 3 * width)
        self.query_norm, self.key_norm = nn.RMSNorm(width // heads, EPS), nn.RMSNorm(width // heads, EPS)
        if not mute:
            self.join = nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, expand * width), nn.GELU("tanh"), nn.Linear(expand * width, width)
            )

    def turns(self, steer: Tensor) -> tuple[Tensor, ...]:
        """steer (B, D) -> shift and scale before attention and, unless mute, the gate after it and the MLP's three."""
        turns: tuple[Tensor, ...] = self.steer(steer)[:, None].chunk(self.count, -1)
        return turns

    def asks(self, tokens: Tensor, turns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens (B, T, D), each (B, T, D)."""
        shift, scale = turns[:2]
        q, k, v = self.mix(modulated(tokens, shift, scale, EPS)).chunk(3, -1)
        return self._normed(self.query_norm, q), self._normed(self.key_norm, k), v

    def takes(self, tokens: Tensor, found: Tensor, turns: tuple[Tensor, ...]) -> Tensor:
        """The tokens with what attention found for them (B, T, D), then with their MLP's word."""
        _, _, gate1, shift, scale, gate2 = turns
        tokens = tokens + gate1 * self.join(found)
        out: Tensor = tokens + gate2 * self.mlp(modulated(tokens, shift, scale, EPS))
        return out

    def _normed(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        out: Tensor = norm(x.unflatten(-1, (self.heads, -1))).flatten(-2)
        return out
