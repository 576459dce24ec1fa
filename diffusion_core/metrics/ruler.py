"""The ruler: extractor, judge and moments of real pictures in one folder, all that a generated picture is held against.

Distances are told in units U, the distance between two random halves of the real training pictures: 1 U is
what chance alone makes of that many real pictures.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_core.errors import DataError, IntegrityError
from diffusion_core.images import to_pixels, to_tensor
from diffusion_core.manifest import hash_file
from diffusion_core.metrics.extractor import Extractor, Shape
from diffusion_core.metrics.frechet import frechet
from diffusion_core.metrics.judge import Judge, load_classifier
from diffusion_core.metrics.moments import Moments, Running, moments_of
from diffusion_core.spec import build
from diffusion_core.weights import load_weights, read_tensors, write_tensors

NAME, EXTRACTOR, REFERENCE = "judge.json", "extractor.safetensors", "reference.safetensors"
RESIZE = "none: 8-bit pictures at the model's own size"


class Unit(NamedTuple):
    """Mean and standard deviation of the distance between two random halves of the real pictures."""

    mean: float
    std: float


@dataclass(frozen=True)
class Score:
    """Distances (U) to the training and to the held-out pictures, the share of right classes, how many were scored."""

    distance_u: float
    distance_val_u: float
    accuracy: float
    count: int


@dataclass(frozen=True, eq=False)
class Real:
    """What is kept of the real pictures: moments of the training and held-out ones, and the training labels (N,)."""

    train: Moments
    val: Moments
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Ruler:
    """A loaded ruler; `name` is that of the metric, the digests are SHA-256 (hex) of two of its files."""

    name: str
    unit: float
    extractor: Extractor
    judge: Judge
    real: Real
    extractor_digest: str
    reference_digest: str


class Scoring:
    """A score in the making, batch by batch."""

    def __init__(self, ruler: Ruler) -> None:
        self.ruler, self.right = ruler, 0
        self.running = Running(Extractor.features_width)

    @torch.inference_mode()
    def add(self, images: Tensor, labels: Tensor) -> None:
        """Take in pictures (B, C, H, W), in 8 bits as they will be served; raises DataError for a pixel not finite."""
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            raise DataError(f"{int((~finite).sum())} of {len(images)} pictures hold a pixel that is not finite")
        served = to_tensor(list(to_pixels(images)))
        self.running.update(self.ruler.extractor.features(served))
        self.right += int((self.ruler.judge.predict(served) == labels).sum())

    def score(self) -> Score:
        """The score of all pictures taken in so far."""
        found, real, unit = self.running.moments(), self.ruler.real, self.ruler.unit
        distances = (frechet(found, real.train) / unit, frechet(found, real.val) / unit)
        return Score(*distances, self.right / found.count, found.count)


def measure_unit(features: Tensor, splits: int, seed: int) -> Unit:
    """The unit U of real features (N, d), over seeded random splits into halves."""
    draws, half = torch.Generator().manual_seed(seed), len(features) // 2
    found = []
    for _ in range(splits):
        order = torch.randperm(len(features), generator=draws)
        found.append(frechet(moments_of(features[order[:half]]), moments_of(features[order[half : 2 * half]])))
    distances = torch.tensor(found, dtype=torch.float64)
    return Unit(distances.mean().item(), distances.std(correction=0).item())


def save_ruler(
    folder: Path, data: str, extractor: Extractor, judge: Judge, real: Real, unit: Unit, accuracy: Mapping[str, float]
) -> dict[str, Any]:
    """Write a ruler made on the dataset called `data` into a folder; returns what its judge.json says.

    `accuracy` tells how well extractor and judge classify held-out pictures.
    """
    write_tensors(folder / EXTRACTOR, extractor.state_dict())
    judge.save(folder)
    moments = real.train.tensors("train") | real.val.tensors("val")
    write_tensors(folder / REFERENCE, {**moments, "train.labels": real.labels})
    described = {
        "name": f"FD ({data}-cnn, {hash_file(folder / EXTRACTOR)[:8]})",
        "unit": unit.mean,
        "unit_std": unit.std,
        "extractor": asdict(extractor.shape),
        "accuracy": dict(accuracy),
    }
    (folder / NAME).write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    return described


def load_ruler(folder: Path) -> Ruler:
    """The ruler that `save_ruler` wrote; the folder's manifest is the caller's to verify."""
    try:
        described = json.loads((folder / NAME).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{folder / NAME} cannot be read ({error})") from error
    extractor = Extractor(build(Shape, described["extractor"], f"{NAME}: extractor"))
    load_weights(extractor, folder / EXTRACTOR)
    tensors = read_tensors(folder / REFERENCE)
    return Ruler(
        described["name"],
        described["unit"],
        extractor.eval().requires_grad_(False),
        load_classifier(folder),
        Real(Moments.read(tensors, "train"), Moments.read(tensors, "val"), tensors["train.labels"]),
        hash_file(folder / EXTRACTOR),
        hash_file(folder / REFERENCE),
    )
