"""EDM2's U-Net, in which every layer keeps the magnitude of its input (Karras et al. 2024, arXiv 2312.02696).

The network is that of configuration G (figure 21): pixel norm where the encoder's main path enters a block, sums
of fixed shares, cosine attention, one learned gain at each block's modulation and one at the very end.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.denoiser import Condition
from diffusion_core.errors import ConfigError
from diffusion_core.nets.magnitude import (
    CosineAttention,
    FourierFeatures,
    MPConv,
    MPEmbedding,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    unit_magnitude,
)
from diffusion_core.nets.tokens import check_picture, classes_of, through
from diffusion_core.noise import Noise

BRANCH = 0.3  # the share of a block's residual branch, and of its attention, in their sums
EVEN = 0.5  # the share of the class beside the noise level, and of what was skipped beside the main path


class Edm2(nn.Module):
    """Pictures or latents (B, channels, size, size) in, (B, out_channels, size, size) out; zero at init.

    Level i has `width` · `multipliers[i]` channels, half the side of the level above and `depth` blocks (one more
    on the way up). Attention by heads of `head` channels stands after the blocks of the levels whose side is in
    `attention`, and once at the bottom. Without `classes` no label is read. `dropout` acts inside every block;
    `checkpointing` trades one more forward pass for the memory of the blocks' insides. The defaults, attention at 16
    and 8, 4 channels, size 64 and 1000 classes are the published EDM2-S. Raises ConfigError for numbers that do not
    fit each other.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        width: int = 192,
        multipliers: tuple[int, ...] = (1, 2, 3, 4),
        depth: int = 3,
        attention: tuple[int, ...] = (),
        head: int = 64,
        dropout: float = 0.0,
        out_channels: int | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        outs = channels if out_channels is None else out_channels
        if min(channels, outs) < 1 or classes < 0:
            raise ConfigError(
                f"channels {channels}, out_channels {outs}, classes {classes}: "
                "channels from 1 and classes from 0 are wanted"
            )
        widths = [width * multiplier for multiplier in multipliers]
        _check(size, widths, attention, head, depth, dropout)
        heads = [wide // head if size >> level in attention else 0 for level, wide in enumerate(widths)]
        steer = max(widths)
        self.channels, self.size, self.dropout, self.checkpointing = channels, size, dropout, checkpointing
        self.features = FourierFeatures(widths[0])
        self.level = MPLinear(widths[0], steer)
        self.label = MPEmbedding(classes, steer) if classes else None
        self.enter = MPConv(channels + 1, widths[0], 3)

        down, skipped = list[Block](), [widths[0]]
        for level, wide in enumerate(widths):
            if level:
                down.append(Block(skipped[-1], skipped[-1], steer, encodes=True, resample="down"))
                skipped.append(skipped[-1])
            for _ in range(depth):
                down.append(Block(skipped[-1], wide, steer, encodes=True, heads=heads[level]))
                skipped.append(wide)
        now = widths[-1]
        up = [Block(now, now, steer, heads=now // head), Block(now, now, steer)]
        for level, wide in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                up.append(Block(now, now, steer, resample="up"))
            for _ in range(depth + 1):
                up.append(Block(now, wide, steer, heads=heads[level], joined=skipped.pop()))
                now = wide
        self.encoder, self.decoder = nn.ModuleList(down), nn.ModuleList(up)
        self.leave = MPConv(now, outs, 3)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), c (B,), cond {"label": (B,)} or None for "no class" -> (B, out_channels, H, W)."""
        check_picture(x, self.channels, self.size)
        steer = self._steer(c, cond)  # (B, D)
        draws = Noise(_bits(x)) if self.training and self.dropout else None
        x = self.enter(torch.cat((x, torch.ones_like(x[:, :1])), 1))
        skipped = [x]
        for number, block in enumerate((*self.encoder, *self.decoder)):
            x = mp_cat(x, skipped.pop(), EVEN) if block.joined else x
            drop = Drop(draws, number, self.dropout) if draws else None
            x = through(block, self.checkpointing, x, steer, drop)
            if block.encodes:
                skipped.append(x)
        out: Tensor = self.leave(x) * self.gain.to(x.dtype)
        return out

    def _steer(self, c: Tensor, cond: Condition | None) -> Tensor:
        steer: Tensor = self.level(self.features(c))
        if self.label is not None:
            steer = mp_sum(steer, self.label(classes_of(cond, c)), EVEN)
        return mp_silu(steer)


class Drop:
    """Dropout without a generator's state: the mask is a function of the network's own input, by counting.

    So a run resumes, and its backward pass computes again, with the masks it would have had; one `stream` a block.
    """

    def __init__(self, draws: Noise, stream: int, share: float):
        self.draws, self.stream, self.share = draws, stream, share

    def __call__(self, y: Tensor) -> Tensor:
        kept = self.draws.uniform(y.shape[1:], self.stream) >= self.share
        return y * kept / (1 - self.share)


class Block(nn.Module):
    """A residual branch steered by a vector and, with heads, attention: (B, inputs + joined, H, W) -> outputs.

    An encoder's block gives its main path unit magnitude before it branches; a decoder's branches first.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        steer: int,
        *,
        encodes: bool = False,
        heads: int = 0,
        joined: int = 0,
        resample: Literal["keep", "down", "up"] = "keep",
    ):
        super().__init__()
        self.encodes, self.joined, self.resample = encodes, joined, resample
        inputs += joined
        self.skip = MPConv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.first = MPConv(outputs if encodes else inputs, outputs, 3)
        self.steer, self.gain = MPLinear(steer, outputs), nn.Parameter(torch.zeros(()))
        self.second = MPConv(outputs, outputs, 3)
        self.attention = CosineAttention(outputs, heads) if heads else None

    def forward(self, x: Tensor, steer: Tensor, drop: Drop | None = None) -> Tensor:
        """x (B, inputs + joined, H, W), steer (B, D) -> (B, outputs, H', W')."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2)
        main: Tensor = self.skip(x)
        if self.encodes:
            x = main = unit_magnitude(main, 1)
        branch = self.first(mp_silu(x))
        branch = mp_silu(branch * (1 + self.steer(steer) * self.gain.to(x.dtype))[:, :, None, None])
        main = mp_sum(main, self.second(drop(branch) if drop else branch), BRANCH)
        return main if self.attention is None else mp_sum(main, self.attention(main), BRANCH)


def _bits(x: Tensor) -> Tensor:
    """A number (B,) for each sample, the bits of its first pixel: noise, hence never the same."""
    return x.flatten(1)[:, 0].detach().float().view(torch.int32).long()


def _check(size: int, widths: list[int], attention: tuple[int, ...], head: int, depth: int, dropout: float) -> None:
    if not widths or min(*widths, depth, head) < 1 or not 0 <= dropout < 1:
        raise ConfigError(
            f"widths {widths}, depth {depth}, head {head}, dropout {dropout}: "
            "one level or more, widths, depth and head from 1 and a dropout in [0, 1) are wanted"
        )
    if size < 1 or size % (1 << (len(widths) - 1)):
        raise ConfigError(f"size {size}: {len(widths)} levels want a multiple of {1 << (len(widths) - 1)}")
    sides = [size >> level for level in range(len(widths))]
    if unknown := [side for side in attention if side not in sides]:
        raise ConfigError(f"attention at {unknown[0]}; a picture of {size} has the sides {', '.join(map(str, sides))}")
    for side, wide in zip(sides, widths, strict=True):
        if (side in attention or side == sides[-1]) and wide % head:
            raise ConfigError(f"head {head}: it must divide the width {wide} of every level with attention")
