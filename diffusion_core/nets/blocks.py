"""Building blocks of convolutional networks: residual blocks, attention over places and over text, changes of side.

A residual block is x + f(x), f twice "group norm, SiLU, 3x3 convolution"; between the two it is told the noise level,
by a vector added to every place (Ho et al. 2020, arXiv 2006.11239, appendix B) or by FiLM, h ↦ (1 + γ)h + β
(Perez et al. 2018, arXiv 1709.07871, eq. 1; in diffusion Dhariwal and Nichol 2021, arXiv 2105.05233, eq. 3).
Attention is softmax(qkᵀ/√d)v (Vaswani et al. 2017, arXiv 1706.03762, eq. 1). The last map of each residual branch is
zero at init, so that a block is born as the identity.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.errors import ConfigError

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)

TEXT_EPS = 1e-6  # of the group norm before attention to text, whatever the network's own (Rombach et al. 2022)

WRITTEN_OUT = 256  # up to so many tokens attention is written out where that is quicker


class Timesteps(nn.Module):
    """sin and cos of c at `width`/2 frequencies `period`^(-k/(width/2 - shift)), k = 0, 1, ..., from 1 radian down.

    For c a timestep in 0..999 (Vaswani et al. 2017, section 3.5; shift 1 in Ho et al. 2020). The frequencies are
    float32 all the way, like those behind published weights: at c = 999 exact ones would turn the angle by up to 6e-5.
    """

    frequencies: Tensor

    def __init__(self, width: int, period: float = 10_000.0, shift: float = 0.0):
        super().__init__()
        if width % 2 or not shift < width / 2 or period <= 1:
            raise ConfigError(
                f"width {width}, shift {shift}, period {period}: "
                "width must be even, shift below its half, period above 1"
            )
        exponents = -math.log(period) * torch.arange(width // 2, dtype=torch.float32) / (width // 2 - shift)
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, c: Tensor) -> Tensor:
        """(B,) -> (B, width), all sines before all cosines."""
        angles = c[:, None] * self.frequencies
        return torch.cat((angles.sin(), angles.cos()), 1)


class ResidualBlock(nn.Module):
    """(B, inner, H, W) -> (B, outer, H, W), steered by a vector of `told` numbers; the skip alone at init."""

    def __init__(
        self,
        inner: int,
        outer: int,
        told: int,
        groups: int,
        eps: float = 1e-5,
        film: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.film = film
        self.norm1 = nn.GroupNorm(groups, inner, eps)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.steer = nn.Linear(told, 2 * outer if film else outer)
        self.norm2 = nn.GroupNorm(groups, outer, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outer, outer, 3, padding=1))
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)
        if film:
            zeroed(self.steer)

    def forward(self, x: Tensor, steer: Tensor) -> Tensor:
        """x (B, inner, H, W), steer (B, told) -> (B, outer, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        said = self.steer(steer)[:, :, None, None]
        if self.film:
            gamma, beta = said.chunk(2, 1)
            h = self.norm2(h) * (1 + gamma) + beta
        else:
            h = self.norm2(h + said)
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(h)))
        return out


class SelfAttention(nn.Module):
    """Attention of tokens to each other: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width, bias=bias)
        self.join = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.mix(tokens).chunk(3, -1)
        out: Tensor = self.join(attend(q, k, v, self.heads))
        return out


class CrossAttention(nn.Module):
    """Attention of tokens (B, T, width) to text (B, L, text), where `mask` (B, L) is True."""

    def __init__(self, width: int, heads: int, text: int):
        super().__init__()
        self.heads = heads
        self.ask = nn.Linear(width, width, bias=False)
        self.answer = nn.Linear(text, 2 * width, bias=False)
        self.join = nn.Linear(width, width)

    def forward(self, tokens: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        k, v = self.answer(text).chunk(2, -1)
        out: Tensor = self.join(attend(self.ask(tokens), k, v, self.heads, mask[:, None, None]))
        return out


class PlaceAttention(nn.Module):
    """Self-attention over the places of (B, width, H, W), added to it; the identity at init."""

    def __init__(self, width: int, heads: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps)
        self.attend = SelfAttention(width, heads)
        zeroed(self.attend.join)

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W); no text is read."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        out: Tensor = x + self.attend(tokens).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class TextAttention(nn.Module):
    """A transformer over places: self-attention, attention to text and a gated MLP, added to x; the identity at init.

    The spatial transformer of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, appendix E.2.1), with GEGLU
    a·GELU(b) as the MLP's first half (Shazeer 2020, arXiv 2002.05202, eq. 6).
    """

    def __init__(self, width: int, heads: int, groups: int, text: int, expand: int = 4):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, TEXT_EPS)
        self.enter = nn.Linear(width, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = SelfAttention(width, heads, bias=False)
        self.read = CrossAttention(width, heads, text)
        self.gated = nn.Linear(width, 2 * expand * width)
        self.narrow = nn.Linear(expand * width, width)
        self.leave = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x (B, C, H, W), text (B, L, D), mask (B, L) True where a token is real -> (B, C, H, W)."""
        tokens = self.enter(self.norm(x).flatten(2).transpose(1, 2))  # (B, H W, C)
        tokens = tokens + self.attend(self.norm1(tokens))
        tokens = tokens + self.read(self.norm2(tokens), text, mask)
        value, gate = self.gated(self.norm3(tokens)).chunk(2, -1)
        tokens = tokens + self.narrow(value * F.gelu(gate))
        out: Tensor = x + self.leave(tokens).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class Downsample(nn.Module):
    """Halves the side, rounded up, by a 3x3 convolution of stride 2.

    `lopsided` pads only right and below and rounds down, as the first weights did (TensorFlow's "SAME").
    """

    def __init__(self, width: int, lopsided: bool = False):
        super().__init__()
        self.pad = (0, 1, 0, 1) if lopsided else (1, 1, 1, 1)
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        out: Tensor = self.conv(F.pad(x, self.pad))
        return out


class Upsample(nn.Module):
    """Repeats pixels up to a given side, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, side: torch.Size) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W), side = (H, W)."""
        out: Tensor = self.conv(F.interpolate(x, side))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(qkᵀ/√d)v for each of `heads`: q (B, T, D), k and v (B, L, D) -> (B, T, D).

    `mask`, of a shape that broadcasts to (B, heads, T, L), is True where attention may look.
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # each (B, H, T or L, D/H)
    if mask is None and _by_formula(q, k):
        seen = (q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    else:
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return seen.transpose(1, 2).flatten(2)


def _by_formula(q: Tensor, k: Tensor) -> bool:
    """Whether to write attention out: trained in bfloat16 on a processor, SDPA's way back takes up to five times as
    long, until the square of weights outgrows the caches."""
    trained: bool = q.requires_grad and q.dtype == torch.bfloat16
    return trained and q.device.type == "cpu" and k.shape[2] <= WRITTEN_OUT


def zeroed(layer: Layer) -> Layer:
    """The layer with weights and bias set to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
