"""Multistep solvers against the rules in their papers, and against published literals."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, interpolate

from diffusion_core.errors import ConfigError
from diffusion_core.multistep import Multistep, UniPC
from diffusion_core.polynomial import mean_weights
from diffusion_core.schedule import VE, VP
from diffusion_core.target import EPS, FLOW, X0, V
from diffusion_core.walk import walk
from tests.core.oracle import Mixture
from tests.core.paths import at, levels

LAW = Mixture()
X = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def same(schedule, solver, wanted, steps=6):
    torch.testing.assert_close(
        walk(at(LAW), X, levels(schedule, steps), solver, schedule), wanted, rtol=1e-9, atol=1e-9
    )


def test_dpm_solver_pp_2m():
    """Lu et al. 2022, algorithm 2: D = (1 + 1/2r) x₀ - 1/2r x₀', x' = (σ'/σ) x - α'(e^-h - 1) D, λ = ln(α/σ)."""
    x, before, h_before = X, None, None
    for (_, (a, b)), (_, (c, d)) in pairwise(levels(VP(), 6)):
        h, now = math.log(c / d) - math.log(a / b), LAW.pair(x, (a, b)).x0
        mean = now if before is None else (1 + h / h_before / 2) * now - h / h_before / 2 * before
        x, before, h_before = d / b * x - c * math.expm1(-h) * mean, now, h
    same(VP(), Multistep(), x)


def test_plms():
    """Liu et al. 2022, eq. 12, once four readings are kept; one step of Heun's, then Adams and Bashforth."""
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    x, kept = X, []
    for (_, (a, b)), (_, (c, d)) in pairwise(levels(VP(), 9)):
        kept = [LAW.pair(x, (a, b)).eps, *kept][:4]
        eps = sum(w * one for w, one in zip(weights[len(kept)], kept, strict=True))
        if len(kept) == 1:
            eps = (eps + LAW.pair(c * (x - b * eps) / a + d * eps, (c, d)).eps) / 2
        x = c * (x - b * eps) / a + d * eps
    same(VP(), Multistep(EPS(), "t", 4, start="heun"), x, 9)


def test_ipndm_keeps_its_weights_on_uneven_grids():
    """Zhang and Chen 2023: Adams and Bashforth's weights, whatever the steps are."""
    x, kept = X, []
    path = VE().levels([0.9, 0.8, 0.5, 0.45, 0.2])
    for (_, (_, sigma)), (_, (_, to)) in pairwise(path):
        kept = [LAW.pair(x, (1.0, sigma)).eps, *kept][:2]
        x = x + (to - sigma) * (kept[0] if len(kept) == 1 else (3 * kept[0] - kept[1]) / 2)
    found = walk(at(LAW), X, path, Multistep(EPS(), "step", 2), VE())
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


def test_unipc_1_is_the_corrected_first_order_step():
    """Zhao et al. 2023, algorithms 5 and 6, with p = 1: each new x₀ re-does the step that led to it, by halves."""
    path = levels(VP(), 6)
    x, base, before = X, None, None
    for index, ((_, (a, b)), (_, (c, d))) in enumerate(pairwise(path)):
        now = LAW.pair(x, (a, b)).x0
        if index:
            (e, f) = path[index - 1].row
            h = math.log(a / b) - math.log(e / f)
            x = b / f * base - a * math.expm1(-h) * (before + now) / 2
        h = math.log(c / d) - math.log(a / b)
        base, before, x = x, now, d / b * x - c * math.expm1(-h) * now
    same(VP(), UniPC(1), x)


def test_weights_are_the_published_literals():
    assert np.allclose(np.array(mean_weights([3, 2, 1, 0], 3, 4)) * 24, [55, -59, 37, -9])
    for r in (0.3, 1.0, 2.5):  # previous step over this one, in log-SNR
        assert np.allclose(mean_weights([0.0, -r], 0, 1), [1 + 1 / (2 * r), -1 / (2 * r)])


@pytest.mark.parametrize(
    ("frame", "density"),
    [
        (None, lambda u: 1.0),
        (X0(), lambda u: math.exp(u / 2)),
        (EPS(), lambda u: math.exp(-u / 2)),
        (FLOW(), lambda u: math.exp(u / 2) / (1 + math.exp(u / 2)) ** 2),
    ],
)
@pytest.mark.parametrize("places", [(-1.0, -2.5), (0.5, -0.4, -3.0), (4.0, 3.5, 1.0, -2.0)])
def test_the_mean_is_that_of_the_polynomial_by_quadrature(frame, density, places):
    """d(α/σ), d(σ/α) and d(σ/(α+σ)) as functions of λ = 2 ln(α/σ), integrated by scipy."""
    values = [math.sin(3 * place) for place in places]
    start, end = places[0], places[0] + 1.7
    curve = interpolate.BarycentricInterpolator(places, values)
    whole = integrate.quad(density, start, end)[0]
    wanted = integrate.quad(lambda u: density(u) * float(curve(u)), start, end)[0] / whole
    weights = mean_weights(list(places), start, end, frame)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: Multistep(V()),
        lambda: Multistep(order=5),
        lambda: UniPC(4),
        lambda: Multistep(EPS(), "t", 2, exact=True),
    ],
)
def test_impossible_solvers_are_refused(refused):
    with pytest.raises(ConfigError, match="wanted|known in clock"):
        refused()
