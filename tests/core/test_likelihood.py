"""ln p(x) by the probability-flow ODE against the density of mixtures, with the exact and the estimated trace."""

import math

import pytest
import torch
from scipy import stats

from diffusion_core.errors import ConfigError, DataError
from diffusion_core.likelihood import Prior, log_likelihood
from diffusion_core.noise import Noise
from diffusion_core.pair import Pair
from diffusion_core.schedule import VE, VP, Cosine, Linear, Shifted
from tests.core.oracle import Gaussian, Mixture, perfect

LAW = Mixture()
MEAN = sum(w * m for w, m in zip(LAW.weights, LAW.means, strict=True))
STD = math.sqrt(LAW.std**2 + sum(w * (m - MEAN) ** 2 for w, m in zip(LAW.weights, LAW.means, strict=True)))
KNOWN = Prior(MEAN, STD)
X = torch.linspace(-2.0, 2.5, 32, dtype=torch.float64).reshape(8, 1, 2, 2)


def log_density(x, law=LAW):
    """Σ over pixels of ln Σᵢ wᵢ N(x; mᵢ, s²), by scipy."""
    parts = [w * stats.norm(m, law.std).pdf(x.numpy()) for w, m in zip(law.weights, law.means, strict=True)]
    return torch.as_tensor(sum(parts)).log().flatten(1).sum(1)


def off(found, x=X, law=LAW):
    """The largest error in nats a dimension."""
    return ((found - log_density(x, law)).abs().max() / x[0].numel()).item()


@pytest.mark.parametrize(
    ("schedule", "target", "first"),
    [
        (Linear(), "velocity", 1.0),
        (Linear(), "eps", 0.97),
        (Shifted(Linear(), 3.0), "v", 1.0),
        (Cosine(), "x0", 1.0),
        (VP(), "eps", 1.0),
        (VP(), "v", 1.0),
        (VP(), "score", 1.0),
        (VE(5e-4), "karras", 1.0),  # its own default ends at noise of 0.002, which tails show to 8e-5
        (VE(5e-4), "score", 1.0),
    ],
)
def test_is_the_density_of_a_mixture(schedule, target, first):
    """Within 1e-3 nats a dimension everywhere, tails included, and at fourth order in the steps."""
    denoiser = perfect(LAW, schedule, target, first=first)
    errors = [off(log_likelihood(denoiser, X, steps=steps, prior=KNOWN)) for steps in (16, 32, 64)]
    assert errors[0] > 8 * errors[1] and errors[1] > 4 * errors[2] and errors[2] < 1e-4, errors


def test_the_default_prior_is_the_start_of_the_sampler():
    """Exact for a schedule that ends in pure noise; else it leaves out KL = SNR·E[x₀²]/2 on average, and no more."""
    data = torch.where(torch.rand(512, generator=torch.Generator().manual_seed(0)) < LAW.weights[0], *LAW.means)
    data = data.reshape(128, 1, 2, 2).double()
    data += LAW.std * torch.randn(data.shape, generator=torch.Generator().manual_seed(1)).double()
    assert off(log_likelihood(perfect(LAW, Linear(), "v"), data), data) < 1e-3
    found = log_likelihood(perfect(LAW, VP(), "v"), data)
    assert 1e-3 < off(found, data) < 3e-2
    assert abs((found - log_density(data)).mean().item()) / 4 < 1e-3


def test_a_label_asks_for_the_density_of_its_class():
    labels = torch.arange(8) % 3 - 1
    found = log_likelihood(perfect(LAW, Linear(), "v"), X, {"label": labels})
    for label in (0, 1):
        law = Mixture((LAW.means[label],), (1.0,), LAW.std)
        assert off(found[labels == label], X[labels == label], law) < 1e-3
    assert off(found[labels == -1], X[labels == -1]) < 1e-3


