"""The networks of the latent-diffusion autoencoder (Rombach et al. 2022, arXiv 2112.10752, appendix G).

Each is one chain of blocks between a first and a last convolution. With widths w₁ … wₙ and depth d:

    encoder   d residuals of wᵢ at level i = 1 … n, the side halved between levels; then the middle
    decoder   the middle; then d + 1 residuals of wᵢ at level i = n … 1, the side doubled between levels
    middle    residual, attention over all places, residual, all of wₙ

They are those of VQGAN (Esser et al. 2021, arXiv 2012.09841, table 7) without attention outside the middle.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_core.nets.blocks import Downsample, PlaceAttention

EPS = 1e-6  # of every group norm, as in the weights published with the paper


class Residual(nn.Module):
    """Two normalized convolutions added to their input: (B, width, H, W) -> (B, out, H, W), `out` like `width` if None.

    Where the two differ the input passes through a 1x1 convolution.
    """

    def __init__(self, width: int, out: int | None = None, groups: int = 8, eps: float = 1e-5):
        super().__init__()
        out = width if out is None else out
        self.body = nn.Sequential(
            nn.GroupNorm(groups, width, eps),
            nn.SiLU(),
            nn.Conv2d(width, out, 3, padding=1),
            nn.GroupNorm(groups, out, eps),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1),
        )
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.skip(x) + self.body(x)
        return changed


class Double(nn.Module):
    """(B, width, H, W) -> (B, width, 2H, 2W): each pixel repeated, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


class Chain(nn.Module):
    """`enter`, the blocks one after another, `leave`.

    With `checkpointing` the activations inside a block are computed again in the backward pass instead of kept.
    """

    def __init__(self, enter: nn.Module, blocks: Iterable[nn.Module], leave: nn.Module, checkpointing: bool):
        super().__init__()
        self.enter, self.blocks, self.leave = enter, nn.ModuleList(blocks), leave
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        left: Tensor = self.leave(x)
        return left


class Encoder(Chain):
    """Pictures (B, channels, H, W) -> mean and log-variance (B, 2 latent, h, w); with `quant`, a last 1x1 layer."""

    def __init__(
        self,
        channels: int,
        latent: int,
        widths: tuple[int, ...],
        depth: int,
        groups: int,
        attention: bool,
        quant: bool,
        checkpointing: bool,
    ):
        last = widths[-1]
        super().__init__(
            nn.Conv2d(channels, widths[0], 3, padding=1),
            (*_levels(widths, depth, groups, partial(Downsample, lopsided=True)), *_middle(last, groups, attention)),
            nn.Sequential(
                nn.GroupNorm(groups, last, EPS),
                nn.SiLU(),
                nn.Conv2d(last, 2 * latent, 3, padding=1),
                nn.Conv2d(2 * latent, 2 * latent, 1) if quant else nn.Identity(),
            ),
            checkpointing,
        )


class Decoder(Chain):
    """Raw latents (B, latent, h, w) -> pictures (B, channels, H, W); with `quant`, a first 1x1 layer."""

    def __init__(
        self,
        channels: int,
        latent: int,
        widths: tuple[int, ...],
        depth: int,
        groups: int,
        attention: bool,
        quant: bool,
        checkpointing: bool,
    ):
        last = widths[-1]
        super().__init__(
            nn.Sequential(
                nn.Conv2d(latent, latent, 1) if quant else nn.Identity(), nn.Conv2d(latent, last, 3, padding=1)
            ),
            (*_middle(last, groups, attention), *_levels(widths[::-1], depth + 1, groups, Double)),
            nn.Sequential(
                nn.GroupNorm(groups, widths[0], EPS), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1)
            ),
            checkpointing,
        )


def _middle(width: int, groups: int, attention: bool) -> Iterator[nn.Module]:
    yield Residual(width, width, groups, EPS)
    if attention:
        yield PlaceAttention(width, 1, groups, EPS)
    yield Residual(width, width, groups, EPS)


def _levels(
    widths: tuple[int, ...], count: int, groups: int, resize: Callable[[int], nn.Module]
) -> Iterator[nn.Module]:
    before = widths[0]
    for index, width in enumerate(widths):
        if index:
            yield resize(before)
        for inner in (before, *(width,) * (count - 1)):
            yield Residual(inner, width, groups, EPS)
        before = width
