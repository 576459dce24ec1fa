"""Conditions as more channels: what a network is told of a place stands beside that place.

("low", "low_level")      super-resolution: a smaller picture and how noisy it is (Ho et al. 2022, arXiv 2106.15282)
("known", "known_mask")   inpainting: what is known and where (Rombach et al. 2022, arXiv 2112.10752, section 4.5)
("image",)                editing: the picture to edit (Brooks et al. 2023, arXiv 2211.09800, section 3.2)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.denoiser import Condition
from diffusion_core.errors import ConfigError


class Concatenated(nn.Module):
    """A network that sees, besides the noisy picture (B, C, H, W), the conditions of these names as further channels.

    A picture whose sides divide x's is repeated to its size, a number (B,) becomes a plane; `net` takes as many
    channels as they have together with x, and is given the rest of the condition. Raises ConfigError for no names
    and, when asked, for a condition that lacks one or a picture of another size.
    """

    def __init__(self, net: nn.Module, names: Sequence[str]):
        super().__init__()
        if not names:
            raise ConfigError("no names of conditions to see: name one, or leave this out")
        self.net, self.names = net, tuple(names)

    def forward(self, x: Tensor, c: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, H, W), c (B,) -> what `net` says."""
        cond = cond or {}
        if missing := [name for name in self.names if name not in cond]:
            raise ConfigError(
                f"condition {sorted(cond)} lacks {', '.join(missing)}, which this network sees as channels"
            )
        rest = {name: value for name, value in cond.items() if name not in self.names}
        said: Tensor = self.net(torch.cat((x, *(_like(x, name, cond[name]) for name in self.names)), 1), c, rest)
        return said


def _like(x: Tensor, name: str, value: Tensor) -> Tensor:
    """A condition as channels of x's size."""
    height, width = x.shape[2:]
    if value.ndim == 1:
        return value.to(x.dtype).reshape(-1, 1, 1, 1).expand(-1, 1, height, width)
    if value.ndim != 4 or height % value.shape[2] or width % value.shape[3]:
        raise ConfigError(f"condition '{name}' {tuple(value.shape)} does not fit x of {height}x{width}")
    return F.interpolate(value.to(x.dtype), (height, width))
