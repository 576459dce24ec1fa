"""Denoisers in closed form: what a perfect network would say about data of a known law. No training, no solver.

Data are Gaussian, a mixture of Gaussians, or either as it is once something of it was seen; the noisy sample
αx₀ + σε then has a known density, so posterior mean, score, guided score and the probability flow are formulas.
A law's `level` is (α, σ), as plain numbers or one a sample. Everything is float64 and written from the definitions:
nothing here calls the algebra under test.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from diffusion_core.denoiser import Denoiser, Reader, Said, Time, UnitVariance
from diffusion_core.discrete import ScaledLinearBetas
from diffusion_core.grid import Uniform
from diffusion_core.pair import Pair
from diffusion_core.schedule import Cosine
from diffusion_core.target import X0, Target

EXAMPLES = {
    "shifted": {"inner": Cosine(), "factor": 3.0},
    "tabulated": {"betas": tuple(0.001 + 0.00004 * i for i in range(400))},
    "zero_terminal": {"inner": ScaledLinearBetas()},
    "given": {"at": (0.9, 0.5, 0.2)},
    "resampled": {"inner": Uniform(), "jump": 2, "repeats": 3},
}
PURE_NOISE = {"cosine", "cosine_betas", "linear", "shifted", "zero_terminal"}  # schedules that end without any signal
BLIND = {"eps", "score"}  # targets that say nothing of the picture in pure noise
CLEAN = 1.0, 0.0  # the level of the picture itself
HALVINGS = 100  # more than the digits of a double
FAR = 40.0  # standard deviations beyond which a Gaussian is nothing


def one_of_each(family):
    """A member of every kind of a family, by name, so that a new kind is tested by existing."""
    return {name: made(**EXAMPLES.get(name, {})) for name, made in family.kinds().items()}


def time(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def per_sample(number, like):
    """A plain number, or one a sample in the shape of what it scales."""
    if not isinstance(number, torch.Tensor) or not number.ndim:
        return number
    return number.reshape(number.shape + (1,) * (like.ndim - number.ndim))


class Law:
    """What follows from the probability flow, however it is known."""

    def clean(self, x, at):
        """The exact consistency function: where the flow ends, and the noise that goes with it."""
        x0 = self.flow(x, at, CLEAN)
        return Pair(x0, (x - per_sample(at[0], x) * x0) / per_sample(at[1], x))


@dataclass(frozen=True)
class Mixture(Law):
    """Data Σ wᵢ N(mᵢ, s²), each pixel alike and on its own; a label picks one component, -1 or None all.

    Means and weights are numbers, or tensors where pixels differ.
    """

    means: tuple[float | torch.Tensor, ...] = (-1.0, 1.5)
    weights: tuple[float | torch.Tensor, ...] = (0.3, 0.7)
    std: float = 0.4

    def _noisy(self, level, x):
        """Means and the variance, the same of all, of the components of the noisy sample."""
        a, b = (per_sample(part, x) for part in level)
        return [a * mean for mean in self.means], (a * self.std) ** 2 + b**2

    def _away(self, x, level):
        """How far x lies from the noisy mean of each component, on a last axis, and their variance."""
        means, var = self._noisy(level, x)
        return torch.stack([x - mean for mean in means], -1), var

    def _parts(self, x, level):
        """ln wᵢN(x; αmᵢ, α²s² + σ²) of each component, on a last axis."""
        away, var = self._away(x, level)
        var = torch.as_tensor(var, dtype=torch.float64)[..., None]
        weights = torch.stack([torch.as_tensor(weight, dtype=torch.float64) for weight in self.weights], -1)
        return weights.log() - torch.log(2 * math.pi * var) / 2 - away**2 / (2 * var)

    def log_density(self, x, level):
        """ln p(x) of the noisy sample, pixel by pixel."""
        return self._parts(x, level).logsumexp(-1)

    def responsibilities(self, x, level, labels=None):
        """p(component | x), with a last axis over components; a label makes it certain."""
        found = self._parts(x, level).softmax(-1)
        if labels is None:
            return found
        certain = torch.eye(len(self.means), dtype=x.dtype)[labels.clamp_min(0)]
        certain = certain.reshape(len(x), *(1,) * (x.ndim - 1), -1)
        return torch.where(labels.reshape(-1, *(1,) * x.ndim) < 0, found, certain)

    def score(self, x, level, labels=None):
        """∇ log p(x) by the density of each component."""
        away, var = self._away(x, level)
        return -(self.responsibilities(x, level, labels) * away).sum(-1) / var

    def guided_score(self, x, level, labels, scale):
        """Classifier-free guidance in score, s + w·(s(label) - s): 0 is unconditional, 1 conditional."""
        free = self.score(x, level)
        return free + scale * (self.score(x, level, labels) - free)

    def pair(self, x, level, labels=None):
        """E[x₀ | x] = Σ rᵢ(mᵢ + αs²/(α²s² + σ²)·(x - αmᵢ)), r the responsibilities, and E[ε | x] = -σ·score."""
        a, b = (per_sample(part, x) for part in level)
        away, var = self._away(x, level)
        found = self.responsibilities(x, level, labels)
        gain, off = a * self.std**2 / var, (found * away).sum(-1)
        centre = sum(share * mean for share, mean in zip(found.unbind(-1), self.means, strict=True))
        return Pair(centre + gain * off, b / var * off)

    def flow(self, x, at, to):
        """Where the probability flow carries x: in one dimension paths cannot cross, so quantiles stay quantiles.

        The quantile is counted from the nearer tail, where it keeps its digits, and found again by bisection.
        """

        def tail(y, level, side):  # by erfc: torch's ndtr is 1 + erf, which loses the tail
            means, var = self._noisy(level, y)
            parts = zip(self.weights, means, strict=True)
            return sum(weight / 2 * torch.erfc(side * (mean - y) / (2 * var) ** 0.5) for weight, mean in parts)

        side = torch.where(tail(x, at, 1.0) < 0.5, 1.0, -1.0).to(x)
        wanted = tail(x, at, side)
        means, var = self._noisy(to, x)
        high = sum(abs(mean) for mean in means) + FAR * var**0.5 + torch.zeros_like(x)
        low = -high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            short = side * (tail(middle, to, side) - wanted) < 0
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return (low + high) / 2

    def observed(self, y, std):
        """The law of the data once y = x₀ + std·n was seen, pixel by pixel: a mixture again."""
        var = 1 / (1 / self.std**2 + 1 / std**2)
        means = tuple(var * (mean / self.std**2 + y / std**2) for mean in self.means)
        weights = self._parts(y, (1.0, std)).softmax(-1).unbind(-1)
        return Mixture(means, weights, var**0.5)


class Gaussian(Mixture):
    """Data N(mean, std²), whose probability flow keeps the standardized coordinate."""

    def __init__(self, mean=0.7, std=0.4):
        super().__init__((mean,), (1.0,), std)

    def flow(self, x, at, to):
        ((start,), var), ((end,), end_var) = self._noisy(at, x), self._noisy(to, x)
        return end + (end_var / var) ** 0.5 * (x - start)


class LinearGaussian(Law):
    """Data N(mean, covariance) of whole pictures, flattened to (B, d); every axis of the covariance is on its own."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = mean, covariance
        self.spread, self.axes = torch.linalg.eigh(covariance)

    def given(self, matrix, y, std):
        """The law once y = matrix·x₀ + std·n was seen: Gaussian conditioning."""
        seen = matrix @ self.covariance
        gain = torch.linalg.solve(seen @ matrix.T + std**2 * torch.eye(len(y), dtype=y.dtype), seen).T
        return LinearGaussian(self.mean + gain @ (y - matrix @ self.mean), self.covariance - gain @ seen)

    def _along(self, x, level):
        """α and σ, the sample's place along each axis and its variance there."""
        a, b = (per_sample(part, x) for part in level)
        return a, b, (x - a * self.mean) @ self.axes, a**2 * self.spread + b**2

    def log_density(self, x, level):
        """ln p(x) of whole pictures (B,)."""
        _, _, place, var = self._along(x, level)
        return -(place**2 / var + torch.log(2 * math.pi * var)).sum(1) / 2

    def score(self, x, level):
        _, _, place, var = self._along(x, level)
        return -(place / var) @ self.axes.T

    def pair(self, x, level):
        """E[x₀ | x] = m + αC(α²C + σ²)⁻¹(x - αm), and E[ε | x] = -σ·score."""
        a, b, place, var = self._along(x, level)
        return Pair(self.mean + (a * self.spread / var * place) @ self.axes.T, -b * self.score(x, level))

    def flow(self, x, at, to):
        """The standardized coordinate along each axis stays."""
        _, _, place, var = self._along(x, at)
        c, d = (per_sample(part, x) for part in to)
        return c * self.mean + (torch.sqrt((c**2 * self.spread + d**2) / var) * place) @ self.axes.T


