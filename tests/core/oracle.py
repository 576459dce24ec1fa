"""Denoisers in closed form: what a perfect network would say about data of a known law. No training, no solver.

Data are N(m, s²) or a mixture of such; the noisy sample αx₀ + σε then has a known density, so posterior mean,
score and (for one Gaussian) the probability-flow map are formulas. Everything is float64 and written from the
definitions: nothing here calls the algebra under test.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from diffusion_core.denoiser import Denoiser, Time, UnitVariance
from diffusion_core.pair import Pair
from diffusion_core.schedule import Cosine
from diffusion_core.target import Target

EXAMPLES = {"shifted": {"inner": Cosine(), "factor": 3.0}}
PURE_NOISE = {"cosine", "linear", "shifted"}  # schedules that end without any signal
BLIND = {"eps", "score"}  # targets that say nothing of the picture in pure noise


def one_of_each(family):
    """A member of every kind of a family, by name, so that a new kind is tested by existing."""
    return {name: made(**EXAMPLES.get(name, {})) for name, made in family.kinds().items()}


def time(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def per_sample(number, like):
    return number.reshape(number.shape + (1,) * (like.ndim - number.ndim)) if number.ndim else number


@dataclass(frozen=True)
class Mixture:
    """Data Σ wᵢ N(mᵢ, s²), each pixel alike and on its own; a label picks one component, -1 or None all."""

    means: tuple[float, ...] = (-1.0, 1.5)
    weights: tuple[float, ...] = (0.3, 0.7)
    std: float = 0.4

    def responsibilities(self, x, level, labels=None):
        """p(component | x), with a last axis over components; a label makes it certain."""
        a, b = (per_sample(part, x) for part in level)
        var = (a * self.std) ** 2 + b**2
        logits = [math.log(w) - (x - a * m) ** 2 / (2 * var) for m, w in zip(self.means, self.weights, strict=True)]
        found = torch.stack(logits, -1).softmax(-1)
        if labels is None:
            return found
        certain = torch.eye(len(self.means), dtype=x.dtype)[labels.clamp_min(0)]
        certain = certain.reshape(len(x), *(1,) * (x.ndim - 1), -1)
        return torch.where(labels.reshape(-1, *(1,) * x.ndim) < 0, found, certain)

    def score(self, x, level, labels=None):
        """∇ log p(x) by the density of each component."""
        a, b = (per_sample(part, x) for part in level)
        slopes = torch.stack([(a * m - x) / ((a * self.std) ** 2 + b**2) for m in self.means], -1)
        return (self.responsibilities(x, level, labels) * slopes).sum(-1)

    def pair(self, x, level, labels=None):
        """E[x₀ | x] by Gaussian conditioning in each component, and E[ε | x] = -σ·score."""
        a, b = (per_sample(part, x) for part in level)
        gain = a * self.std**2 / ((a * self.std) ** 2 + b**2)
        inside = torch.stack([m + gain * (x - a * m) for m in self.means], -1)
        return Pair((self.responsibilities(x, level, labels) * inside).sum(-1), -b * self.score(x, level, labels))


class Gaussian(Mixture):
    """Data N(mean, std²), for which the probability flow is known."""

    def __init__(self, mean=0.7, std=0.4):
        super().__init__((mean,), (1.0,), std)

    def flow(self, x, at, to):
        """Where the probability flow carries x: the standardized coordinate is constant along it."""
        (mean,) = self.means
        (a, b), (c, d) = ([per_sample(part, x) for part in level] for level in (at, to))
        spread = torch.sqrt(((c * self.std) ** 2 + d**2) / ((a * self.std) ** 2 + b**2))
        return c * mean + spread * (x - a * mean)

    def clean(self, x, at):
        """The exact consistency function: where the flow ends, and the noise that goes with it."""
        x0 = self.flow(x, at, (time(1.0), time(0.0)))
        return Pair(x0, (x - per_sample(at[0], x) * x0) / per_sample(at[1], x))


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


def _rows(schedule, t, like):
    return [per_sample(part, like) for part in (schedule.alpha(t), schedule.sigma(t))]


def _rates(schedule, t, like):
    return [per_sample(slope(part, t), like) for part in (schedule.alpha, schedule.sigma)]


def say(name, schedule, t, pair):
    """What each target is by its definition in the literature; a target without a line here cannot be tested."""
    (a, b), (da, db) = _rows(schedule, t, pair.x0), _rates(schedule, t, pair.x0)
    definitions = {
        "x0": lambda: pair.x0,
        "eps": lambda: pair.eps,
        "flow": lambda: pair.eps - pair.x0,
        "v": lambda: a * pair.eps - b * pair.x0,
        "velocity": lambda: da * pair.x0 + db * pair.eps,
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
