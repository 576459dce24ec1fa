"""The oracle itself, against quadrature, finite differences, an integrator and conditioning by brute force."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from diffusion_core.pair import Pair
from diffusion_core.schedule import VE, VP, Cosine, Linear, Schedule
from diffusion_core.target import Target
from tests.core.oracle import CLEAN, Gaussian, LinearGaussian, Mixture, one_of_each, perfect, slope, time

LAWS = {"mixture": Mixture(), "wide": Mixture((-0.8, 0.1, 0.9), (0.4, 0.1, 0.5), 0.6), "gaussian": Gaussian()}
LEVELS = [(0.9, 0.3), (0.5, 0.8), (0.05, 1.0), (1.0, 4.0)]
X = torch.linspace(-2.4, 3.1, 12, dtype=torch.float64)[:, None]
MEAN = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
ROOT = torch.tensor([[0.9, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.5, 0.5, 0.3]], dtype=torch.float64)
WHOLE = LinearGaussian(MEAN, ROOT @ ROOT.T)
PAIR = Pair(torch.full((1, 1), 2.0).double(), torch.full((1, 1), -1.0).double())
PICTURES = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=LAWS)
def law(request):
    return LAWS[request.param]


def density(law, x0, labels=False):
    """p(x₀) by scipy, one component a row if `labels`."""
    parts = [w * stats.norm(m, law.std).pdf(x0) for w, m in zip(law.weights, law.means, strict=True)]
    return np.array(parts) if labels else sum(parts)


def integral(law, x, level, of, label=None):
    """∫ of(x₀)·p(x₀)·N(x; αx₀, σ²) dx₀ by the trapezoid rule, which is exact to rounding for what decays this way."""
    a, b = level
    x0 = np.linspace(-12, 12, 40_001)
    p = density(law, x0) if label is None else density(law, x0, True)[label]
    return integrate.trapezoid(of(x0) * p * stats.norm(a * x0, b).pdf(x), x0)


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_means_and_density_are_integrals(law, level):
    a, b = level
    for label in (None, *range(len(law.means))):
        labels = None if label is None else torch.full((len(X),), label)
        pair = law.pair(X, level, labels)
        for x, x0, eps in zip(X[:, 0].numpy(), pair.x0[:, 0], pair.eps[:, 0], strict=True):
            whole = integral(law, x, level, np.ones_like, label)
            mean = integral(law, x, level, lambda x0: x0, label) / whole
            assert x0.item() == pytest.approx(mean, abs=1e-9)
            assert eps.item() == pytest.approx((x - a * mean) / b, abs=1e-8)
            if label is None:
                assert law.log_density(torch.tensor([[x]]), level).item() == pytest.approx(math.log(whole), abs=1e-9)


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_score_is_the_slope_of_the_density(law, level):
    wanted = slope(lambda x: law.log_density(x, level), X)
    torch.testing.assert_close(law.score(X, level), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guided_score_is_that_of_the_sharpened_density(law, scale):
    """∇[ln p(x) + w·ln p(class | x)], the definition that classifier-free guidance comes from; -1 is no class."""
    level, labels = LEVELS[0], torch.tensor([0, -1, len(law.means) - 1] * 4)

    def sharpened(x):
        told = law.responsibilities(x, level).log()[torch.arange(12), 0, labels.clamp_min(0)][:, None]
        return law.log_density(x, level) + scale * torch.where(labels[:, None] < 0, 0, told)

    wanted = slope(sharpened, X)
    torch.testing.assert_close(law.guided_score(X, level, labels, scale), wanted, rtol=1e-8, atol=1e-8)


def followed(velocity, x, start, end):
    """dx/dt = velocity(x, t) from start to end by an integrator of eighth order."""
    solved = integrate.solve_ivp(
        lambda t, y: velocity(torch.from_numpy(y).reshape(x.shape), t).flatten().numpy(),
        (start, end),
        x.flatten().numpy(),
        "DOP853",
        rtol=1e-12,
        atol=1e-12,
    )
    return torch.from_numpy(solved.y[:, -1]).reshape(x.shape)


@pytest.mark.parametrize("name", [*LAWS, "whole"])
@pytest.mark.parametrize("schedule", [VP(), Linear(), Cosine(), VE()], ids=str)
def test_flow_follows_the_probability_flow(schedule, name):
    """dx/dt = α'·E[x₀ | x] + σ'·E[ε | x], down to the clean picture where the schedule reaches it, and back up."""
    law, x = (WHOLE, PICTURES) if name == "whole" else (LAWS[name], X)
    alpha, sigma = schedule.alpha, schedule.sigma

    def velocity(x, t):
        pair = law.pair(x, (alpha(time(t)).item(), sigma(time(t)).item()))
        h = 2e-6
        return slope(alpha, time(t), h).item() * pair.x0 + slope(sigma, time(t), h).item() * pair.eps

    high, low = ((alpha(time(t)).item(), sigma(time(t)).item()) for t in (0.8, 0.05))
    down = followed(velocity, x, 0.8, 0.05)
    torch.testing.assert_close(law.flow(x, high, low), down, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(law.flow(law.flow(x, high, low), low, high), x, rtol=1e-9, atol=1e-9)
    clean = law.clean(x, low)
    torch.testing.assert_close(clean.x0, law.flow(x, low, CLEAN), rtol=0, atol=0)
    torch.testing.assert_close(low[0] * clean.x0 + low[1] * clean.eps, x, rtol=1e-12, atol=1e-12)


def test_one_component_flows_as_a_gaussian():
    """Quantiles by bisection against the formula, far into both tails, with levels of one's own for every sample."""
    at, to = (time(*[0.8] * 11, 0.0), time(*[0.6] * 11, 1.0)), (time(*[1.0] * 12), time(*[0.01] * 12))
    x = 0.8 * 0.7 + math.hypot(0.8 * 0.4, 0.6) * torch.linspace(-9, 9, 12, dtype=torch.float64)[:, None]
    found, wanted = Mixture((0.7,), (1.0,), 0.4).flow(x, at, to), Gaussian().flow(x, at, to)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_linear_gaussian_is_its_density(level):
    a, b = level
    cov = a**2 * (ROOT @ ROOT.T).numpy() + b**2 * np.eye(3)
    wanted = stats.multivariate_normal(a * MEAN.numpy(), cov).logpdf(PICTURES.numpy())
    torch.testing.assert_close(WHOLE.log_density(PICTURES, level), torch.from_numpy(wanted), rtol=1e-10, atol=1e-10)
    steps = torch.eye(3, dtype=torch.float64)
    slopes = [slope(lambda h, v=v: WHOLE.log_density(PICTURES + h * v, level), time(0.0)) for v in steps]
    torch.testing.assert_close(WHOLE.score(PICTURES, level), torch.stack(slopes, 1), rtol=1e-8, atol=1e-8)
    pair = WHOLE.pair(PICTURES, level)  # Tweedie: x + σ²·score is α·E[x₀ | x]
    torch.testing.assert_close(a * pair.x0, PICTURES + b**2 * torch.stack(slopes, 1), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(a * pair.x0 + b * pair.eps, PICTURES, rtol=1e-12, atol=1e-12)


def test_what_is_seen_conditions_the_law():
    """By regression: of the joint law of (x₀, y), the mean and covariance of x₀ at a given y, from its precision."""
    matrix, std, y = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]]).double(), 0.3, time(0.4, -1.1)
    found = WHOLE.given(matrix, y, std)
    build = torch.cat((torch.eye(3).double(), matrix))
    joint = build @ WHOLE.covariance @ build.T + torch.diag(time(0, 0, 0, std**2, std**2))
    precision = torch.linalg.inv(joint)
    covariance = torch.linalg.inv(precision[:3, :3])
    mean = MEAN - covariance @ precision[:3, 3:] @ (y - matrix @ MEAN)
    torch.testing.assert_close(found.covariance, covariance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-9)