def slope(function, t, h=2e-4):
    """A derivative by central differences of fourth order, error about 1e-12."""
    return (8 * (function(t + h) - function(t - h)) - function(t + 2 * h) + function(t - 2 * h)) / (12 * h)


def karras(schedule, t, pair, sd=0.5):
    """F of EDM's table 1, for x/α at noise σ/α: (x₀ - c_skip·x) / c_out."""
    level = schedule(t)
    a, b = (per_sample(part, pair.x0) for part in level)
    ratio = (b / a).clamp(1e-6, 1e8)  # both ends, as limits
    x = pair.x0 + ratio * pair.eps
    c_skip, c_out = sd**2 / (ratio**2 + sd**2), ratio * sd / torch.sqrt(ratio**2 + sd**2)
    return (pair.x0 - c_skip * x) / c_out


def velocity(schedule, t, pair):
    """α'x₀ + σ'ε by differences so fine that they hardly ever cross a step of a chain, where it has two slopes."""
    da, db = (per_sample(slope(part, t, 2e-6), pair.x0) for part in (schedule.alpha, schedule.sigma))
    return da * pair.x0 + db * pair.eps


def say(name, schedule, t, pair):
    """What each target is by its definition in the literature; a target without a line here cannot be tested."""
    a, b = (per_sample(part, pair.x0) for part in (schedule.alpha(t), schedule.sigma(t)))
    definitions = {
        "x0": lambda: pair.x0,
        "eps": lambda: pair.eps,
        "flow": lambda: pair.eps - pair.x0,
        "v": lambda: a * pair.eps - b * pair.x0,
        "velocity": lambda: velocity(schedule, t, pair),
        "score": lambda: -pair.eps / b,
        "karras": lambda: karras(schedule, t, pair),
    }
    return definitions[name]()