def test_both_traces_agree_where_the_denoiser_is_linear():
    """A diagonal Jacobian leaves random signs no variance: one probe is exact."""
    denoiser = perfect(Gaussian(), Cosine(), "x0")
    exact = log_likelihood(denoiser, X)
    probed = log_likelihood(denoiser, X, probes=1, noise=Noise(0, torch.arange(8)))
    torch.testing.assert_close(probed, exact, rtol=0, atol=1e-10)
    assert off(exact, law=Gaussian()) < 1e-3


def test_a_picture_counts_as_clean_when_it_is_told_to():
    """Stopping at log-SNR c finds the density of data with noise of variance exp(-c) added, and no other scale."""
    found = log_likelihood(perfect(Gaussian(), VP(), "v"), X, clean=2.0, prior=Prior(0.7, 0.4))
    assert off(found, law=Gaussian(0.7, math.sqrt(0.4**2 + math.exp(-2.0)))) < 1e-4


def turned(law):
    """A law whose pixels depend on each other, as a turn of independent ones, and its perfect denoiser's answer."""
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double()).Q

    def answer(x, level, labels=None):
        inner = law.pair((x.flatten(1) @ turn).reshape(x.shape), level)
        return Pair(*((part.flatten(1) @ turn.T).reshape(x.shape) for part in (inner.x0, inner.eps)))

    return turn, answer


def test_hutchinsons_trace_has_no_bias():
    """The mean of single probes is the exact answer within its standard error, and the exact one is the density."""
    turn, answer = turned(LAW)
    x = (X[2:4].flatten(1) @ turn.T).reshape(2, 1, 2, 2)
    denoiser = perfect(LAW, Linear(), "v", answer=answer)
    exact = log_likelihood(denoiser, x, steps=24)
    assert ((exact - log_density(X[2:4])).abs().max() / 4).item() < 5e-3
    count = 256
    probed = [
        log_likelihood(
            denoiser,
            one.expand(count, 1, 2, 2),
            steps=24,
            probes=1,
            noise=Noise(0, torch.arange(count) + place * count),
        )
        for place, one in enumerate(x)
    ]
    for many, one in zip(probed, exact, strict=True):
        error = many.std() / count**0.5
        assert many.std() > 0.05 and abs(many.mean() - one) < 3 * error
    several = log_likelihood(denoiser, x[:1].expand(64, 1, 2, 2), steps=24, probes=8, noise=Noise(1, torch.arange(64)))
    assert several.std() < probed[0].std() / 2  # √8 times less


def test_is_a_density_even_where_the_denoiser_is_wrong():
    """The flow of any denoiser is one to one, so its density has mass one: what a sampler makes, not what data are."""
    x = torch.linspace(-9, 9, 721, dtype=torch.float64)

    def answer(x, level, labels=None):
        return Pair(0.8 * torch.sin(x), (x - level[0] * 0.8 * torch.sin(x)) / level[1])

    found = log_likelihood(perfect(LAW, VP(), "x0", answer=answer), x.reshape(-1, 1, 1, 1), steps=96, clean=8.0)
    assert torch.trapezoid(found.exp(), x).item() == pytest.approx(1, abs=2e-3)
    assert (found - log_density(x.reshape(-1, 1, 1, 1))).abs().max() > 1


def test_float32_pictures_are_measured_as_well():
    denoiser = perfect(LAW, Linear(), "v").float()
    found = log_likelihood(denoiser, X.float())
    assert found.dtype == torch.float64 and not found.requires_grad
    assert off(found, X.float().double()) < 1e-3


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("steps 0", {"steps": 0}),
        ("probes -1", {"probes": -1}),
        ("need a Noise", {"probes": 1}),
        ("clean -9", {"clean": -9.0}),
    ],
)
def test_impossible_numbers_are_refused(message, asked):
    with pytest.raises(ConfigError, match=message):
        log_likelihood(perfect(LAW, VE(0.02, 20.0), "x0"), X, **asked)


def test_a_picture_that_is_not_finite_is_refused():
    with pytest.raises(DataError, match="x holds 32 numbers"):
        log_likelihood(perfect(LAW, Linear(), "v"), X * math.nan)
    with pytest.raises(ConfigError, match="std"):
        Prior(std=-1.0)
