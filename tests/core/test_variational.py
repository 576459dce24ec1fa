"""The variational bound: by numeric integration, by matrix algebra, and on Gaussian data, whose entropy is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from diffusion_core.denoiser import Denoiser
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.grid import LogSnr, Uniform
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch, Look, Regression
from diffusion_core.pair import Pair
from diffusion_core.schedule import CLEAN, VP, Cosine, Linear
from diffusion_core.target import EPS
from diffusion_core.variational import BIT, Chain, Hybrid, bound, gaussian_cost, gaussian_kl
from diffusion_core.weighting import Flat, WholeSteps
from tests.core.oracle import Gaussian, perfect, time

LAW = Gaussian()
NODES = torch.tensor(list(itertools.product((-(3**0.5), 0.0, 3**0.5), repeat=2)), dtype=torch.float64)
ENTROPY = stats.norm(*LAW.means, LAW.std).entropy() / BIT
SHARES = torch.tensor([a * b for a, b in itertools.product((1 / 6, 2 / 3, 1 / 6), repeat=2)], dtype=torch.float64)


def nodes(level, spread=None):
    """All of x₀ ~ LAW and ε in nine points, exact for cubic functions, and what the perfect denoiser sees in them."""
    pair = Pair(LAW.means[0] + LAW.std * NODES[:, :1], NODES[:, 1:])
    x = level.row.a * pair.x0 + level.row.b * pair.eps
    return x, pair, LAW.pair(x, (time(level.row.a), time(level.row.b)))._replace(spread=spread)


def expected(chain, step, spread=None):
    x, pair, seen = nodes(chain.levels[step], spread)
    return (SHARES * chain.cost(torch.full((9,), step), x, pair, seen)[:, 0]).sum()


def test_kl_and_cost_by_numeric_integration():
    for mean, log_var, other, other_log_var in ((0.0, 0.0, 0.5, -1.0), (1.3, -2.0, 1.0, 0.7)):
        p, q = stats.norm(mean, math.exp(log_var / 2)), stats.norm(other, math.exp(other_log_var / 2))
        wanted = integrate.quad(lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -12, 12)[0]
        found = gaussian_kl(time(mean), time(log_var), time(other), time(other_log_var))
        assert found.item() == pytest.approx(wanted, abs=1e-8)
        assert gaussian_cost(time(0.4), time(mean), time(log_var)).item() == pytest.approx(-p.logpdf(0.4), rel=1e-12)


@pytest.mark.parametrize("schedule", [VP(), Cosine(), Linear()])
def test_a_step_costs_what_conditioning_by_matrix_algebra_says(schedule):
    """q(xₛ | xₜ, x₀) from the joint covariance of (xₛ, xₜ) given x₀; p has the denoiser's x̂₀ in the place of x₀."""
    chain = Chain(Uniform().levels(schedule, 5))
    x0, seen, x = 0.3, -0.2, 0.9
    for step in range(4):
        (at, to) = (chain.levels[step].row, chain.levels[step + 1].row)
        kept = at.a / to.a
        covariance = np.array([[to.b**2, kept * to.b**2], [kept * to.b**2, at.b**2]])
        variance = covariance[0, 0] - covariance[0, 1] ** 2 / covariance[1, 1]
        mean, wrong = (to.a * one + covariance[0, 1] / covariance[1, 1] * (x - at.a * one) for one in (x0, seen))
        p, q = stats.norm(mean, variance**0.5), stats.norm(wrong, variance**0.5)
        wanted = p.expect(lambda y, p=p, q=q: p.logpdf(y) - q.logpdf(y))
        pair, guess = (Pair(time([one]), time([0.0])) for one in (x0, seen))
        assert chain.cost(torch.tensor([step]), time([x]), pair, guess).item() == pytest.approx(wanted, rel=1e-6)


def test_a_learned_variance_lies_between_the_published_bounds():
    """Nichol and Dhariwal 2021, eq. 15: β̃ and β of every step, with β̃ of the second in the first, where it is zero."""
    bar = VP()(torch.arange(6, dtype=torch.float64) / 5).a ** 2
    beta = 1 - bar[1:] / bar[:-1]
    smaller = (1 - bar[:-1]) / (1 - bar[1:]) * beta
    smaller[0] = smaller[1]
    chain = Chain(Uniform().levels(VP(), 5))
    torch.testing.assert_close(chain.low.flip(0), smaller.log(), rtol=1e-9, atol=0)
    torch.testing.assert_close(chain.high.flip(0), beta.log(), rtol=1e-9, atol=0)


