"""Layers that keep the magnitude √E[x²] of what passes through them, so that no activation or weight drifts.

Weights are divided by their norm, sums and concatenations by what they would add, nonlinearities by what they
take away. A weight's gradient is then orthogonal to it, so a step would make it longer and the next one weaker;
in training it is therefore cut back to its length before use ("forced weight normalization").

Equation numbers are those of Karras et al. 2024, arXiv 2312.02696. No layer has a bias: a constant channel of the
input takes its place.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.denoiser import NULL
from diffusion_core.noise import Noise, Stream

SILU_GAIN = 0.596  # √E[silu(z)²] of a standard normal z
SMALLEST = 1e-4  # below this magnitude a vector is not made longer
ROUNDING = 4  # a norm within so many roundings of 1 is 1: cutting back twice then changes no bit
SEED = 0  # of the Fourier features, which are the same in every network


class NormalizedWeight(nn.Module):
    """A weight (outputs, inputs, ...) that acts with norm 1 for every output, stored with magnitude 1 (eq. 47, 66).

    In training mode, what the optimizer made of the stored weight is first brought back to magnitude 1, in place.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.scale = math.prod(shape[1:]) ** -0.5

    def unit(self) -> Tensor:
        """The weight that acts; a weight averaged or loaded need not be normalized before."""
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.weight / _norms(self.weight * self.scale))
        weight = self.weight * self.scale  # a copy: a second forward pass may write the parameter before the backward
        unit: Tensor = weight / _norms(weight)
        return unit


class MPLinear(NormalizedWeight):
    """(B, inputs) -> (B, outputs)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unit().to(x.dtype))


class MPEmbedding(NormalizedWeight):
    """label (B,) -> (B, outputs): `MPLinear` of a one-hot vector of magnitude 1; zero for "no class" (label -1)."""

    def __init__(self, classes: int, outputs: int):
        super().__init__(outputs, classes)

    def forward(self, label: Tensor) -> Tensor:
        none = label == NULL
        rows: Tensor = F.embedding(label.masked_fill(none, 0), self.unit().t()) / self.scale
        return rows.masked_fill(none[:, None], 0)


class MPConv(NormalizedWeight):
    """(B, inputs, H, W) -> (B, outputs, H, W) by an odd `kernel`."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(outputs, inputs, kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.unit().to(x.dtype), padding="same")


class FourierFeatures(nn.Module):
    """√2·cos(f·c + φ) with fixed normal f of standard deviation 2π and uniform φ (eq. 75); saved with the weights."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int):
        super().__init__()
        drawn = Noise(SEED)
        self.register_buffer("frequencies", 2 * math.pi * drawn.normal((width,), Stream.NOISE)[0])
        self.register_buffer("phases", 2 * math.pi * drawn.uniform((width,), Stream.TIME)[0].float())

    def forward(self, c: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        return 2**0.5 * (c[:, None] * self.frequencies + self.phases).cos()


class CosineAttention(nn.Module):
    """Every place (B, C, H, W) looks at all others; queries, keys and values have magnitude 1 (figure 21)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.mix = MPConv(channels, 3 * channels, 1)
        self.join = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mix(x).flatten(2).unflatten(1, (3, self.heads, -1))  # (B, 3, heads, C/heads, H W)
        q, k, v = unit_magnitude(parts.transpose(3, 4), 4).unbind(1)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        joined: Tensor = self.join(seen.reshape(x.shape))
        return joined


def unit_magnitude(x: Tensor, dim: int) -> Tensor:
    """x divided by its root mean square along `dim`; along the channels, pixel norm (Karras et al. 2018, 4.2)."""
    square = x.float().square() if x.dtype.itemsize < 4 else x.square()
    return x / square.mean(dim, keepdim=True).clamp_min(SMALLEST**2).sqrt().to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x)/0.596 (eq. 81)."""
    return F.silu(x) / SILU_GAIN


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1-t)·a + t·b)/√((1-t)² + t²): of magnitude 1 for independent a and b of magnitude 1 (eq. 88)."""
    return a.lerp(b.to(a.dtype), t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels side by side, weighted so that b has the share t of the influence whatever the widths (eq. 103)."""
    width, others = a.shape[1], b.shape[1]
    whole = math.sqrt(width + others) / math.hypot(1 - t, t)
    return torch.cat((a * (whole * (1 - t) / math.sqrt(width)), b * (whole * t / math.sqrt(others))), 1)


def _norms(weight: Tensor) -> Tensor:
    """The norm of each output's weights, exactly 1 where only rounding keeps it from 1; differentiable there too."""
    norms = weight.flatten(1).square().sum(1).clamp_min(SMALLEST**2).sqrt()
    gap = 1 - norms.detach()
    near = gap.abs() <= ROUNDING * torch.finfo(weight.dtype).eps
    return (norms + torch.where(near, gap, 0)).reshape(-1, *(1,) * (weight.ndim - 1))
