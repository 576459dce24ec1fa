"""The diffusion transformer with adaLN-Zero (Peebles and Xie 2023, arXiv 2212.09748, section 3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.denoiser import Condition
from diffusion_core.nets.blocks import CrossAttention, Timesteps, attend, zeroed
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

STEP_WAVES = 256  # sinusoids of a timestep in published networks of every width


class DiT(nn.Module):
    """Pictures or latents (B, channels, size, size) in, (B, out_channels, size, size) out; zero at init.

    `patch` x `patch` squares become tokens of `width`; each of `depth` blocks is steered by noise level and class.
    With `text` above 0 each block also attends to cond["text"] of that width, where cond["mask"] is True; no text and
    no real token are the same. `checkpointing` trades one more forward pass for the memory of the blocks' insides.

    Published weights need other choices: with a `period`, c is a timestep in 0..999 (see `Timesteps`, `shift`);
    `columns_first` tells a token's column before its row; the norm before an MLP may have an eps of its own, `mlp_eps`.
    Raises ConfigError for numbers that do not fit each other and for an x of another shape.
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
        text: int = 0,
        out_channels: int | None = None,
        checkpointing: bool = False,
        period: float | None = None,
        shift: float = 0.0,
        columns_first: bool = False,
        eps: float = 1e-5,
        mlp_eps: float | None = None,
    ):
        super().__init__()
        check_sizes(size, patch, width, heads)
        self.channels, self.size, self.patch, self.eps, self.checkpointing = channels, size, patch, eps, checkpointing
        self.enter = nn.Linear(channels * patch**2, width)
        places = grid_positions(size // patch, width)
        self.register_buffer("places", places.roll(width // 2, 1) if columns_first else places, persistent=False)
        waves = Sinusoids(width) if period is None else Timesteps(STEP_WAVES, period, shift)
        told = width if period is None else STEP_WAVES
        self.level = nn.Sequential(waves, nn.Linear(told, width), nn.SiLU(), nn.Linear(width, width))
        self.label = LabelEmbedding(classes, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, expand, text, eps, eps if mlp_eps is None else mlp_eps) for _ in range(depth)
        )
        self.steer = zeroed(nn.Linear(width, 2 * width))
        self.leave = zeroed(nn.Linear(width, (out_channels or channels) * patch**2))
        self.words = Words(text) if text else None

    def forward(self, x: Tensor, c: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), c (B,), cond {"label": (B,), "text": (B, L, D), "mask": (B, L)} or less -> (B, out, H, W)."""
        check_picture(x, self.channels, self.size)
        steer = F.silu(self.level(c) + self.label(classes_of(cond, c)))  # (B, D)
        words = None if self.words is None else self.words(cond, len(x))
        tokens = self.enter(patches(x, self.patch)) + self.places  # (B, T, D)
        for block in self.blocks:
            tokens = through(block, self.checkpointing, tokens, steer, words)
        shift, scale = self.steer(steer)[:, None].chunk(2, -1)
        return picture(self.leave(modulated(tokens, shift, scale, self.eps)), self.patch)


class Block(nn.Module):
    """Attention, attention to text if any, and MLP, each modulated before and gated after; the identity at init."""

    def __init__(self, width: int, heads: int, expand: int, text: int = 0, eps: float = 1e-5, mlp_eps: float = 1e-5):
        super().__init__()
        self.heads, self.eps, self.mlp_eps = heads, eps, mlp_eps
        self.mix = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, expand * width), nn.GELU("tanh"), nn.Linear(expand * width, width))
        self.turns = 9 if text else 6
        self.steer = zeroed(nn.Linear(width, self.turns * width))
        self.read = CrossAttention(width, heads, text) if text else None

    def forward(self, tokens: Tensor, steer: Tensor, words: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """tokens (B, T, D), steer (B, D), words as (B, L, text) and their mask (B, L) -> (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2, *more = self.steer(steer)[:, None].chunk(self.turns, -1)
        q, k, v = self.mix(modulated(tokens, shift1, scale1, self.eps)).chunk(3, -1)
        tokens = tokens + gate1 * self.join(attend(q, k, v, self.heads))
        if self.read is not None and words is not None:
            shift, scale, gate = more
            tokens = tokens + gate * self.read(modulated(tokens, shift, scale, self.eps), *words)
        out: Tensor = tokens + gate2 * self.mlp(modulated(tokens, shift2, scale2, self.mlp_eps))
        return out
