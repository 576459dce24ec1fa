"""Averages of any length, chosen after training from a few stored ones.

A stored power average is an inner product ∫ p(τ) θ(τ) dτ of the training's weights with a known profile p
(`PowerEma`). A profile of another length is, nearly, a sum Σ xᵢ pᵢ of stored ones; the same sum of the stored
weights is the average sought. The xᵢ make ‖Σ xᵢ pᵢ - p‖ smallest, by inner products in closed form

    ⟨p₁, p₂⟩ = (γ₁+1)(γ₂+1)/(γ₁+γ₂+1) · min(t₁,t₂)^(γ₁+γ₂+1) / (t₁^(γ₁+1) t₂^(γ₂+1))

(Karras et al. 2024, arXiv 2312.02696, eq. 151 and algorithm 3), under Σ xᵢ = 1: what never moved in training,
such as a buffer, comes back as it was.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion_core import manifest
from diffusion_core.ema import PowerEma, power_exponent
from diffusion_core.errors import ConfigError
from diffusion_core.weights import read_tensors, write_tensors

KIND = "snapshot"
TENSORS = "weights.safetensors"
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Snapshot:
    """A power average as it was after `step` steps: relative standard deviation `std` and weights by name."""

    step: int
    std: float
    weights: Mapping[str, Tensor]


def snapshot(ema: PowerEma) -> Snapshot:
    """A copy of an average as it is now; raises ConfigError before the first update."""
    if not ema.updates:
        raise ConfigError("a snapshot of an average without updates: one step of training at least is wanted")
    return Snapshot(ema.updates, ema.std, {name: tensor.clone() for name, tensor in ema.average.items()})


def save(folder: Path, taken: Snapshot) -> Path:
    """Write a snapshot as a sealed folder of its own below `folder`, and return its place."""
    place = folder / f"std-{taken.std:g}-step-{taken.step:08d}"
    draft = folder / f".{place.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write_tensors(draft / TENSORS, taken.weights)
    manifest.seal(draft, KIND, {"step": taken.step, "std": taken.std})
    manifest.publish(draft, place)
    return place


def load(place: Path) -> Snapshot:
    """Read a snapshot, its weights mapped from disk; raises IntegrityError if it is not what was written."""
    about = manifest.verify(place, KIND).about
    return Snapshot(about["step"], about["std"], read_tensors(place / TENSORS))


def reconstruct(snapshots: Sequence[Snapshot], std: float, step: int) -> dict[str, Tensor]:
    """The power average of relative standard deviation `std` after `step` steps, summed in float64.

    What is not floating point is that of the snapshot nearest in time. Raises ConfigError for no snapshots, two
    alike, snapshots of different networks, a `std` outside (0, 0.2887) or a step that no snapshot has reached.
    """
    shares, _ = _fit(snapshots, std, step)
    nearest = min(snapshots, key=lambda taken: abs(taken.step - step)).weights
    for taken in snapshots:
        if {name: w.shape for name, w in taken.weights.items()} != {name: w.shape for name, w in nearest.items()}:
            raise ConfigError(f"the snapshot std {taken.std:g} at step {taken.step} is of another network")
    made: dict[str, Tensor] = {}
    for name, like in nearest.items():
        if like.is_floating_point():
            total = torch.zeros_like(like, dtype=torch.float64)
            for share, taken in zip(shares.tolist(), snapshots, strict=True):
                total.add_(taken.weights[name], alpha=share)
            made[name] = total.to(like.dtype)
        else:
            made[name] = like.clone()
    return made


def profile_error(snapshots: Sequence[Snapshot], std: float, step: int) -> float:
    """How far the reconstructed profile is from the one wanted: ‖Σ xᵢ pᵢ - p‖ / ‖p‖, before any weight is read.

    Above some 0.1, more or denser snapshots are needed. Raises as `reconstruct`.
    """
    return _fit(snapshots, std, step)[1]


def _fit(snapshots: Sequence[Snapshot], std: float, step: int) -> tuple[Array, float]:
    """The share of each snapshot (N,), by Lagrange's method, and the relative error of the profile that remains."""
    _check(snapshots, std, step)
    steps = np.array([taken.step / step for taken in snapshots])
    exponents = np.array([power_exponent(taken.std) for taken in snapshots])
    exponent = np.array(power_exponent(std))
    gram = _inner(steps[:, None], exponents[:, None], steps, exponents)
    aim, norm = _inner(steps, exponents, np.ones(()), exponent), _inner(np.ones(()), exponent, np.ones(()), exponent)
    lengths = np.sqrt(np.diag(gram))  # in units of which the system is well conditioned
    system = np.block([[gram / lengths / lengths[:, None], 1 / lengths[:, None]], [1 / lengths, np.zeros(1)]])
    shares: Array = np.linalg.solve(system, np.append(aim / lengths, 1))[:-1] / lengths
    rest = float((norm - 2 * shares @ aim + shares @ gram @ shares) / norm)
    return shares, max(rest, 0) ** 0.5


def _inner(step: Array, exponent: Array, other: Array, rival: Array) -> Array:
    """⟨p₁, p₂⟩ as in the module's docstring, with every power of a ratio of at most 1, so that none overflows."""
    first = np.minimum(step, other)
    head = (exponent + 1) * (rival + 1) / (exponent + rival + 1)
    found: Array = head / first * (first / step) ** (exponent + 1) * (first / other) ** (rival + 1)
    return found


def _check(snapshots: Sequence[Snapshot], std: float, step: int) -> None:
    if not snapshots:
        raise ConfigError("no snapshots: at least one is wanted")
    power_exponent(std)
    last = max(taken.step for taken in snapshots)
    if not 1 <= step <= last:
        raise ConfigError(f"step {step}: a step from 1 to {last}, that of the last snapshot, is wanted")
    places = [(taken.std, taken.step) for taken in snapshots]
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"the snapshot std {place[0]:g} at step {place[1]} is given {places.count(place)} times")