def test_the_first_term_is_the_law_of_the_start():
    """L_T = KL(N(αx₀, σ²) ‖ N(0, σ²)) = (αx₀)²/(2σ²): what the sampler, which starts from N(0, σ²), leaves out."""
    a, b = VP()(time(1.0))
    found = Chain(Uniform().levels(VP(), 4)).start_cost(time([0.5, -2.0]))
    torch.testing.assert_close(found, (a * time([0.5, -2.0])) ** 2 / (2 * b**2), rtol=1e-9, atol=0)


def in_bits(chain, spreads=None):
    """E[L_T + ... + L_0] over all data and noise, in bits a dimension."""
    _, pair, _ = nodes(chain.levels[0])
    spreads = spreads or [None] * chain.steps
    terms = [expected(chain, step, spread) for step, spread in enumerate(spreads)]
    return ((SHARES * chain.start_cost(pair.x0)[:, 0]).sum() + sum(terms)).item() / BIT


@pytest.mark.parametrize("schedule", [VP(), Linear()])
def test_bits_per_dimension_of_gaussian_data_are_its_entropy(schedule):
    """E[bound] falls to ½ log₂(2πe·s²), at a rate of one over the steps (nine points, no sampling)."""
    coarse, fine = (in_bits(Chain(LogSnr(last=1e-3).levels(schedule, steps))) - ENTROPY for steps in (500, 1000))
    assert coarse > fine > 0 and fine < 0.12
    assert abs(2 * fine - coarse) < 3e-3  # what is left when the chain is made ever longer


@pytest.mark.parametrize(("schedule", "excess"), [(VP(8.0, 8.0), 0.577216 / 2), (Linear(), 0.577216 + math.pi**2 / 12)])
def test_equal_steps_in_time_never_reach_the_entropy_without_a_learned_variance(schedule, excess):
    """Where SNR falls as 1/tᵖ, the n-th step loses half of (1 + 1/n)ᵖ - 1 - p·ln(1 + 1/n): Euler's γ at p = 1."""
    assert (in_bits(Chain(Uniform().levels(schedule, 4000))) - ENTROPY) * BIT == pytest.approx(excess, abs=0.03)


def reverse_variance(level, to):
    """Var[xₛ | xₜ] over N(m, s²) data, by conditioning in the joint law of (xₛ, xₜ)."""
    var_s = (to.row.a * LAW.std) ** 2 + to.row.b**2
    var_t = (level.row.a * LAW.std) ** 2 + level.row.b**2
    return var_s - (level.row.a / to.row.a * var_s) ** 2 / var_t


def best_spread(chain, step):
    """The spread at which the variance is that of the true reverse step, (9, 1)."""
    at, to = chain.levels[step], chain.levels[step + 1]
    low, high = chain.low[step].item(), chain.high[step].item()
    return torch.full((9, 1), (math.log(reverse_variance(at, to)) - low) / (high - low), dtype=torch.float64)


@pytest.mark.parametrize("step", [5, 8, 9])
def test_the_best_variance_is_that_of_the_true_reverse_step(step):
    chain = Chain(Uniform().levels(VP(), 10))
    best = best_spread(chain, step).requires_grad_()
    (slope,) = torch.autograd.grad(expected(chain, step, best), best)
    assert abs(slope.sum()) < 1e-10 < 1e-4 < slope.abs().max()
    least, *others = (expected(chain, step, best + off) for off in (0.0, 0.05, -0.05))
    assert least < min(others)


@pytest.mark.parametrize("schedule", [VP(), Cosine(0.1)])
def test_with_the_true_variance_a_chain_of_any_length_is_exact(schedule):
    """The reverse of a Gaussian chain is Gaussian: all that is left is KL(q(x_T) ‖ N(0, σ_T²))."""
    chain = Chain(Uniform().levels(schedule, 5, 0.8))
    a, b = chain.levels[0].row
    start = stats.norm(a * LAW.means[0], math.hypot(a * LAW.std, b))
    left = start.expect(lambda x: start.logpdf(x) - stats.norm(0, b).logpdf(x)) / BIT
    found = in_bits(chain, [best_spread(chain, step) for step in range(5)])
    assert found == pytest.approx(ENTROPY + left, abs=1e-9)


