"""LPIPS over VGG16: how far apart two pictures look to a network (Zhang et al. 2018, arXiv 1801.03924, eq. 1).

VGG16 (Simonyan and Zisserman 2015, arXiv 1409.1556, table 1, column D) without its classifier: five levels of 3x3
convolutions, each with a ReLU, the side halved between levels. The last features f_l of each level, of unit length at
every place, are compared:

    d(x, y) = Σ_l mean over places of Σ_c w_lc (f_l(x) - f_l(y))²

The state dict has the names of the published weights: `features.0.weight` ... `features.28.bias` as in torchvision's
vgg16, `lin0.model.1.weight` ... `lin4.model.1.weight`, (1, c, 1, 1) each, as in the authors' file for VGG.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffusion_core.errors import ConfigError

WIDTHS, DEPTHS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
SMALLEST = 16  # pixels: one place is left at the last level
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pictures in [0, 1] that VGG16 was trained on
TINY = 1e-20  # features that are all zero stay zero


class VggDistance(nn.Module):
    """Pictures (B, 1 or 3, H, W) in [-1, 1], twice -> distance (B,); grey is taken as equal colours.

    `widths` are the channels of the levels. Raises ConfigError for sides under 16 or other channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, widths: tuple[int, ...] = WIDTHS):
        super().__init__()
        layers: list[nn.Module] = []
        before, self.ends = 3, list[int]()
        for level, (width, depth) in enumerate(zip(widths, DEPTHS, strict=True)):
            if level:
                layers.append(nn.MaxPool2d(2))
            for inner in (before, *(width,) * (depth - 1)):
                layers += [nn.Conv2d(inner, width, 3, padding=1), nn.ReLU()]
            before = width
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        for level, width in enumerate(widths):
            # The authors' layer stood behind a dropout, hence the 1 in its published name.
            model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{level}", nn.ModuleDict({"model": model}))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if min(x.shape[-2:]) < SMALLEST or x.shape[1] not in (1, 3):
            raise ConfigError(
                f"pictures of {'x'.join(map(str, x.shape[1:]))}: LPIPS wants 1 or 3 channels and sides of "
                f"{SMALLEST} or more"
            )
        pairs = zip(self.levels(x), self.levels(y), strict=True)
        distances = [
            (self.get_parameter(f"lin{level}.model.1.weight") * (mine - other).square()).sum(1).mean((1, 2))
            for level, (mine, other) in enumerate(pairs)
        ]
        return torch.stack(distances).sum(0)

    def levels(self, x: Tensor) -> Iterator[Tensor]:
        """The last features (B, c, h, w) of each level, of unit length at every place."""
        x = ((x.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.std
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.ends:
                exact = x.float() if x.dtype != torch.float64 else x
                yield exact * (exact.square().sum(1, keepdim=True) + TINY).rsqrt()
