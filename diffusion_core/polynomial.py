"""The mean of a polynomial through a few readings over one step: the heart of every multistep solver.

In log-SNR a step does not weigh all places alike: x/σ moves by x₀·d(α/σ), x/α by ε·d(σ/α), x/(α+σ) by
(ε-x₀)·d(σ/(α+σ)). Weighing evenly instead costs an error of third order a step.
"""

from collections.abc import Sequence

import numpy as np

from diffusion_core.target import EPS, FLOW, X0, Target

DENSITIES = {  # how much of a step falls on each log-SNR u, up to a factor that keeps the largest near one
    X0(): lambda u: np.exp((u - u.max()) / 2),  # d(α/σ)
    EPS(): lambda u: np.exp((u.min() - u) / 2),  # d(σ/α)
    FLOW(): lambda u: 1 / np.cosh(u / 4) ** 2,  # d(σ/(α+σ))
}
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(32)


def mean_weights(places: Sequence[float], start: float, end: float, frame: Target | None = None) -> list[float]:
    """Weights of values at `places` in the mean over [start, end] of the polynomial through them (Lagrange).

    Even or, given a frame, as a step weighs readings in it, the places then being log-SNRs.
    """
    width = end - start
    scaled = (np.array(places) - start) / width
    nodes, shares = (NODES + 1) / 2, NODE_WEIGHTS / 2
    if frame is not None:
        density = DENSITIES[frame](start + nodes * width)
        shares = shares * density / (shares * density).sum()
    weights = []
    for j, place in enumerate(scaled):
        others = np.delete(scaled, j)
        basis = ((nodes[:, None] - others) / (place - others)).prod(1)
        weights.append(float((shares * basis).sum()))
    return weights
