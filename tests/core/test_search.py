"""The searched grid: the optimum against enumeration, its landing against a long walk on a mixture."""

from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from diffusion_core.discrete import ScaledLinearBetas
from diffusion_core.errors import ConfigError, DataError, RefusedError
from diffusion_core.grid import Given, Karras, LogSnr, Resampled, Uniform
from diffusion_core.schedule import VE, VP, Cosine, Edm, Linear, Shifted
from diffusion_core.search import costs, search, shortest
from diffusion_core.solver import FirstOrder
from diffusion_core.walk import walk
from tests.core.oracle import Gaussian, Mixture, perfect, time

LAW = Mixture()
CASES = {  # what share of the best even grid's error is left; on the last two the uniform one is already as good
    "vp": (VP(), 0.8),
    "scaled linear": (ScaledLinearBetas(), 0.92),
    "shifted": (Shifted(Linear()), 0.83),
    "ve": (VE(), 0.6),
    "edm": (Edm(), 0.6),
    "cosine": (Cosine(), 1.02),
    "linear": (Linear(), 1.02),
}


def knows(schedule, law=LAW):
    return lambda x, t: law.pair(x, schedule(time(t)))


def noise(schedule, count, seed):
    x = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x * schedule.level(1.0).row.b


def landing(schedule, grid, steps, x):
    denoise = knows(schedule)
    return walk(lambda y, level: denoise(y, level.t), x, grid.levels(schedule, steps), FirstOrder(), schedule)


@cache
def goal(name):
    return landing(CASES[name][0], Uniform(), 1000, noise(CASES[name][0], 512, 1))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [4, 5, 6, 7, 8])
def test_lands_nearer_than_the_even_grids(name, steps):
    """Root mean square distance, on noise it was not searched on, from where a thousand steps land."""
    schedule, margin = CASES[name]
    found = search(knows(schedule), schedule, noise(schedule, 64, 0), 60, steps)
    grids = {"searched": found, "uniform": Uniform(), "log-SNR": LogSnr(), "karras": Karras()}
    x = noise(schedule, 512, 1)
    off = {
        key: (landing(schedule, grid, steps, x) - goal(name)).square().mean().sqrt().item()
        for key, grid in grids.items()
    }
    assert off["searched"] < margin * min(off["uniform"], off["log-SNR"], off["karras"])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "steps"), [(1, 1), (5, 2), (7, 4), (8, 8), (9, 3)])
def test_is_the_cheapest_of_all_ways(count, steps, seed):
    cost = np.triu(np.random.default_rng(seed).random((count + 1, count + 1)), 1)
    cost[cost == 0] = np.inf
    ways = [(0, *inside, count) for inside in combinations(range(1, count), steps - 1)]
    prices = [sum(cost[leap] for leap in pairwise(way)) for way in ways]
    assert tuple(shortest(cost, steps)) == ways[int(np.argmin(prices))]


def test_a_leap_costs_what_it_misses_by():
    """On Gaussian data, from the definitions: DDIM's step from each fine point, against the fine point it leaps to."""
    law, levels = Gaussian(), Uniform().levels(VP(), 6)
    x = noise(VP(), 8, 0)
    found = costs(knows(VP(), law), x, levels)
    points, said = [x], []
    for (_, (a, b)), (_, (c, d)) in pairwise(levels):
        x0 = law.means[0] + a * law.std**2 / ((a * law.std) ** 2 + b**2) * (points[-1] - a * law.means[0])
        said.append((x0, (points[-1] - a * x0) / b))
        points.append(c * said[-1][0] + d * said[-1][1])
    for i in range(7):
        for j in range(7):
            if j <= i:
                assert found[i, j] == np.inf
            else:
                c, d = levels[j].row
                off = ((c * said[i][0] + d * said[i][1] - points[j]) ** 2).mean().item()
                assert found[i, j] == pytest.approx(off, rel=1e-9, abs=1e-15)
                assert (off < 1e-20) == (j == i + 1)


def test_all_the_fine_steps_are_the_fine_grid():
    grid = LogSnr(0.1)
    found = search(knows(VP()), VP(), noise(VP(), 4, 0), 7, 7, grid)
    assert found == Given(tuple(level.t for level in grid.levels(VP(), 7)[:-1]))
    assert search(knows(VP()), VP(), noise(VP(), 4, 0), 7, 1).at == (1.0,)


def test_searches_with_a_denoiser_below_its_first_time():
    """A `Reader` is what it takes; no time above `first` is asked, no gradient is kept, and every fine one but once."""
    denoiser = perfect(LAW, Cosine(), "eps", first=0.9)
    asked = []

    def denoise(x, t):
        asked.append(t)
        pair = denoiser(x, t)
        assert not pair.x0.requires_grad
        return pair

    found = search(denoise, Cosine(), noise(Cosine(), 8, 0).reshape(8, 1, 1, 1), 20, 5, first=0.9)
    assert asked == pytest.approx([0.9 * (1 - i / 20) for i in range(20)])
    assert len(found.at) == 5 and found.at[0] == 0.9 and set(found.at) <= set(asked)
    assert len(found.levels(Cosine(), 5, 0.9)) == 6


def test_refusals():
    x = noise(VP(), 2, 0)
    for steps in (0, 8):
        with pytest.raises(ConfigError, match=f"steps {steps} of 7"):
            search(knows(VP()), VP(), x, 7, steps)
    with pytest.raises(RefusedError, match="goes up"):
        search(knows(VP()), VP(), x, 7, 3, Resampled(Uniform(), 2, 2))
    with pytest.raises(DataError, match="x holds 2"):
        search(knows(VP()), VP(), x * torch.inf, 7, 3)
    with pytest.raises(RefusedError, match="no way of 4 leaps"):
        shortest(costs(knows(VP()), x, Uniform().levels(VP(), 3)), 4)
