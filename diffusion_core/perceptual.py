"""Perceptual distances between pictures, as terms of a loss and as figures, chosen by kind.

lpips     differences of a trained network's features; the weights are one file of a local folder (nets/vgg.py)
ms_ssim   1 - MS-SSIM, which has no weights (similarity.py)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.manifest import hash_file
from diffusion_core.nets import vgg
from diffusion_core.similarity import POWERS, WINDOW, ms_ssim, smallest_side
from diffusion_core.spec import Kind
from diffusion_core.weights import load_weights

WEIGHTS = "lpips.safetensors"


class Perceptual(Kind, ABC):
    """A perceptual distance and the `weight` of its term in a loss."""

    weight: float

    @abstractmethod
    def build(self) -> nn.Module:
        """The distance: pictures (B, C, H, W) in [-1, 1], twice -> (B,); frozen, 0 for equal pictures."""

    @property
    @abstractmethod
    def smallest(self) -> int:
        """The shortest side of a picture that can be compared, in pixels."""


@dataclass(frozen=True)
class Lpips(Perceptual):
    """LPIPS over VGG16 (Zhang et al. 2018), its weights in `path`/lpips.safetensors, of SHA-256 `sha256` (hex)."""

    path: str
    sha256: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def build(self) -> nn.Module:
        """Raises ConfigError if there is no such file, IntegrityError if it is another or does not fit the network."""
        file = Path(self.path) / WEIGHTS
        if not file.is_file():
            found = sorted(one.name for one in file.parent.iterdir()) if file.parent.is_dir() else []
            raise ConfigError(f"{self.path} lacks {WEIGHTS}; it holds {', '.join(found) or 'nothing'}")
        if (digest := hash_file(file)) != self.sha256.lower():
            raise IntegrityError(f"{file} has SHA-256 {digest}; {self.sha256} is wanted")
        net = vgg.VggDistance()
        load_weights(net, file)
        return net.eval().requires_grad_(False)

    @property
    def smallest(self) -> int:
        return vgg.SMALLEST


@dataclass(frozen=True)
class MsSsim(Perceptual):
    """1 - MS-SSIM over `scales` scales with a Gaussian window of `window` pixels (Wang et al. 2003)."""

    weight: float = 1.0
    scales: int = len(POWERS)
    window: int = WINDOW

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if not 1 <= self.scales <= len(POWERS) or self.window < 1 or self.window % 2 == 0:
            raise ConfigError(
                f"scales {self.scales}, window {self.window}: 1 to {len(POWERS)} scales and an odd window are wanted"
            )

    def build(self) -> nn.Module:
        return Dissimilarity(self.scales, self.window)

    @property
    def smallest(self) -> int:
        return smallest_side(self.scales, self.window)


class Dissimilarity(nn.Module):
    """1 - MS-SSIM, (B,), of pictures (B, C, H, W) in [-1, 1]; raises ConfigError for pictures too small."""

    def __init__(self, scales: int, window: int):
        super().__init__()
        self.scales, self.window = scales, window

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - ms_ssim(x, y, self.scales, self.window)


def _check_weight(weight: float) -> None:
    if weight < 0:
        raise ConfigError(f"weight {weight}: 0 or more is wanted")
