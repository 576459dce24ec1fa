"""A lean U-Net for small pictures (8 to 32 pixels): few operators, each large enough to keep a processor busy.

Two blocks a level where the U-Net of `nets/unet.py` has five, few channels where there are many pixels, a block of one
group norm and one SiLU, one linear map that steers all blocks by FiLM (Perez et al. 2018, arXiv 1709.07871, eq. 1),
attention once, on the smallest grid, and features handed across by addition:

    x ↦ x + conv(SiLU((1 + γ)·conv(norm(x)) + β))

A training step costs a processor less than half of one with a U-Net of the same number of weights and twice the blocks.
Tensors lie channels last, as its convolutions want them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.denoiser import Condition
from diffusion_core.errors import ConfigError
from diffusion_core.nets.blocks import PlaceAttention, zeroed
from diffusion_core.nets.embed import LabelEmbedding, Sinusoids
from diffusion_core.nets.tokens import classes_of

TOLD = 128  # numbers that tell noise level and class


class Lean(nn.Module):
    """Pictures or latents (B, channels, H, W) in, (B, out_channels, H, W) out; zero at init.

    `widths` are the channels of the levels, each after the first on half the side; H and W, like `size`, are multiples
    of 2^(levels - 1). On the last level stand two blocks with attention of `heads` between them. `classes` above 0
    reads cond["label"], of which -1, or none, is "no class". Raises ConfigError for numbers that do not fit each other.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int = 0,
        widths: tuple[int, ...] = (48, 64, 128),
        heads: int = 4,
        groups: int = 8,
        out_channels: int | None = None,
    ):
        super().__init__()
        outs = channels if out_channels is None else out_channels
        if min(channels, outs) < 1 or classes < 0:
            raise ConfigError(
                f"channels {channels}, out_channels {outs}, classes {classes}: "
                "channels from 1 and classes from 0 are wanted"
            )
        _check_levels(size, widths, heads, groups)
        self.channels, self.multiple = channels, 2 ** (len(widths) - 1)
        first, last, above = widths[0], widths[-1], widths[:-1]
        self.level = nn.Sequential(Sinusoids(TOLD), nn.Linear(TOLD, TOLD))
        self.label = LabelEmbedding(classes, TOLD) if classes else None
        self.turns = [2 * width for width in (*above, last, last, *reversed(above))]
        self.steer = zeroed(nn.Linear(TOLD, sum(self.turns)))
        self.enter = nn.Conv2d(channels, first, 3, padding=1)
        self.down = nn.ModuleList(Block(width, groups) for width in above)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(widths, widths[1:], strict=False))
        self.middle = nn.ModuleList((Block(last, groups), Block(last, groups)))
        self.attend = PlaceAttention(last, heads, groups)
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(list(zip(widths, widths[1:], strict=False)))
        )
        self.up = nn.ModuleList(Block(width, groups) for width in reversed(above))
        self.norm = nn.GroupNorm(groups, first)
        self.leave = zeroed(nn.Conv2d(first, outs, 3, padding=1))

    def forward(self, x: Tensor, c: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), c (B,), cond {"label": (B,)} or none -> (B, out_channels, H, W)."""
        if x.shape[1] != self.channels:
            raise ConfigError(f"x has {x.shape[1]} channels; this network takes {self.channels}")
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ConfigError(f"x is {x.shape[2]}x{x.shape[3]}; this network takes multiples of {self.multiple}")
        told = self.level(c)
        if self.label is not None:
            told = told + self.label(classes_of(cond, c))
        said = iter(self.steer(F.silu(told))[..., None, None].split(self.turns, 1))
        x = self.enter(x.contiguous(memory_format=torch.channels_last))
        handed = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            x = block(x, next(said))
            handed.append(x)
            x = shrink(x)
        enter, leave = self.middle
        x = leave(self.attend(enter(x, next(said))), next(said))
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(grow(x) + handed.pop(), next(said))
        out: Tensor = self.leave(F.silu(self.norm(x)))
        return out


class Block(nn.Module):
    """Norm, 3x3 convolution, FiLM, SiLU, 3x3 convolution, added to x; the identity at init."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = zeroed(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        """x (B, C, H, W), said (B, 2C, 1, 1), γ before β -> (B, C, H, W)."""
        gamma, beta = said.chunk(2, 1)
        out: Tensor = x + self.conv2(F.silu(torch.addcmul(beta, self.conv1(self.norm(x)), 1 + gamma)))
        return out


def _check_levels(size: int, widths: Sequence[int], heads: int, groups: int) -> None:
    if not widths or min(widths) < 1 or groups < 1 or any(width % groups for width in widths):
        raise ConfigError(f"widths {widths}, groups {groups}: groups must divide every width")
    if size < 1 or size % 2 ** (len(widths) - 1):
        raise ConfigError(f"size {size}: a multiple of {2 ** (len(widths) - 1)} is wanted for {len(widths)} levels")
    if heads < 1 or widths[-1] % heads:
        raise ConfigError(f"heads {heads}: it must divide the last width {widths[-1]}")
