"""Mean and covariance of features, gathered batch by batch and merged exactly over parts.

With n samples of mean m and scatter M = Σ (x - m)(x - m)ᵀ, two disjoint parts a and b have together,
with δ = m_b - m_a,

    n = n_a + n_b     m = m_a + δ·n_b/n     M = M_a + M_b + δδᵀ·n_a·n_b/n

(Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance"). Products are taken in float32 of
samples centred on their own block, sums in float64: the scatter is right to about 1e-7 of its largest entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_core.errors import DataError

BLOCK = 2000  # samples per product: enough for BLAS to run at its peak


@dataclass(eq=False)
class Moments:
    """Count, mean (d,) and scatter (d, d) of a set of feature vectors, in float64."""

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (d, d); raises DataError for fewer than two samples."""
        if self.count < 2:
            raise DataError(f"the covariance of {self.count} sample was asked for; at least 2 are needed")
        return self.scatter / (self.count - 1)

    def __iadd__(self, other: "Moments") -> Self:
        """Take in a disjoint part, in place."""
        count, shift = self.count + other.count, other.mean - self.mean
        self.scatter.add_(other.scatter).addr_(shift, shift, alpha=self.count * other.count / count)
        self.mean.add_(shift, alpha=other.count / count)
        self.count = count
        return self

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of two disjoint parts taken together."""
        joined = Moments(self.count, self.mean.clone(), self.scatter.clone())
        joined += other
        return joined

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Named tensors for a weights file; `read` takes them back."""
        return {
            f"{name}.count": torch.tensor(self.count),
            f"{name}.mean": self.mean,
            f"{name}.covariance": self.covariance,
        }

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], name: str) -> Self:
        """The moments that `tensors(name)` wrote."""
        count = int(tensors[f"{name}.count"])
        return cls(count, tensors[f"{name}.mean"], tensors[f"{name}.covariance"] * (count - 1))


class Running:
    """Moments in the making: feed batches of any size, read at any time.

    Samples are folded in blocks of `BLOCK`, so the result does not depend on how they were batched.
    """

    def __init__(self, width: int) -> None:
        self._whole = _block(np.empty((0, width), np.float32))
        self._waiting = np.empty((0, width), np.float32)

    def update(self, features: Tensor) -> None:
        """Add features (n, width); raises DataError for another shape and for a value that is not finite."""
        width = self._waiting.shape[1]
        if features.ndim != 2 or features.shape[1] != width:
            raise DataError(f"features have shape {list(features.shape)}; [n, {width}] is wanted")
        batch = features.detach().float().cpu().numpy()
        if not np.isfinite(batch).all():
            raise DataError("features hold a value that is not finite")
        rows = np.concatenate([self._waiting, batch])
        while len(rows) >= BLOCK:
            self._whole += _block(rows[:BLOCK])
            rows = rows[BLOCK:]
        self._waiting = rows

    def moments(self) -> Moments:
        """The moments of everything fed so far; raises DataError if that is nothing."""
        if self._whole.count + len(self._waiting) == 0:
            raise DataError("the moments of no samples were asked for")
        return self._whole + _block(self._waiting)


def moments_of(features: Tensor) -> Moments:
    """The moments of features (n, d) that are all at hand."""
    running = Running(features.shape[1])
    running.update(features)
    return running.moments()


def _block(rows: NDArray[np.float32]) -> Moments:
    mean = rows.sum(0, dtype=np.float64) / max(len(rows), 1)
    centred = rows - mean.astype(np.float32)
    scatter = centred.T @ centred  # numpy sees XᵀX and computes one half of it; torch computes both
    return Moments(len(rows), torch.from_numpy(mean), torch.from_numpy(scatter).double())
