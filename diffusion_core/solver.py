"""Solvers: each answers one question, which pair is held over this step?

A step from level t to level s is: hold a pair, mix it at s. Holding what the network says now gives DDIM,
DPM-Solver-1 and flow Euler at once, since they are the same step (the pair reproduces x at t exactly).
Higher orders average a *reading* of the pair over the step, in some frame and some clock:

    frame EPS,  clock t        PNDM's linear multistep (Liu et al. 2022)
    frame X0,   clock log_snr  DPM-Solver++ multistep (Lu et al. 2022, arXiv 2211.01095)
    frame EPS,  clock ratio    Katherine Crowson's LMS; EDM's Heun (Karras et al. 2022, algorithm 1)
    frame FLOW, clock t        Adams-Bashforth and Heun on rectified flows
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_core.denoiser import SMALLEST_DETERMINANT
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.pair import Pair, Row, determinant, mix, unmix
from diffusion_core.schedule import Linear, log_snr
from diffusion_core.spec import Kind
from diffusion_core.target import EPS, FLOW, X0, Target

Denoise = Callable[[Tensor, Tensor], Pair]
Clock = Literal["t", "log_snr", "ratio"]
Memory = tuple[tuple[float, Tensor], ...]  # (clock, reading), newest first


class Level(NamedTuple):
    """A place on a grid: the row of the sample there and the time by which the denoiser knows it."""

    t: Tensor
    row: Row

    @property
    def clean(self) -> bool:
        """Whether no noise is left."""
        return self.row.b.item() == 0


class Solver(Kind):
    """Which pair is held over the step from one level to the next."""

    @abstractmethod
    def hold(self, denoise: Denoise, x: Tensor, level: Level, to: Level, memory: Memory) -> tuple[Pair, Memory]:
        """The held pair and what is remembered for the next step."""

    def calls(self, steps: int) -> int:
        """How many network calls `steps` steps take when the last lands on a clean picture."""
        return steps


@dataclass(frozen=True)
class FirstOrder(Solver):
    """Hold what the network says at the start of the step: DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12), Euler."""

    def hold(self, denoise: Denoise, x: Tensor, level: Level, to: Level, memory: Memory) -> tuple[Pair, Memory]:
        return denoise(x, level.t), ()


@dataclass(frozen=True)
class Heun(Solver):
    """Hold the mean of the readings at both ends of a trial step (Karras et al. 2022, algorithm 1).

    The step into a clean end is first order: there is nothing left to read there.
    """

    frame: Target = EPS()

    def __post_init__(self) -> None:
        _check_frame(self.frame)

    def hold(self, denoise: Denoise, x: Tensor, level: Level, to: Level, memory: Memory) -> tuple[Pair, Memory]:
        pair = denoise(x, level.t)
        if to.clean:
            return pair, ()
        frame = _row(self.frame)
        _check_leaves(level, frame, self)
        there = denoise(mix(pair, to.row), to.t)
        return unmix(x, level.row, (mix(pair, frame) + mix(there, frame)) / 2, frame), ()

    def calls(self, steps: int) -> int:
        return 2 * steps - 1


@dataclass(frozen=True)
class Multistep(Solver):
    """Hold the mean over the step, in `clock`, of the polynomial through the last `order` readings in `frame`.

    Starts at first order and grows; into a clean end, where log-SNR is infinite, it is first order in that clock.
    """

    frame: Target = X0()
    clock: Clock = "log_snr"
    order: int = 2

    def __post_init__(self) -> None:
        _check_frame(self.frame)
        if not 1 <= self.order <= 4:
            raise ConfigError(f"order {self.order}: 1 to 4 is wanted")

    def hold(self, denoise: Denoise, x: Tensor, level: Level, to: Level, memory: Memory) -> tuple[Pair, Memory]:
        frame = _row(self.frame)
        pair = denoise(x, level.t)
        now, then = _clock(self.clock, level), _clock(self.clock, to)
        kept = ((now, mix(pair, frame)), *memory)[: self.order]
        usable = kept if np.isfinite(then) else kept[:1]
        usable = tuple(entry for entry in usable if np.isfinite(entry[0])) or kept[:1]
        if len(usable) == 1:  # what the network says, which needs no frame to be read in
            return pair, kept
        weights = mean_weights([place for place, _ in usable], now, then)
        mean = weights[0] * usable[0][1]
        for weight, (_, reading) in zip(weights[1:], usable[1:], strict=True):
            mean = mean + weight * reading
        return unmix(x, level.row, mean, frame), kept


def mean_weights(places: list[float], start: float, end: float) -> list[float]:
    """Weights of values at `places` in the mean over [start, end] of the polynomial through them (Lagrange)."""
    width = end - start
    scaled = (np.array(places) - start) / width
    weights = []
    for j, place in enumerate(scaled):
        others = np.delete(scaled, j)
        integral = np.polyint(np.poly(others) / np.prod(place - others))
        weights.append(float(np.polyval(integral, 1.0) - np.polyval(integral, 0.0)))
    return weights


def _clock(clock: Clock, level: Level) -> float:
    if clock == "t":
        return level.t.item()
    return log_snr(level.row).item() if clock == "log_snr" else (level.row.b / level.row.a).item()


def _row(frame: Target) -> Row:
    return frame(Linear(), torch.zeros((), dtype=torch.float64))


def _check_leaves(level: Level, frame: Row, solver: Solver) -> None:
    if not abs(determinant(level.row, frame).item()) >= SMALLEST_DETERMINANT:
        raise RefusedError(
            f"{solver} cannot leave t = {level.t.item():g} (signal {level.row.a.item():.2g}): its frame tells nothing "
            "about the picture in pure noise; use frame x0 or flow, or start below pure noise"
        )


def _check_frame(frame: Target) -> None:
    if not isinstance(frame, X0 | EPS | FLOW):
        raise ConfigError(f"frame {frame}: a reading that does not depend on time is wanted: x0, eps or flow")
