"""ln p(x) of a picture: carry it along the probability-flow ODE to noise of a known law, and count the stretching.

    ln p(x) = ln p(y₁) + ∫ ∇·(dy/dw) dw              (Song et al. 2021, arXiv 2011.13456, eq. 39)

On the unit circle (cos θ, sin θ) = (α, σ)/√(α² + σ²) every schedule is one curve, y = cos θ·x₀ + sin θ·ε, with speed
dy/dθ = cos θ·ε - sin θ·x₀. Its clock w = ln tan(θ/2) is even in log-noise near the picture, finite in pure noise, and
moves as dθ/dw = sin θ, so that nothing is singular on the way, whatever the schedule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_core.checks import check_finite
from diffusion_core.denoiser import Condition, Reader
from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise, Stream
from diffusion_core.pair import Numbers, mix
from diffusion_core.schedule import Schedule, log_snr

Trace = Callable[[Tensor, Tensor], Tensor]  # (speed at y, y) -> its divergence (B,)


@dataclass(frozen=True)
class Prior:
    """What is known of the data, far away in noise: N(α·mean, α²·std² + σ²) for every number alike.

    Zeros, the default, give N(0, σ²), the noise that a sampler starts from: the answer is then the likelihood under
    the very model that is sampled. Where some signal is left at the noisy end, that law is off by a share α·mean/σ of
    a standard deviation; with the data's own mean and standard deviation what remains is of order (α/σ)³.
    """

    mean: float = 0.0
    std: float = 0.0

    def __post_init__(self) -> None:
        if self.std < 0:
            raise ConfigError(f"std {self.std}: a number of at least 0 is wanted")


class Place(NamedTuple):
    """A point of the way: its time, its unit row (cos θ, sin θ) and how much longer the schedule's own row is."""

    t: float
    unit: Numbers
    length: float


def log_likelihood(
    reader: Reader,
    x: Tensor,
    cond: Condition | None = None,
    *,
    steps: int = 64,
    clean: float = 16.0,
    prior: Prior = Prior(),  # noqa: B008 (a frozen value)
    probes: int = 0,
    noise: Noise | None = None,
) -> Tensor:
    """ln p(x | cond) of pictures x (B, ...) in nats (B,), float64, by `steps` steps of Runge-Kutta's fourth order.

    The divergence is exact, at one backward pass a number of x, or, with `probes` random signs drawn from `noise`,
    an estimate without bias (Hutchinson's trace, section D.2 of the paper). The picture counts as clean at log-SNR
    `clean`: what is found is the density of data with noise of variance exp(-clean) added, where the schedule has it.
    Raises ConfigError for impossible numbers, DataError for an x that is not finite.
    """
    if steps < 1 or probes < 0:
        raise ConfigError(f"steps {steps}, probes {probes}: steps >= 1 and probes >= 0 are wanted")
    if probes and noise is None:
        raise ConfigError(f"probes {probes}: random signs need a Noise")
    check_finite("x", x)
    trace = exact_trace if noise is None or not probes else hutchinson(_signs(x, probes, noise))
    begin, end = _ends(reader, clean)
    places = _places(reader.schedule, torch.linspace(begin, end, 2 * steps + 1, dtype=torch.float64))
    y, stretched = x * places[0].unit.a, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    h = (end - begin) / steps
    for start, middle, stop in zip(places[:-1:2], places[1::2], places[2::2], strict=True):
        v1, d1 = _speed(reader, y, start, cond, trace)
        v2, d2 = _speed(reader, y + h / 2 * v1, middle, cond, trace)
        v3, d3 = _speed(reader, y + h / 2 * v2, middle, cond, trace)
        v4, d4 = _speed(reader, y + h * v3, stop, cond, trace)
        y = y + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        stretched = stretched + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    shrunk = x[0].numel() * math.log(places[0].unit.a)
    return _log_prior(y.double(), places[-1].unit, prior) + stretched + shrunk


def exact_trace(speed: Tensor, y: Tensor) -> Tensor:
    """∇·speed of every sample (B,), one derivative at a time; samples must not see each other."""
    total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for place in range(y[0].numel()):
        (slope,) = torch.autograd.grad(speed.flatten(1)[:, place].sum(), y, retain_graph=True)
        total += slope.flatten(1)[:, place]
    return total


def hutchinson(signs: Tensor) -> Trace:
    """The mean of zᵀJz over probes z (probes, B, ...), whose mean is ∇·speed where E[zzᵀ] = 1."""

    def trace(speed: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for z in signs:
            (product,) = torch.autograd.grad(speed, y, z, retain_graph=True)
            total += (product * z).flatten(1).sum(1)
        return total / len(signs)

    return trace


def _signs(x: Tensor, probes: int, noise: Noise) -> Tensor:
    """Random signs (probes, B, ...), the same along the whole way, so that the integrand is smooth."""
    drawn = [noise.uniform(x.shape[1:], Stream.RENOISE + probe) for probe in range(probes)]
    return (torch.stack(drawn) - 0.5).sign().to(x)


def _speed(reader: Reader, y: Tensor, place: Place, cond: Condition | None, trace: Trace) -> tuple[Tensor, Tensor]:
    """dy/dw and its divergence (B,)."""
    (cos, sin), length = place.unit, place.length
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        speed = mix(reader(y * length, place.t, cond), Numbers(-(sin**2), sin * cos))
        return speed.detach(), trace(speed, y)


def _ends(reader: Reader, clean: float) -> tuple[float, float]:
    """Where the clock begins, at log-SNR `clean` or the schedule's cleanest, and ends, at the reader's first time."""
    cleanest = log_snr(reader.schedule(torch.zeros((), dtype=torch.float64))).item()
    noise = math.exp(-min(clean, cleanest) / 2)
    a, b = reader.schedule.level(reader.first).row
    begin, end = math.log(noise / (math.hypot(1, noise) + 1)), math.log(b / (math.hypot(a, b) + a))
    if not begin < end:
        raise ConfigError(f"clean {clean}: a log-SNR above that of the noisiest time {reader.first:g} is wanted")
    return begin, end


def _places(schedule: Schedule, w: Tensor) -> list[Place]:
    """The points of the way at clock times w, where σ/α = -1/sinh(w)."""
    t = schedule.time(2 * torch.sinh(-w).log())
    rows = [Numbers(a, b) for a, b in zip(*(part.tolist() for part in schedule(t)), strict=True)]
    lengths = [math.hypot(*row) for row in rows]
    return [
        Place(when, Numbers(a / length, b / length), length)
        for when, (a, b), length in zip(t.tolist(), rows, lengths, strict=True)
    ]


def _log_prior(y: Tensor, unit: Numbers, prior: Prior) -> Tensor:
    """ln N(y; cos·mean, cos²·std² + sin²) (B,)."""
    variance = (unit.a * prior.std) ** 2 + unit.b**2
    off = (y - unit.a * prior.mean).square() / variance
    return -(off + math.log(2 * math.pi * variance)).flatten(1).sum(1) / 2
