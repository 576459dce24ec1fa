"""U-ViT: everything is a token, and shallow blocks hand their tokens to deep ones (Bao et al. 2023, arXiv 2209.12152).

Noise level, class, text and patches stand in one row of tokens; each deep block first reads Linear(Concat(h_deep,
h_shallow)), the long skip the authors found best of five (section 3.1, figure 2a).
"""

import torch
from torch import Tensor, nn

from diffusion_core.denoiser import Condition
from diffusion_core.errors import ConfigError
from diffusion_core.nets.blocks import attend, zeroed
from diffusion_core.nets.embed import LabelEmbedding, Sinusoids
from diffusion_core.nets.tokens import Words, check_picture, check_sizes, classes_of, patches, picture, through


class UViT(nn.Module):
    """Pictures or latents (B, channels, size, size) in, the same shape out; zero at init.

    Of `depth` blocks, an odd number, the first half hands its tokens to the last half, last to first. With `text` above
    0 the tokens of cond["text"] of that width join the row where cond["mask"] is True. `smooth` ends with the 3x3
    convolution that keeps patches from showing (section 3.1, figure 2c). `checkpointing` trades one more forward pass
    for the memory of the blocks' insides.
    Raises ConfigError for numbers that do not fit each other and for an x of another shape.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        patch: int = 2,
        width: int = 128,
        depth: int = 5,
        heads: int = 4,
        expand: int = 4,
        text: int = 0,
        smooth: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__()
        check_sizes(size, patch, width, heads)
        if depth < 1 or depth % 2 == 0:
            raise ConfigError(f"depth {depth}: an odd number of blocks is wanted, as many before the middle as after")
        self.channels, self.size, self.patch, self.checkpointing = channels, size, patch, checkpointing
        self.enter = nn.Linear(channels * patch**2, width)
        self.level = Sinusoids(width)
        self.label = LabelEmbedding(classes, width)
        self.words = Words(text) if text else None
        self.read = nn.Linear(text, width) if text else None
        self.places = nn.Parameter(0.02 * torch.randn(2 + (size // patch) ** 2, width))
        self.shallow = nn.ModuleList(Block(width, heads, expand) for _ in range(depth // 2))
        self.middle = Block(width, heads, expand)
        self.deep = nn.ModuleList(Block(width, heads, expand, joins=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, channels * patch**2)
        self.smooth = zeroed(nn.Conv2d(channels, channels, 3, padding=1)) if smooth else None
        if not smooth:
            zeroed(self.leave)

    def forward(self, x: Tensor, c: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), c (B,), cond {"label": (B,), "text": (B, L, D), "mask": (B, L)} or less -> (B, C, H, W)."""
        check_picture(x, self.channels, self.size)
        said = torch.stack((self.level(c), self.label(classes_of(cond, c))), 1)
        tokens = torch.cat((said, self.enter(patches(x, self.patch))), 1) + self.places  # (B, 2 + T, D)
        count, mask = tokens.shape[1], None
        if self.words is not None and self.read is not None:
            text, real = self.words(cond, len(x))
            tokens = torch.cat((tokens, self.read(text)), 1)
            mask = torch.cat((real.new_ones(len(x), count), real), 1)[:, None, None]
        handed = []
        for block in self.shallow:
            tokens = through(block, self.checkpointing, tokens, mask)
            handed.append(tokens)
        tokens = through(self.middle, self.checkpointing, tokens, mask)
        for block in self.deep:
            tokens = through(block, self.checkpointing, tokens, mask, handed.pop())
        out = picture(self.leave(self.norm(tokens[:, 2:count])), self.patch)
        return out if self.smooth is None else self.smooth(out)


class Block(nn.Module):
    """h + attention(LN(h)), then h + MLP(LN(h)); one that `joins` first reads them with those of a shallow block."""

    def __init__(self, width: int, heads: int, expand: int, joins: bool = False):
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if joins else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads
        self.mix, self.join = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, expand * width), nn.GELU(), nn.Linear(expand * width, width))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, handed: Tensor | None = None) -> Tensor:
        """tokens and those handed over (B, T, D), mask True where attention may look -> (B, T, D)."""
        if self.skip is not None and handed is not None:
            tokens = self.skip(torch.cat((tokens, handed), -1))
        q, k, v = self.mix(self.norm1(tokens)).chunk(3, -1)
        tokens = tokens + self.join(attend(q, k, v, self.heads, mask))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out
