"""The diffusion transformer with adaLN-Zero (Peebles and Xie 2023, arXiv 2212.09748, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.denoiser import Condition
from diffusion_core.errors import ConfigError
from diffusion_core.nets.embed import LabelEmbedding, Sinusoids, grid_positions


class DiT(nn.Module):
    """Pictures or latents (B, channels, size, size) in, the same shape out; zero at init.

    `patch` x `patch` squares become tokens of `width`; each of `depth` blocks is steered by noise level and class.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        patch: int = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        expand: int = 4,
    ):
        super().__init__()
        if size % patch or width % heads or width % 4:
            raise ConfigError(
                f"size {size}, patch {patch}, width {width}, heads {heads}: "
                "patch must divide size, heads and 4 must divide width"
            )
        self.patch = patch
        self.enter = nn.Linear(channels * patch**2, width)
        self.register_buffer("places", grid_positions(size // patch, width), persistent=False)
        self.level = nn.Sequential(Sinusoids(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = LabelEmbedding(classes, width)
        self.blocks = nn.ModuleList(Block(width, heads, expand) for _ in range(depth))
        self.steer = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels * patch**2)
        for zeroed in (self.steer, self.leave):
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)

    def forward(self, x: Tensor, c: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), c (B,), cond {"label": (B,)} or None for "no class" -> (B, C, H, W)."""
        label = torch.full(c.shape, -1, device=c.device) if cond is None else cond["label"]
        steer = F.silu(self.level(c) + self.label(label))  # (B, D)
        tokens = self.enter(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.places  # (B, T, D)
        for block in self.blocks:
            tokens = block(tokens, steer)
        shift, scale = self.steer(steer)[:, None].chunk(2, -1)
        out = self.leave(_modulated(tokens, shift, scale))  # (B, T, C p p)
        side = x.shape[-1] // self.patch
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (side, side)), self.patch)


class Block(nn.Module):
    """Attention and MLP, each modulated before and gated after by the condition; the identity at init."""

    def __init__(self, width: int, heads: int, expand: int):
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, expand * width), nn.GELU("tanh"), nn.Linear(expand * width, width))
        self.steer = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.steer.weight)
        nn.init.zeros_(self.steer.bias)

    def forward(self, tokens: Tensor, steer: Tensor) -> Tensor:
        """tokens (B, T, D), steer (B, D) -> (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.steer(steer)[:, None].chunk(6, -1)
        tokens = tokens + gate1 * self._attend(_modulated(tokens, shift1, scale1))
        out: Tensor = tokens + gate2 * self.mlp(_modulated(tokens, shift2, scale2))
        return out

    def _attend(self, tokens: Tensor) -> Tensor:
        q, k, v = self.mix(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        joined: Tensor = self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return joined


def _modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift
