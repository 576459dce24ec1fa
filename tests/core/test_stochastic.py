"""Churn against EDM's algorithm 2 by hand, and Langevin correction against the law it must keep."""

import math

import pytest
import torch

from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise
from diffusion_core.sampler import sample
from diffusion_core.schedule import VE, VP, Edm
from diffusion_core.solver import FirstOrder, Heun
from diffusion_core.stochastic import Churn, Langevin
from diffusion_core.target import EPS
from diffusion_core.walk import walk
from tests.core.oracle import Mixture, perfect
from tests.core.paths import at

LAW = Mixture()
X = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("schedule", [VE(), Edm()], ids=["ve", "edm"])
def test_churn_is_edm_algorithm_2(schedule):
    """Karras et al. 2022: γ = min(S_churn/N, √2 - 1) where S_tmin <= σ <= S_tmax; σ̂ = (1 + γ)σ."""
    path = schedule.levels([0.9, 0.7, 0.5, 0.3])
    amount, low, high, inflate = 0.6, 0.3, 60.0, 1.01
    noises = torch.randn(3, *X.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x, raised = X * path[0].row.b, 0
    for step in range(3):
        sigma, to = path[step].row.b, path[step + 1].row.b
        gamma = min(amount / 3, math.sqrt(2) - 1) if low <= sigma <= high else 0.0
        raised += gamma > 0
        hat = sigma * (1 + gamma)
        x = x + math.sqrt(hat**2 - sigma**2) * inflate * noises[step]
        d = (x - LAW.pair(x, (1.0, hat)).x0) / hat
        trial = x + (to - hat) * d
        there = (trial - LAW.pair(trial, (1.0, to)).x0) / to
        x = x + (to - hat) * (d + there) / 2
    found = walk(
        at(LAW),
        X * path[0].row.b,
        path,
        Churn(Heun(EPS()), amount, low, high, inflate),
        schedule,
        draw=lambda step, number: noises[step],
    )
    assert raised
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_a_schedule_that_ends_is_not_churned_beyond_its_end():
    asked = []

    def denoise(x, level):
        asked.append(level.t)
        return LAW.pair(x, level.row)

    path = VP().levels([0.999, 0.9])
    walk(denoise, X, path, Churn(FirstOrder(), amount=100.0, high=1e9), VP(), draw=lambda *_: torch.zeros_like(X))
    assert asked == [pytest.approx(1.0)]


def test_langevin_steps_are_the_formula():
    """x <- x + ε·s(x) + √(2ε)·z with ε = 2(r·σ)², the signal-to-noise ratio r of the paper at its expected norms."""
    path = VP().levels([0.5, 0.3])
    z = torch.randn(2, *X.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x, size = X, 2 * (0.2 * path[0].row.b) ** 2
    for walked in range(2):
        x = x + size * LAW.score(x, path[0].row) + math.sqrt(2 * size) * z[walked]
    wanted = walk(at(LAW), x, path, FirstOrder(), VP())
    solver = Langevin(FirstOrder(), walks=2, snr=0.2)
    found = walk(at(LAW), X, path, solver, VP(), draw=lambda step, number: z[number - 2])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_annealed_langevin_recovers_the_weights_of_the_modes():
    """Song and Ermon 2019, arXiv 1907.05600, section 4: from pure noise, without any other step, to a mixture."""
    law = Mixture(means=(-2.0, 2.0), weights=(0.3, 0.7), std=0.3)
    schedule, count = VE(sigma_min=0.05, sigma_max=10.0), 4000
    reader, noise = perfect(law, schedule, "score"), Noise(range(count))
    x = noise.normal((1,), 7).double() * 10.0
    for step, level in enumerate(schedule.levels([1 - i / 24 for i in range(24)])):
        for move in range(30):
            size = 2 * (0.25 * level.row.b) ** 2
            z = noise.normal((1,), 2000 + 100 * step + move).double()
            x = x + size * -reader(x, level.t).eps / level.row.b + math.sqrt(2 * size) * z
    share = (x > 0).double().mean().item()
    assert share == pytest.approx(0.7, abs=0.04)
    assert x[x > 0].mean().item() == pytest.approx(2.0, abs=0.05)
    assert x[x > 0].std().item() == pytest.approx(math.hypot(0.3, 0.05), abs=0.06)


def test_a_corrected_sampler_lands_on_the_law():
    schedule, count = VP(), 4000
    noise = Noise(range(count))
    x = noise.normal((1,), 7).double()
    path = schedule.levels([1 - i / 40 for i in range(40)])
    found = sample(perfect(LAW, schedule, "v"), x, path, Langevin(FirstOrder(), walks=1), noise=noise)
    (a, b) = path[-1].row
    mean = sum(w * m for w, m in zip(LAW.weights, LAW.means, strict=True))
    second = sum(w * m * m for w, m in zip(LAW.weights, LAW.means, strict=True)) + LAW.std**2
    assert found.mean().item() == pytest.approx(a * mean, abs=0.08)
    assert found.std().item() == pytest.approx(math.sqrt(a**2 * (second - mean**2) + b**2), abs=0.06)


@pytest.mark.parametrize("refused", [lambda: Churn(low=2, high=1), lambda: Langevin(FirstOrder(), walks=0)])
def test_impossible_numbers_are_refused(refused):
    with pytest.raises(ConfigError, match="wanted"):
        refused()
