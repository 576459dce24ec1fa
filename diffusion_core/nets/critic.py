"""The critic of patches (Isola et al. 2017, arXiv 1611.07004, appendix 6.1.2): one number for each patch of a picture.

4x4 convolutions with leaky ReLUs between: `layers` of them halve the side and double the width, up to eight times the
first, and two more keep it. With three layers each number sees 70x70 pixels. The paper normalizes over the batch; here
nothing mixes samples: group norm, or none. Weights begin normal with standard deviation 0.02, as in the paper.
"""

from typing import Literal

from torch import Tensor, nn

from diffusion_core.errors import ConfigError

SLOPE, START = 0.2, 0.02
WIDEST = 8  # times the first width


class PatchCritic(nn.Module):
    """Pictures (B, channels, H, W) -> (B, 1, h, w), high where a patch seems real.

    Raises ConfigError for sizes below 1, a width its norm's 8 groups do not divide, or pictures that are too small.
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 3, norm: Literal["group", "none"] = "group"):
        super().__init__()
        if min(width, layers) < 1 or (norm == "group" and width % 8):
            raise ConfigError(
                f"width {width}, layers {layers}: layers of 1 or more and a width that 8, the norm's groups, divides "
                "are wanted"
            )
        self.smallest = 3 * 2**layers
        widths = [width * min(2**level, WIDEST) for level in range(layers + 1)]
        body: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        for level, (inner, outer) in enumerate(zip(widths, widths[1:], strict=False), 1):
            body.append(nn.Conv2d(inner, outer, 4, 2 if level < layers else 1, 1))
            body += [nn.GroupNorm(8, outer)] if norm == "group" else []
            body.append(nn.LeakyReLU(SLOPE))
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=START)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.smallest:
            raise ConfigError(
                f"pictures of {x.shape[-2]}x{x.shape[-1]}: this critic of patches wants sides of {self.smallest} or "
                "more; fewer layers take smaller ones"
            )
        said: Tensor = self.body(x)
        return said
