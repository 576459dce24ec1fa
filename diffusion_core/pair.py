"""The one idea: every tensor in diffusion is a linear reading of one hidden pair.

There is a clean sample x₀ and a noise ε. Everything else is a *reading* a·x₀ + b·ε, named by its row (a, b):

    the noisy sample at t   (αₜ, σₜ)          what the network says   x₀ (1, 0)   ε (0, 1)   v (-σₜ, αₜ)   ...
    the sample at s         (αₛ, σₛ)          flow's constant speed   (-1, 1)

Two readings give the pair (Cramer's rule); any third reading follows. So prediction types, preconditioning,
solver steps and distillation targets are all `unmix` followed by `mix`, and nothing in this library converts
one parameterization into another by a formula of its own.
"""

from typing import NamedTuple

from torch import Tensor


class Row(NamedTuple):
    """The coefficients of one reading: float64 tensors of shape () or (B,), one row a sample."""

    a: Tensor
    b: Tensor


class Numbers(NamedTuple):
    """The coefficients of one reading shared by all samples, as plain numbers: what grids and tables are made of."""

    a: float
    b: float


class Pair(NamedTuple):
    """What is read: the clean sample and the noise, both (B, ...).

    `spread` in [0, 1], where a network learns it, says where the log-variance of a step back lies between its bounds.
    """

    x0: Tensor
    eps: Tensor
    spread: Tensor | None = None


def mix(pair: Pair, at: Row | Numbers) -> Tensor:
    """Read the pair at row `at`: a·x₀ + b·ε, in the dtype of the pair."""
    return _as(at.a, pair.x0) * pair.x0 + _as(at.b, pair.x0) * pair.eps


def unmix(x: Tensor, at: Row | Numbers, y: Tensor, of: Row | Numbers) -> Pair:
    """The pair that reads `x` at row `at` and `y` at row `of`; the rows must be independent."""
    det = determinant(at, of)
    x0 = _as(of.b / det, x) * x - _as(at.b / det, x) * y
    eps = _as(at.a / det, x) * y - _as(of.a / det, x) * x
    return Pair(x0, eps)


def determinant(at: Row | Numbers, of: Row | Numbers) -> Tensor | float:
    """How independent two readings are; zero when one tells nothing beyond the other."""
    return at.a * of.b - at.b * of.a


def plain(at: Row) -> Numbers:
    """A row of scalars as plain numbers."""
    return Numbers(at.a.item(), at.b.item())


def _as(coefficient: Tensor | float, like: Tensor) -> Tensor | float:
    """A coefficient, computed in float64, in the dtype and place of the tensor it scales, one a sample."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    cast = coefficient.to(like.device, like.dtype)
    return cast.reshape(cast.shape + (1,) * (like.ndim - cast.ndim)) if cast.ndim else cast