def test_what_is_seen_conditions_a_mixture():
    """Bayes' rule for the density: ln p(x₀ | y) - ln p(x₀) - ln N(y; x₀, std²) is one constant."""
    law, y, std = LAWS["wide"], torch.tensor([[0.4], [-2.0]]).double(), 0.5
    x0 = torch.linspace(-1.5, 1.5, 7).double().expand(2, 7)
    seen = law.observed(y, std)
    noise = torch.from_numpy(stats.norm(x0.numpy(), std).logpdf(y.numpy()))
    constant = seen.log_density(x0, CLEAN) - law.log_density(x0, CLEAN) - noise
    torch.testing.assert_close(constant, constant[:, :1].expand(2, 7), rtol=1e-10, atol=1e-10)
    dense = torch.linspace(-12, 12, 20_001).double().expand(2, -1)
    whole = torch.trapezoid(seen.log_density(dense, CLEAN).exp(), dense)
    torch.testing.assert_close(whole, torch.ones(2).double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", Target.kinds())
def test_the_perfect_network_says_the_target(target):
    """Each target from its definition, in numbers: what is said at α, σ with rates α', σ' for known x₀ and ε."""
    schedule, t = Linear(), time(0.25)
    denoiser = perfect(Mixture(), schedule, target, answer=lambda x, level, labels=None: PAIR, first=0.9)
    wanted = {"x0": 2.0, "eps": -1.0, "flow": -3.0, "v": 0.75 * -1 - 0.25 * 2, "velocity": -3.0, "score": 4.0}
    wanted["karras"] = (2 - 0.25 / (1 / 9 + 0.25) * (2 - 1 / 3)) / (1 / 6 / math.sqrt(1 / 9 + 0.25))
    assert set(wanted) == set(Target.kinds())
    said = denoiser.read(torch.ones(1, 1).double(), t[None], None).reading
    assert said.item() == pytest.approx(wanted[target], rel=1e-9)


def test_one_of_each_is_every_kind():
    assert set(one_of_each(Schedule)) == set(Schedule.kinds())
    assert all(type(made) is Schedule.kinds()[name] for name, made in one_of_each(Schedule).items())
