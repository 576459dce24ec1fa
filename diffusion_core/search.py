"""A searched grid: the steps that a few warm-up trajectories can best do without are left out.

A trajectory is walked once on a fine grid. Leaping from its point i to its point j with what the network said at i
lands a little off; the least sum of these errors over all ways of n leaps from the first point to the last is found
by dynamic programming (GITS: Chen et al. 2024, arXiv 2405.11326).

    V₀(0) = 0,   Vₙ(j) = minᵢ [Vₙ₋₁(i) + E‖x(i → j) - xⱼ‖²]        (Bellman)
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_core.checks import check_finite
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.grid import Given, Grid, Uniform
from diffusion_core.pair import Pair, mix
from diffusion_core.schedule import Level, Schedule


@torch.no_grad()
def search(
    denoise: Callable[[Tensor, float], Pair],
    schedule: Schedule,
    x: Tensor,
    fine: int,
    steps: int,
    grid: Grid = Uniform(),  # noqa: B008 (a frozen value)
    first: float = 1.0,
) -> Given:
    """The best `steps` of the `fine` times of a grid for first-order steps on the trajectories of x (B, ...).

    x are samples at the first level of the grid; `denoise` is called once a fine step and its pair is that of a
    `Reader`. Raises ConfigError for more steps than fine ones, RefusedError for a grid that also goes up, DataError
    for an x that is not finite.
    """
    check_finite("x", x)
    if not 1 <= steps <= fine:
        raise ConfigError(f"steps {steps} of {fine} fine ones: between 1 and {fine} are wanted")
    levels = grid.levels(schedule, fine, first)
    if len(levels) != fine + 1:
        raise RefusedError(f"{grid} goes up between its {fine} steps: a grid that only falls is wanted")
    places = shortest(costs(denoise, x, levels), steps)
    return Given(tuple(levels[place].t for place in places[:-1]))


def costs(denoise: Callable[[Tensor, float], Pair], x: Tensor, levels: tuple[Level, ...]) -> NDArray[np.float64]:
    """The mean squared error, (n + 1, n + 1), of a leap from point i to j of the fine trajectories of x (B, ...).

    Infinite where j does not come after i.
    """
    points, pairs = [x], list[Pair]()
    for level, to in pairwise(levels):
        pairs.append(denoise(points[-1], level.t))
        points.append(mix(pairs[-1], to.row))
    found = np.full((len(levels), len(levels)), np.inf)
    for i, pair in enumerate(pairs):
        for j in range(i + 1, len(levels)):
            found[i, j] = (mix(pair, levels[j].row) - points[j]).double().square().mean().item()
    return found


def shortest(cost: NDArray[np.float64], steps: int) -> list[int]:
    """The places of the cheapest way from the first place to the last in so many leaps, both ends among them.

    `cost` (n + 1, n + 1) of each leap. Raises RefusedError where there is no such way.
    """
    least = np.full(len(cost), np.inf)
    least[0] = 0
    before = list[NDArray[np.int64]]()
    for _ in range(steps):
        ways = least[:, None] + cost
        before.append(ways.argmin(0))
        least = ways.min(0)
    if not np.isfinite(least[-1]):
        raise RefusedError(f"no way of {steps} leaps through {len(cost)} places")
    places = [len(cost) - 1]
    for step in reversed(before):
        places.append(int(step[places[-1]]))
    return places[::-1]
