"""A small convolutional classifier whose last hidden layer holds the features in which pictures are compared.

It is trained in the pipeline, on the pictures it will judge. A distance in its features therefore carries its
hash, and is comparable only with distances in the features of the very same weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.errors import ConfigError

HALVINGS = 3
GROUPS = 4
SMOOTHING = 0.1  # keeps features of easy pictures from saturating, so that a distance still sees them
SHIFT = 2.0  # pixels a training picture is moved at most
WARM_UP = 0.1  # share of the training in which the learning rate rises


@dataclass(frozen=True)
class Shape:
    """What an extractor is built for: channels and side of the pictures, classes, width of the first layer."""

    channels: int
    size: int
    classes: int
    width: int = 16

    def __post_init__(self) -> None:
        if self.size % 2**HALVINGS:
            raise ConfigError(f"size {self.size}: a multiple of {2**HALVINGS} is wanted")
        if self.width % GROUPS:
            raise ConfigError(f"width {self.width}: a multiple of {GROUPS} is wanted")


class Extractor(nn.Module):
    """Pictures (B, C, H, W) in [-1, 1] -> features (B, 64) and class logits (B, classes)."""

    features_width = 64

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        widths = [shape.channels, *(shape.width * 2**i for i in range(HALVINGS))]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(GROUPS, after), nn.SiLU()]
        flat = widths[-1] * (shape.size // 2**HALVINGS) ** 2
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, self.features_width), nn.SiLU())
        self.head = nn.Linear(self.features_width, shape.classes)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, (B, 64)."""
        features: Tensor = self.trunk(x)
        return features

    def logits(self, x: Tensor) -> Tensor:
        """Unnormalized log-probabilities, (B, classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits


def train_extractor(
    shape: Shape,
    images: Tensor,
    labels: Tensor,
    *,
    samples: int,
    batch: int,
    lr: float,
    seed: int,
    on_batch: Callable[[int, float], None] = lambda seen, loss: None,
) -> Extractor:
    """Train on pictures (N, C, H, W) with labels (N,) until `samples` have been seen.

    The same seed gives the same weights. `on_batch` hears how many were seen and the loss.
    """
    draws = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        extractor = Extractor(shape)
    steps = max(1, samples // batch)
    optimizer = torch.optim.AdamW(extractor.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=WARM_UP)
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=draws)
        logits = extractor.logits(shifted(images[chosen], draws))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_batch((step + 1) * batch, loss.item())
    return extractor.eval().requires_grad_(False)


def shifted(images: Tensor, draws: torch.Generator) -> Tensor:
    """Each picture moved by up to `SHIFT` pixels, a fraction of a pixel included; its border is repeated."""
    moves = (2 * torch.rand(len(images), 2, generator=draws) - 1) * (2 * SHIFT / images.shape[-1])
    transform = torch.cat((torch.eye(2).expand(len(images), 2, 2), moves[:, :, None]), 2)
    where = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, padding_mode="border", align_corners=False)
