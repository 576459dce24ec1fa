"""Solvers against the exact probability flow of Gaussian data, and against the published update rules."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.noise import Noise, Stream
from diffusion_core.pair import row
from diffusion_core.sampler import Ancestral, Full, Grid, Keep, Renoise, sample
from diffusion_core.schedule import VE, VP, Linear, Schedule, log_snr
from diffusion_core.solver import FirstOrder, Heun, Level, Multistep, Solver, mean_weights
from diffusion_core.target import EPS, FLOW, X0, Target, V
from tests.core.oracle import BLIND, PURE_NOISE, Gaussian, Mixture, one_of_each, perfect, time

LAW, SCHEDULES = Gaussian(0.7, 0.4), one_of_each(Schedule)
SOLVERS = {
    "first_order": (FirstOrder(), 1, 0.2),
    "heun x0": (Heun(X0()), 2, 0.25),
    "heun eps": (Heun(EPS()), 2, 0.25),
    "heun flow": (Heun(FLOW()), 2, 0.25),
    "dpm++ 2m": (Multistep(X0(), "log_snr", 2), 2, 0.25),
    "lms": (Multistep(EPS(), "ratio", 2), 2, 0.25),
    "adams-bashforth flow": (Multistep(FLOW(), "t", 2), 2, 0.25),
    "plms": (Multistep(EPS(), "t", 4), 2, 0.25),  # its first-order start bounds it
}


def levels(schedule, steps, start=0.8, end=0.2):
    return [Level(t, schedule(t)) for t in torch.linspace(start, end, steps + 1, dtype=torch.float64)]


def at(schedule, law=LAW):
    return lambda x, t, cond=None: law.pair(x, schedule(t))


def start(level, law=LAW):
    """Points one, zero and two standard deviations from the mean of the noisy law."""
    a, b = level.row
    return a * law.means[0] + torch.sqrt((a * law.std) ** 2 + b**2) * time(-1.0, 0.0, 2.0)[:, None]


def test_every_solver_is_in_the_matrix():
    assert {type(solver) for solver, _, _ in SOLVERS.values()} == set(Solver.kinds().values())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lands_on_the_exact_flow_at_its_order(schedule, solver):
    schedule, (solver, order, within) = SCHEDULES[schedule], SOLVERS[solver]
    errors = []
    for steps in (160, 320):
        grid = levels(schedule, steps)
        x = start(grid[0])
        wanted = LAW.flow(x, grid[0].row, grid[-1].row)
        errors.append((sample(at(schedule), x, grid, solver) - wanted).abs().max().item())
    assert errors[1] < 5e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=within)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("target", Target.kinds())
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_does_not_care_what_the_network_says(schedule, target, solver):
    """The same pair through any target: the same landing, into the clean end."""
    first = 0.97 if schedule in PURE_NOISE and target in BLIND else 1.0
    schedule, solver = SCHEDULES[schedule], SOLVERS[solver][0]
    grid = [*levels(schedule, 3, 0.9, 0.3), Level(time(0.0), row(1, 0))]
    x = start(grid[0])
    through = sample(perfect(LAW, schedule, target, first=first), x, grid, solver)
    torch.testing.assert_close(through, sample(at(schedule), x, grid, solver), rtol=1e-7, atol=1e-7)


LEAVERS = [FirstOrder(), Heun(X0()), Heun(FLOW())] + [
    Multistep(frame, clock, 3) for frame in (X0(), EPS(), FLOW()) for clock in ("t", "log_snr", "ratio")
]


@pytest.mark.parametrize("solver", LEAVERS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_is_finite_from_pure_noise_to_clean(solver, schedule):
    """Log-SNR and noise ratio are infinite at the ends of some schedules; a picture never is."""
    schedule = SCHEDULES[schedule]
    for grid in one_of_each(Grid).values():
        for steps in (1, 2, 7):
            levels = grid.levels(schedule, steps)
            found = sample(at(schedule), start(levels[0]).float(), levels, solver)
            assert found.isfinite().all(), (grid, steps)
            if getattr(solver, "frame", X0()) != EPS():  # held noise is amplified where there is hardly a signal
                assert (found - LAW.means[0]).abs().max() < 12 * LAW.std, (grid, steps)


def test_held_noise_cannot_leave_pure_noise():
    for schedule in (SCHEDULES[name] for name in PURE_NOISE):
        grid = one_of_each(Grid)["uniform"].levels(schedule, 3)
        with pytest.raises(RefusedError, match="Heun.*cannot leave t = 1 .*use frame x0 or flow"):
            sample(at(schedule), start(grid[0]), grid, Heun(EPS()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_calls_are_counted_as_they_are_made(solver):
    made = []

    def denoise(x, t, cond=None):
        made.append(t.item())
        return LAW.pair(x, Linear()(t))

    solver = SOLVERS[solver][0]
    grid = one_of_each(Grid)["uniform"].levels(Linear(), 5, 0.9)
    sample(denoise, start(grid[0]), grid, solver)
    assert solver.calls(5) == len(made)
    assert Heun().calls(18) == 35  # Karras et al. 2022, section 5


class TestPublishedRules:
    """One step or a run of each named sampler, from the formula in its paper, on data where it matters: a mixture."""

    law = Mixture()
    x = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(self, schedule, solver, steps=6, **more):
        return sample(at(schedule, self.law), self.x, levels(schedule, steps), solver, **more)

    def test_ddim(self):
        """Song et al. 2021, eq. 12: x' = √ᾱ' (x - √(1-ᾱ) ε)/√ᾱ + √(1-ᾱ') ε."""
        x = self.x
        for (_, (a, b)), (_, (c, d)) in pairwise(levels(VP(), 6)):
            eps = self.law.pair(x, (a, b)).eps
            x = c * (x - b * eps) / a + d * eps
        torch.testing.assert_close(self.run(VP(), FirstOrder()), x, rtol=1e-10, atol=1e-10)

    def test_euler_on_the_straight_path(self):
        x = self.x
        for (t, level), (s, _) in pairwise(levels(Linear(), 6)):
            pair = self.law.pair(x, level)
            x = x + (s - t) * (pair.eps - pair.x0)
        torch.testing.assert_close(self.run(Linear(), FirstOrder()), x, rtol=1e-10, atol=1e-10)

    def test_edm_heun(self):
        """Karras et al. 2022, algorithm 1: d = (x - D)/σ, trapezoid in σ."""
        x = self.x
        for (_, (_, sigma)), (_, (one, to)) in pairwise(levels(VE(), 6)):
            d = (x - self.law.pair(x, (one, sigma)).x0) / sigma
            trial = x + (to - sigma) * d
            there = (trial - self.law.pair(trial, (one, to)).x0) / to
            x = x + (to - sigma) * (d + there) / 2
        torch.testing.assert_close(self.run(VE(), Heun(EPS())), x, rtol=1e-10, atol=1e-10)

    def test_dpm_solver_pp_2m(self):
        """Lu et al. 2022, algorithm 2: D = (1 + 1/2r) x₀ - 1/2r x₀', x' = (σ'/σ) x - α'(e^-h - 1) D, λ = ln(α/σ)."""
        x, before, h_before = self.x, None, None
        for (_, (a, b)), (_, (c, d)) in pairwise(levels(VP(), 6)):
            h, now = torch.log(c / d) - torch.log(a / b), self.law.pair(x, (a, b)).x0
            mean = now if before is None else (1 + h / h_before / 2) * now - h / h_before / 2 * before
            x, before, h_before = d / b * x - c * torch.expm1(-h) * mean, now, h
        torch.testing.assert_close(self.run(VP(), Multistep(X0(), "log_snr", 2)), x, rtol=1e-10, atol=1e-10)

    def test_plms(self):
        """Liu et al. 2022, eq. 12, once four readings are kept; fewer before that, by Adams and Bashforth."""
        weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
        x, kept = self.x, []
        for (_, (a, b)), (_, (c, d)) in pairwise(levels(VP(), 9)):
            kept = [self.law.pair(x, (a, b)).eps, *kept][:4]
            eps = sum(w * one for w, one in zip(weights[len(kept)], kept, strict=True))
            x = c * (x - b * eps) / a + d * eps
        torch.testing.assert_close(self.run(VP(), Multistep(EPS(), "t", 4), 9), x, rtol=1e-10, atol=1e-10)


def test_weights_are_the_published_literals():
    assert np.allclose(np.array(mean_weights([3, 2, 1, 0], 3, 4)) * 24, [55, -59, 37, -9])
    for r in (0.3, 1.0, 2.5):  # previous step over this one, in log-SNR
        assert np.allclose(mean_weights([0.0, -r], 0, 1), [1 + 1 / (2 * r), -1 / (2 * r)])


class Fixed:
    """Fresh noise of one value."""

    def __init__(self, value):
        self.value = value

    def normal(self, shape, stream=0):
        return torch.full((1, *shape), float(self.value))


def affine(denoise, pair_of_levels, renoise, law=LAW):
    """The step of linear-Gaussian data is A·x + b + c·z; read A, b, c off three runs of it."""

    def run(x, z):
        x = torch.full((1, 1), x, dtype=torch.float64)
        return sample(denoise, x, pair_of_levels, FirstOrder(), renoise=renoise, noise=Fixed(z)).item()

    b = run(0.0, 0)
    return run(1.0, 0) - b, b, run(0.0, 1) - b


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_is_the_ddpm_posterior(schedule):
    """q(x_s | x_t, x₀) by conditioning the joint Gaussian of a Markov chain, as matrices."""
    schedule, x0 = SCHEDULES[schedule], -0.8
    for t, s in ((0.9, 0.7), (0.5, 0.1)):
        high, low = (Level(time(one), schedule(time(one))) for one in (t, s))
        (a, b), (c, d) = ([part.item() for part in level.row] for level in (high, low))
        r = a / c
        build = np.array([[d, 0], [r * d, math.sqrt(b**2 - (r * d) ** 2)]])  # (x_s, x_t) - mean, from two unit noises
        covariance = build @ build.T
        gain = covariance[0, 1] / covariance[1, 1]
        variance = covariance[0, 0] - gain * covariance[1, 0]
        point = Gaussian(x0, 0.0)
        found = affine(at(schedule, point), (high, low), Ancestral(1.0))
        assert found == pytest.approx((gain, c * x0 - gain * a * x0, math.sqrt(variance)), rel=1e-6)
        none = affine(at(schedule, point), (high, low), Ancestral(0.0))
        assert none == pytest.approx(affine(at(schedule, point), (high, low), Keep()), abs=1e-12)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_is_that_of_the_paper(eta):
    """Song et al. 2021, eq. 16: σ(η) = η √((1-ᾱ')/(1-ᾱ)) √(1 - ᾱ/ᾱ')."""
    (_, (a, b)), (_, (c, d)) = high, low = levels(VP(), 1)
    wanted = eta * torch.sqrt((1 - c**2) / (1 - a**2)) * torch.sqrt(1 - a**2 / c**2)
    assert affine(at(VP()), (high, low), Ancestral(eta))[2] == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_samples_have_the_moments_of_the_data(schedule, eta):
    """Mean and variance carried through the affine steps, with no sampling error: they converge at first order."""
    schedule, errors = SCHEDULES[schedule], []
    for steps in (100, 200):
        grid = levels(schedule, steps)
        (a, b), (c, d) = grid[0].row, grid[-1].row
        mean, variance = (a * LAW.means[0]).item(), ((a * LAW.std) ** 2 + b**2).item()
        for leg in pairwise(grid):
            slope, shift, fresh = affine(at(schedule), leg, Ancestral(eta))
            mean, variance = slope * mean + shift, slope**2 * variance + fresh**2
        wanted = math.sqrt((c * LAW.std) ** 2 + d**2)
        assert mean == pytest.approx((c * LAW.means[0]).item(), abs=0.02)
        errors.append(abs(math.sqrt(variance) / wanted - 1))
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.25)


