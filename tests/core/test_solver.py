"""Solvers against the exact probability flow of Gaussian data, and against the published update rules."""

import math
from itertools import pairwise

import pytest
import torch

from diffusion_core.denoiser import Denoiser, Plain
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.grid import Grid
from diffusion_core.multistep import Multistep
from diffusion_core.sampler import Sampling, sample
from diffusion_core.schedule import VE, VP, Linear, Schedule
from diffusion_core.solver import FirstOrder, Heun, SingleStep, Solver
from diffusion_core.stochastic import Churn, Langevin
from diffusion_core.target import EPS, FLOW, X0, V
from diffusion_core.walk import walk
from tests.core.oracle import PURE_NOISE, Mixture, one_of_each
from tests.core.paths import LAW, SOLVERS, at, levels, start

SCHEDULES = one_of_each(Schedule)


def test_every_solver_is_tried():
    assert {type(one) for one in SOLVERS.values()} | {Churn, Langevin} == {
        made for made in Solver.kinds().values() if made.__module__.startswith("diffusion_core.")
    }


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["vp", "edm", "linear"])
def test_lands_on_the_exact_flow_at_its_order(schedule, solver):
    """Started by itself, a multistep solver is of second order or just small; `make conformance` measures the rest."""
    schedule, solver = SCHEDULES[schedule], SOLVERS[solver]
    errors = []
    for steps in (80, 160):
        grid = levels(schedule, steps)
        x = start(grid[0])
        wanted = LAW.flow(x, grid[0].row, grid[-1].row)
        errors.append((walk(at(), x, grid, solver, schedule) - wanted).abs().max().item())
    assert errors[1] < 1e-2
    if solver.fewest_steps > 2:
        assert errors[1] < 1e-4
    else:
        least = min(solver.order_on(schedule), 2) if solver.fewest_steps > 1 else solver.order_on(schedule)
        assert math.log2(errors[0] / errors[1]) >= least - 0.25


LEAVERS = [FirstOrder(), Heun(X0()), Heun(FLOW()), SingleStep(X0(), 2), SingleStep(X0(), 3), SOLVERS["UniPC-2"]] + [
    Multistep(frame, clock, 3) for frame in (X0(), EPS(), FLOW()) for clock in ("t", "log_snr", "ratio", "step")
]