def test_the_bound_of_pictures_is_near_their_code_length():
    """By sampling, in the way a model is measured; the terms stand from L_T down to L_0."""
    count, levels = 1024, LogSnr(last=1e-3).levels(VP(), 200)
    x = LAW.means[0] + LAW.std * torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    found, chain = bound(perfect(LAW, VP(), "eps"), x, levels, Noise(0, torch.arange(count))), Chain(levels)
    assert found.shape == (count, 201) and (found[:, :-1] >= 0).all()
    for step in (0, 50, 150, 199):
        terms = found[:, 1 + step] * BIT
        assert abs(terms.mean() - expected(chain, step)) < 4 * terms.std() / count**0.5
    code = -torch.as_tensor(stats.norm(LAW.means[0], LAW.std).logpdf(x)).flatten(1).mean(1) / BIT
    off = found.sum(1) - code
    assert abs(off.mean() - (in_bits(chain) - ENTROPY)) < 4 * off.std() / count**0.5 < 0.1


class Says(nn.Module):
    """A network of constants: a mean and a variance for every number."""

    def __init__(self):
        super().__init__()
        self.mean, self.raw = nn.Parameter(torch.full((1, 1, 1), 0.1)), nn.Parameter(torch.full((1, 1, 1), 0.2))

    def forward(self, x, c, cond):
        return torch.cat([self.mean.expand_as(x), self.raw.expand_as(x)], 1)


IDS = torch.arange(64)
BATCH = Batch(torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(1)), {}, IDS)


def gradients(objective):
    net = objective.denoiser.net
    ((_, loss),) = objective.losses(BATCH, 0, Noise(0, IDS))
    return loss, torch.autograd.grad(loss, (net.mean, net.raw), allow_unused=True)


def test_the_bound_teaches_the_variance_and_not_the_mean():
    """Nichol and Dhariwal 2021, section 3.1: the mean learns from L_simple alone, to the last bit."""
    denoiser = Denoiser(Says(), VP(), EPS(), variance="learned")
    simple, (mean, nothing) = gradients(Regression(denoiser, WholeSteps(50), Flat(), 0.1))
    hybrid, (same, raw) = gradients(Hybrid(denoiser, 50, share=0.5))
    assert torch.equal(mean, same) and mean.abs() > 0
    assert not nothing.any() and raw.abs() > 1e-3
    assert hybrid != simple


def test_the_hybrid_loss_adds_the_bound_of_the_whole_chain():
    """Its mean over steps is L_simple + λ(L_0 + ... + L_{T-1}), in bits a dimension."""
    steps, share = 6, 0.3
    denoiser = Denoiser(Says(), VP(), EPS(), variance="learned")
    hybrid, simple = Hybrid(denoiser, steps, share=share), Regression(denoiser, WholeSteps(steps), Flat())
    chain = Chain(Uniform().levels(VP(), steps))
    x = BATCH.x[:1].double()
    pair, added, wanted = Pair(x, x.flip(3)), 0.0, 0.0
    for step, level in enumerate(chain.levels[:-1]):
        noisy = level.row.a * pair.x0 + level.row.b * pair.eps
        seen, t = denoiser(noisy, time(level.t)), time([level.t])
        look = Look(t, noisy, pair, seen, EPS()(VP(), t))
        added += (hybrid.each(look) - simple.each(look)).item() / steps
        wanted += share * chain.cost(torch.tensor([step]), noisy, pair, seen).mean().item() / BIT
    assert added == pytest.approx(wanted, rel=1e-9)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="variance 'learned'"):
        Hybrid(Denoiser(nn.Identity(), VP(), EPS()))
    with pytest.raises(ConfigError, match="share"):
        Hybrid(Denoiser(nn.Identity(), VP(), EPS(), variance="learned"), share=0.0)
    for levels in ((VP().level(1.0), CLEAN), (VP().level(1.0), VP().level(0.5), VP().level(0.1))):
        with pytest.raises(ConfigError, match="the last clean"):
            Chain(levels)
    with pytest.raises(RefusedError, match="no forward jump"):
        Chain((VP().level(0.5), VP().level(0.8), CLEAN))
