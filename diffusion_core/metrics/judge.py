"""An independent judge of class: kernel ridge regression on pixels, of another kind than every network here.

Pictures are points x in pixel space, labels one-hot rows Y. With K = exp(-g |x - x'|²) over the real pictures,

    W = (K + λI)⁻¹ Y          class of x = argmax k(x)ᵀ W

The width g and the ridge λ minimize the leave-one-out error, which is closed form in the eigenvectors of K:
the error of picture i left out is W_i / [(K + λI)⁻¹]_ii (Rifkin & Lippert 2007, "Notes on regularized least squares").
Only real pictures are ever shown to it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.errors import DataError
from diffusion_core.weights import read_tensors, write_tensors

FILE = "classifier.safetensors"
SIDE = 16  # pixels to which larger pictures are averaged: class is visible there
ANCHORS = 4096  # real pictures kept at most, as the fit is cubic in their number
WIDTHS = (1.0, 2.0, 4.0)  # g in units of one over the median squared distance
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class Judge:
    """The fitted classifier, in float64: anchors (n, D), weights (n, classes), the kernel's width g and the ridge λ."""

    anchors: Tensor
    weights: Tensor
    width: Tensor
    ridge: Tensor

    def predict(self, images: Tensor) -> Tensor:
        """The class (B,) of pictures (B, C, H, W) in [-1, 1]; raises DataError for pictures of another size."""
        points = _points(images)
        if points.shape[1] != self.anchors.shape[1]:
            raise DataError(f"pictures of shape {list(images.shape[1:])} are not those the judge was fitted to")
        return (_kernel(_squared(points, self.anchors), self.width) @ self.weights).argmax(1)

    def save(self, folder: Path) -> None:
        """Write the judge into a folder."""
        write_tensors(folder / FILE, vars(self))


def load_classifier(folder: Path) -> Judge:
    """The judge that `save` wrote; raises IntegrityError for a torn file."""
    return Judge(**read_tensors(folder / FILE))


def fit(images: Tensor, labels: Tensor) -> Judge:
    """Fit to real pictures (N, C, H, W) in [-1, 1] with labels (N,); of more than `ANCHORS`, evenly many are kept."""
    kept = torch.linspace(0, len(images) - 1, min(len(images), ANCHORS)).round().long()
    anchors, wanted = _points(images[kept]), F.one_hot(labels[kept]).double()
    distances = _squared(anchors, anchors)
    least, best = float("inf"), None
    for width in torch.tensor(WIDTHS, dtype=torch.float64) / distances.median():
        values, vectors = torch.linalg.eigh(_kernel(distances, width))
        turned, squares = vectors.T @ wanted, vectors.square()
        for ridge in torch.tensor(RIDGES, dtype=torch.float64):
            inverse = 1 / (values.clamp_min(0) + ridge)
            weights = vectors @ (inverse[:, None] * turned)
            error = (weights / (squares @ inverse)[:, None]).square().mean().item()
            if error < least:
                least, best = error, Judge(anchors, weights, width, ridge)
    assert best is not None
    return best


def _points(images: Tensor) -> Tensor:
    side = min(SIDE, images.shape[-1])
    return F.adaptive_avg_pool2d(images.double(), side).flatten(1)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b).square()


def _kernel(squared: Tensor, width: Tensor) -> Tensor:
    return (-width * squared).exp()
