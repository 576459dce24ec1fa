"""The U-Net of diffusion: down and up again, each level handing its features across (Ronneberger et al. 2015).

DDPM's (Ho et al. 2020, arXiv 2006.11239, appendix B) with self-attention chosen by resolution and, where `text` is
above 0, latent diffusion's with attention to text (Rombach et al. 2022, arXiv 2112.10752, section 3.3). What the
adapters read from published weights is a choice of keywords, nothing else.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.denoiser import Condition
from diffusion_core.errors import ConfigError
from diffusion_core.nets.blocks import (
    Downsample,
    PlaceAttention,
    ResidualBlock,
    TextAttention,
    Timesteps,
    Upsample,
    zeroed,
)
from diffusion_core.nets.embed import LabelEmbedding, Sinusoids
from diffusion_core.nets.tokens import classes_of, through


class UNet(nn.Module):
    """Pictures or latents (B, channels, H, W) in, (B, out_channels, H, W) out; zero at init.

    `widths` are the channels of the levels, each after the first on half the side (rounded up), with `depth` residual
    blocks down and one more up. Attention stands after the blocks of the levels whose side, for pictures of `size`, is
    in `attention`, and in the `middle`; it has `heads` heads, or as many as are `head_width` wide. Pictures of another
    side than `size` are taken too. `classes` above 0 reads cond["label"], `text` above 0 cond["text"] of that width,
    where cond["mask"] is True; no label, no text and no real token are all "no condition". `film` scales and shifts
    by the noise level instead of adding it. With a `period`, c is a timestep in 0..999 (see `Timesteps`, `shift`).
    `checkpointing` trades one more forward pass for the memory of the blocks' insides; gradients stay equal bit by bit.
    Raises ConfigError for numbers that do not fit each other.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int = 0,
        widths: tuple[int, ...] = (64, 128, 256),
        depth: int = 2,
        attention: tuple[int, ...] = (),
        middle: bool = True,
        heads: int | None = None,
        head_width: int = 32,
        text: int = 0,
        groups: int = 32,
        eps: float = 1e-5,
        film: bool = False,
        dropout: float = 0.0,
        period: float | None = None,
        shift: float = 0.0,
        lopsided: bool = False,
        out_channels: int | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        sides = sides_of(size, len(widths), lopsided)
        outs = channels if out_channels is None else out_channels
        if min(channels, outs) < 1 or min(classes, text) < 0 or not 0 <= dropout < 1:
            raise ConfigError(
                f"channels {channels}, out_channels {outs}, classes {classes}, text {text}, dropout {dropout}: "
                "channels from 1, classes and text from 0 and a dropout in [0, 1) are wanted"
            )
        _check_levels(widths, depth, groups, sides, attention)
        self.channels, self.text, self.checkpointing = channels, text, checkpointing
        first, last, told = widths[0], widths[-1], 4 * widths[0]

        def step(inner: int, outer: int, attends: bool) -> Step:
            block = ResidualBlock(inner, outer, told, groups, eps, film, dropout)
            if not attends:
                return Step(block, None)
            many = _heads(outer, heads, head_width)
            if text:
                return Step(block, TextAttention(outer, many, groups, text))
            return Step(block, PlaceAttention(outer, many, groups, eps))

        waves = Sinusoids(first) if period is None else Timesteps(first, period, shift)
        self.level = nn.Sequential(waves, nn.Linear(first, told), nn.SiLU(), nn.Linear(told, told))
        self.label = LabelEmbedding(classes, told) if classes else None
        self.enter = nn.Conv2d(channels, first, 3, padding=1)
        handed, width = [first], first
        self.down = nn.ModuleList()
        for i, outer in enumerate(widths):
            for _ in range(depth):
                self.down.append(step(width, outer, sides[i] in attention))
                width = outer
                handed.append(width)
            if i < len(widths) - 1:
                self.down.append(Downsample(width, lopsided))
                handed.append(width)
        self.middle = nn.ModuleList((step(last, last, middle), step(last, last, False)))
        self.up = nn.ModuleList()
        for i, outer in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                self.up.append(step(width + handed.pop(), outer, sides[i] in attention))
                width = outer
            if i:
                self.up.append(Upsample(width))
        self.norm = nn.GroupNorm(groups, first, eps)
        self.leave = zeroed(nn.Conv2d(first, outs, 3, padding=1))

    def forward(self, x: Tensor, c: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), c (B,), cond {"label": (B,), "text": (B, L, D), "mask": (B, L)} or less -> (B, out, H, W)."""
        if x.shape[1] != self.channels:
            raise ConfigError(f"x has {x.shape[1]} channels; this network takes {self.channels}")
        steer = self.level(c)
        if self.label is not None:
            steer = steer + self.label(classes_of(cond, c))
        told = (F.silu(steer), *(self._words(cond or {}, x) if self.text else (None, None)))
        handed = [x := self.enter(x)]
        for layer in self.down:
            x = layer(x) if isinstance(layer, Downsample) else through(layer, self.checkpointing, x, *told)
            handed.append(x)
        for layer in self.middle:
            x = through(layer, self.checkpointing, x, *told)
        for layer in self.up:
            if isinstance(layer, Upsample):
                x = layer(x, handed[-1].shape[2:])
            else:
                x = through(layer, self.checkpointing, torch.cat((x, handed.pop()), 1), *told)
        out: Tensor = self.leave(F.silu(self.norm(x)))
        return out

    def _words(self, cond: Condition, x: Tensor) -> tuple[Tensor, Tensor]:
        """Text with zeros for pads, and where to look: a row without a real token looks at its pads, which say zero."""
        text = cond.get("text", x.new_zeros(len(x), 1, self.text))
        if text.shape[-1] != self.text:
            raise ConfigError(f"text is {text.shape[-1]} wide; this network takes {self.text}")
        real = cond.get("mask", text.new_full(text.shape[:2], "text" in cond, dtype=torch.bool))
        return text.masked_fill(~real[..., None], 0), real | ~real.any(1, keepdim=True)


class Step(nn.Module):
    """A residual block and, if any, the attention after it."""

    def __init__(self, residual: ResidualBlock, attention: PlaceAttention | TextAttention | None):
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, x: Tensor, steer: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        """x (B, inner, H, W), steer (B, told) -> (B, outer, H, W)."""
        x = self.residual(x, steer)
        return x if self.attention is None else self.attention(x, text, mask)


def sides_of(size: int, levels: int, lopsided: bool = False) -> list[int]:
    """The sides of the levels for pictures of side `size`, largest first."""
    sides = [size]
    for _ in range(levels - 1):
        sides.append(sides[-1] // 2 if lopsided else (sides[-1] + 1) // 2)
    return sides


def _heads(width: int, heads: int | None, head_width: int) -> int:
    name, divisor = ("head_width", head_width) if heads is None else ("heads", heads)
    if divisor < 1 or width % divisor:
        raise ConfigError(f"{name} {divisor}: it must divide the width {width} of every level with attention")
    return width // divisor if heads is None else divisor


def _check_levels(
    widths: Sequence[int], depth: int, groups: int, sides: Sequence[int], attention: Sequence[int]
) -> None:
    if not widths or min(widths) < 1 or depth < 1 or sides[-1] < 1:
        raise ConfigError(
            f"widths {widths}, depth {depth}, size {sides[0]}: numbers from 1 are wanted, a pixel a level"
        )
    if groups < 1 or any(width % groups for width in widths) or widths[0] % 2:
        raise ConfigError(f"widths {widths}, groups {groups}: groups must divide every width, and 2 the first")
    if unknown := [side for side in attention if side not in sides]:
        raise ConfigError(
            f"attention at {unknown[0]}; a picture of {sides[0]} has the sides {', '.join(map(str, sides))}"
        )