def test_full_renoise_is_multistep_consistency_sampling():
    """Song et al. 2023, algorithm 1: x <- f(α x + σ z, τ); the exact f gives the data's law."""
    schedule, noise = Linear(), Noise(range(4000))
    grid = one_of_each(Grid)["uniform"].levels(schedule, 4)
    x = noise.normal((1,), Stream.START).double()

    def f(x, t, cond=None):
        return LAW.clean(x, schedule(t))

    wanted = f(x, grid[0].t).x0
    for index, (t, (a, b)) in enumerate(grid[1:-1]):
        z = noise.normal((1,), Stream.RENOISE + index).double()
        wanted = f(a * wanted + b * z, t).x0
    found = sample(f, x, grid, FirstOrder(), renoise=Full(), noise=noise)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert found.mean().item() == pytest.approx(0.7, abs=4 * 0.4 / math.sqrt(4000))
    assert found.std().item() == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("renoise", [Ancestral(1.0), Full()])
def test_fresh_noise_needs_a_noise(renoise):
    grid = levels(VP(), 2)
    with pytest.raises(ConfigError, match="give sample\\(\\) a Noise"):
        sample(at(VP()), start(grid[0]), grid, FirstOrder(), renoise=renoise)


def test_renoise_keeps_the_noise_standard():
    for renoise in one_of_each(Renoise).values():
        share = [renoise.share(high.row, low.row) for high, low in pairwise(levels(VP(), 8))]
        assert all(0 <= rho <= 1 for rho in share)