@pytest.mark.parametrize("solver", LEAVERS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_is_finite_from_pure_noise_to_clean(solver, schedule):
    """Log-SNR and noise ratio are infinite at the ends of some schedules; a picture never is."""
    schedule = SCHEDULES[schedule]
    for grid in one_of_each(Grid).values():
        for steps in (1, 2, 7):
            try:
                path = grid.levels(schedule, steps)
            except RefusedError:
                continue
            if any(low.log_snr > high.log_snr for low, high in pairwise(path[::-1])):
                continue  # goes up, which draws noise
            found = walk(at(), start(path[0]).float(), path, solver, schedule)
            assert found.isfinite().all(), (grid, steps)
            if getattr(solver, "frame", X0()) != EPS():  # held noise is amplified where there is hardly a signal
                assert (found - LAW.means[0]).abs().max() < 12 * LAW.std, (grid, steps)


@pytest.mark.parametrize("solver", [Heun(EPS()), SingleStep(EPS(), 2), SOLVERS["PNDM (PLMS)"]])
def test_held_noise_cannot_leave_pure_noise(solver):
    for schedule in (SCHEDULES[name] for name in PURE_NOISE):
        path = one_of_each(Grid)["uniform"].levels(schedule, 4)
        with pytest.raises(RefusedError, match="cannot leave t = 1 .*use frame x0 or flow"):
            walk(at(), start(path[0]), path, solver, schedule)


@pytest.mark.parametrize("solver", SOLVERS)
def test_calls_are_counted_as_they_are_made(solver):
    made = []

    def denoise(x, level):
        made.append(level.t)
        return LAW.pair(x, level.row)

    solver = SOLVERS[solver]
    path = one_of_each(Grid)["uniform"].levels(Linear(), 5, 0.9)
    walk(denoise, start(path[0]), path, solver, Linear())
    assert solver.calls(5) == len(made)
    assert Heun().calls(18) == 35  # Karras et al. 2022, section 5


class TestPublishedRules:
    """A run of each named one-step sampler, from the formula in its paper, on data where it matters: a mixture."""

    law = Mixture()
    x = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def same(self, schedule, solver, wanted, steps=6):
        found = walk(at(self.law), self.x, levels(schedule, steps), solver, schedule)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)

    def test_ddim(self):
        """Song et al. 2021, eq. 12: x' = √ᾱ' (x - √(1-ᾱ) ε)/√ᾱ + √(1-ᾱ') ε."""
        x = self.x
        for (_, (a, b)), (_, (c, d)) in pairwise(levels(VP(), 6)):
            eps = self.law.pair(x, (a, b)).eps
            x = c * (x - b * eps) / a + d * eps
        self.same(VP(), FirstOrder(), x)

    def test_euler_on_the_straight_path(self):
        x = self.x
        for (t, level), (s, _) in pairwise(levels(Linear(), 6)):
            pair = self.law.pair(x, level)
            x = x + (s - t) * (pair.eps - pair.x0)
        self.same(Linear(), FirstOrder(), x)

    def test_edm_heun(self):
        """Karras et al. 2022, algorithm 1: d = (x - D)/σ, trapezoid in σ."""
        x = self.x
        for (_, (_, sigma)), (_, (one, to)) in pairwise(levels(VE(), 6)):
            d = (x - self.law.pair(x, (one, sigma)).x0) / sigma
            trial = x + (to - sigma) * d
            there = (trial - self.law.pair(trial, (one, to)).x0) / to
            x = x + (to - sigma) * (d + there) / 2
        self.same(VE(), Heun(EPS()), x)

    def dpm(self, order):
        """DPM-Solver-2 and -3 on VP; λ = ln(α/σ) is inverted by its quadratic, so nothing of the schedule is used."""

        def place(half):  # ln α = -ln(1 + e^{-2λ})/2
            a = 1 / math.sqrt(1 + math.exp(-2 * half))
            return a, math.sqrt(1 - a * a)

        def eps(y, at):
            return self.law.pair(y, at).eps

        x = self.x
        for (_, (a, b)), (_, (c, d)) in pairwise(levels(VP(), 6)):
            low, high = math.log(a / b), math.log(c / d)
            h, first = high - low, eps(x, (a, b))
            if order == 2:
                p, q = place(low + h / 2)
                u = p / a * x - q * math.expm1(h / 2) * first
                x = c / a * x - d * math.expm1(h) * eps(u, (p, q))
                continue
            (p, q), (r, s) = place(low + h / 3), place(low + 2 * h / 3)
            u = p / a * x - q * math.expm1(h / 3) * first
            one = eps(u, (p, q)) - first
            u = r / a * x - s * math.expm1(2 * h / 3) * first - s * 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * one
            two = eps(u, (r, s)) - first
            x = c / a * x - d * math.expm1(h) * first - d * 1.5 * (math.expm1(h) / h - 1) * two
        return x

    @pytest.mark.parametrize("order", [2, 3])
    def test_dpm_solver(self, order):
        """Lu et al. 2022, arXiv 2206.00927, algorithms 1 and 2, with r₁ = 1/2; r₁ = 1/3 and r₂ = 2/3."""
        found = walk(at(self.law), self.x, levels(VP(), 6), SingleStep(EPS(), order), VP())
        torch.testing.assert_close(found, self.dpm(order), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "refused", [lambda: Heun(V()), lambda: SingleStep(V()), lambda: SingleStep(order=4), lambda: Churn(amount=-1)]
)
def test_impossible_solvers_are_refused(refused):
    with pytest.raises(ConfigError, match="wanted"):
        refused()


def test_an_order_the_grid_cannot_carry_is_refused_when_it_is_built():
    for solver, fewest in ((Multistep(order=3), 3), (SOLVERS["UniPC-2"], 2), (Churn(Multistep(order=4)), 4)):
        Sampling(fewest, solver)
        with pytest.raises(RefusedError, match=f"steps {fewest - 1}: .* needs {fewest} readings"):
            Sampling(fewest - 1, solver)


def test_a_network_that_answers_with_its_own_input_is_not_overwritten():
    class Echo(torch.nn.Module):
        def forward(self, x, c, cond=None):
            return x

    denoiser = Denoiser(Echo(), VP(), EPS(), scale=Plain())
    path = levels(VP(), 5)
    x = start(path[0])
    with torch.no_grad():
        quick = sample(denoiser, x, path, FirstOrder())
    torch.testing.assert_close(quick, sample(denoiser, x, path, FirstOrder()), rtol=0, atol=1e-12)
    assert torch.equal(x, start(path[0]))
