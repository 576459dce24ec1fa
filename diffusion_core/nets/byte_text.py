"""A small text encoder of our own: UTF-8 bytes through a transformer, for any script and without a vocabulary file.

Left as it is born it still tells texts apart, since random features keep apart what differs (Rahimi and Recht 2007),
and a network learns to read them; as a module it can be trained like any other.
"""

import torch
from torch import Tensor, nn

from diffusion_core.errors import ConfigError
from diffusion_core.nets.blocks import Timesteps
from diffusion_core.nets.clip_text import Block, check_widths
from diffusion_core.nets.text_encoder import TextEncoder

BYTES, START = 256, 256


class ByteEncoder(TextEncoder):
    """A token that marks the start, then one for each byte, all seeing each other; what is beyond `length` is cut off.

    The weights are those of `seed`, whatever was drawn before. Raises ConfigError for numbers that do not fit.
    """

    places: Tensor

    def __init__(
        self, width: int = 128, length: int = 128, depth: int = 2, heads: int = 4, expand: int = 4, seed: int = 0
    ):
        super().__init__()
        check_widths(width, heads, depth, length)
        if width % 2 or expand < 1 or seed < 0:
            raise ConfigError(f"width {width}, expand {expand}, seed {seed}: even, from 1 and from 0 are wanted")
        self.vocabulary, self.width, self.length = BYTES + 1, width, length
        self.tokens = nn.Embedding(self.vocabulary, width)
        self.register_buffer("places", Timesteps(width)(torch.arange(length)), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, expand * width, "gelu") for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self._draw(torch.Generator().manual_seed(seed))

    def ids(self, text: str) -> list[int]:
        """The start, then the bytes of the text's UTF-8."""
        return [START, *text.encode()[: self.length - 1]]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token numbers (B, L) and which are real (B, L) -> (B, L, D)."""
        tokens = self.tokens(ids) + self.places
        for block in self.blocks:
            tokens = block(tokens, mask[:, None, None])
        out: Tensor = self.norm(tokens)
        return out

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        """Each linear map keeps the variance of what it is given; vectors of bytes have variance one, biases are 0."""
        for name, weight in self.named_parameters():
            if name == "tokens.weight":
                weight.normal_(generator=generator)
            elif weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.zero_()