class Oracle(nn.Module):
    """The perfect network for one law, schedule, target and input scaling; it reads the time off the `Time` label.

    `answer(x, level, labels) -> Pair` is what it knows; by default the posterior mean.
    """

    def __init__(self, law, schedule, target, scale, answer=None):
        super().__init__()
        self.schedule, self.target, self.scale = schedule, target, scale
        self.answer = answer or law.pair
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))  # for those who ask a network's device

    def forward(self, scaled, c, cond=None):
        t = (c + 1) / 2
        level = self.schedule(t)
        x = scaled / per_sample(self.scale(level), scaled)
        pair = self.answer(x, level, None if cond is None else cond["label"])
        return say(self.target, self.schedule, t, pair) + self.weight


def perfect(law, schedule, target, *, scale=None, answer=None, first=1.0):
    """A Denoiser around the oracle; `target` is a name."""
    scale = scale or UnitVariance()
    net = Oracle(law, schedule, target, scale, answer)
    return Denoiser(net, schedule, one_of_each(Target)[target], scale=scale, label=Time(), first=first)


class Answering(Reader):
    """A reader that is no network: `answer(x, t, cond) -> Pair` is what it knows at times t; it says x₀."""

    def __init__(self, schedule, answer, first=1.0):
        super().__init__()
        self.schedule, self.target, self.first, self.answer = schedule, X0(), first, answer

    def read(self, x, t, cond):
        pair = self.answer(x, t, cond)
        return Said(pair.x0, pair.spread)