@pytest.mark.parametrize("refused", [lambda: Heun(V()), lambda: Multistep(V()), lambda: Multistep(order=5)])
def test_a_frame_must_not_depend_on_time(refused):
    with pytest.raises(ConfigError, match="wanted"):
        refused()


def test_log_snr_grid_is_even_and_karras_is_eq_5():
    grids = one_of_each(Grid)
    clock = torch.stack([log_snr(level.row) for level in grids["log_snr"].levels(VP(), 9)[:-1]])
    torch.testing.assert_close(clock.diff(), clock.diff()[:1].expand(8), rtol=1e-6, atol=1e-6)
    karras = type(grids["karras"])(rho=7.0, last=0.0).levels(VE(), 18)
    i = np.arange(18)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert np.allclose([level.row.b for level in karras[:-1]], wanted, rtol=1e-6)


@pytest.mark.parametrize("grid", one_of_each(Grid))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grids_start_at_first_fall_and_end_clean(schedule, grid):
    for first, steps in ((first, steps) for first in (1.0, 0.9) for steps in (1, 2, 5, 50)):
        found = one_of_each(Grid)[grid].levels(SCHEDULES[schedule], steps, first)
        t = torch.stack([level.t for level in found])
        assert len(found) == steps + 1 and t[0] == first and (t.diff() < 0).all()
        assert found[-1].clean and found[-1].row.a == 1
        assert not any(level.clean for level in found[:-1])
