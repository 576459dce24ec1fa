"""Fair timing: variants take turns, the clock is this thread's CPU time, what counts is the median of a round's ratio.

A noisy neighbour then slows all variants of a round alike, and what another process takes is not counted.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Figure(NamedTuple):
    """One measured figure; `bound` as in measured.py, empty for what is only told."""

    name: str
    measured: float
    unit: str
    bound: str = ""
    peer: str = ""


def alternate(variants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round, after some rounds that do not count."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, run in variants.items():
            start = time.process_time()
            run()
            if number >= warm_up:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """The median over rounds of one variant's time over another's."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))
