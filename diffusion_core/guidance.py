"""Guides: a reader in, a reader out, so every sampler gets every guide for nothing.

One convention for the scale w: w = 0 is unconditional, w = 1 plain conditional, above 1 is guided:

    reading = (1 - w)·unconditional + w·conditional

The paper's own (Ho and Salimans 2022, arXiv 2207.12598, eq. 6) counts from plain conditional; `from_paper` and
`to_paper` convert. All readings are affine in each other at fixed x, so guiding what the network says is guiding
x₀, ε or v. What is not affine (`rescale`, APG) is done to x₀, and x₀ is then what the guide says.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_core.denoiser import Condition, Reader, Said, rows, without_condition
from diffusion_core.errors import ConfigError, RefusedError, suggest
from diffusion_core.pair import mix, unmix
from diffusion_core.target import X0, Target

# Up to this many numbers a branch, the branches of a guide are one call of the network on a processor: a larger batch
# spares dispatch where pictures are few and small, and only outgrows the caches where they are not
# (docs/benchmarks.md). On any other device they are one call always.
TOGETHER = 1 << 12
Interval = tuple[float, float]


def from_paper(scale: float) -> float:
    """The scale here of a scale in the paper's convention, (1 + w)·conditional - w·unconditional."""
    return 1 + scale


def to_paper(scale: float) -> float:
    """The scale in the paper's convention of a scale here."""
    return scale - 1


class Guide(Reader):
    """A reader around another, which it agrees with in schedule, target and first time."""

    def __init__(self, denoiser: Reader):
        super().__init__()
        self.denoiser = denoiser
        self.schedule, self.target, self.first = denoiser.schedule, denoiser.target, denoiser.first


class Converted(Guide):
    """A reader that says another target's reading of the same pair."""

    def __init__(self, denoiser: Reader, target: Target):
        super().__init__(denoiser)
        self.target = target

    def read(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """The reading of `target` in x (B, ...) at times t (B,) or at one for all."""
        level, of = rows(self.schedule, self.denoiser.target, t)
        said = self.denoiser.read(x, t, cond)
        return Said(mix(unmix(x, level, said.reading, of), rows(self.schedule, self.target, t)[1]), said.spread)


def saying(denoiser: Reader, target: Target) -> Reader:
    """The same reader, saying `target`'s reading."""
    return denoiser if denoiser.target == target else Converted(denoiser, target)


class Contrast(Guide):
    """Away from a weaker reading, (1 - w)·weaker + w·wanted at times inside `interval`; the wanted one outside it.

    The interval is Kynkäänniemi et al. 2024 (arXiv 2404.07724), in t. Where only one reading counts, only that one
    is asked for. Raises ConfigError for a scale below 0 or an interval outside [0, 1].
    """

    def __init__(self, denoiser: Reader, scale: float, interval: Interval = (0.0, 1.0)):
        super().__init__(denoiser)
        if not 0 <= scale < math.inf:
            raise ConfigError(f"guidance scale {scale}: 0 (unconditional), 1 (conditional) or more is wanted")
        self.scale, self.interval = float(scale), checked(interval)

    @abstractmethod
    def wanted(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """The reading to go to."""

    @abstractmethod
    def weaker(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """The reading to go away from."""

    def both(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Sequence[Said]:
        """The wanted reading and the weaker one."""
        return self.wanted(x, t, cond), self.weaker(x, t, cond)

    def combine(self, wanted: Tensor, weaker: Tensor, weight: float | Tensor) -> Tensor:
        """The guided reading, with one weight for all or one a sample (B, 1, ...)."""
        return torch.lerp(weaker, wanted, weight)

    def read(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """The guided reading in x (B, ...) at times t (B,) or at one for all; the wanted one's spread."""
        weight = scale_at(self.scale, t, self.interval, x)
        if isinstance(weight, float) and weight in (0, 1):
            return self.wanted(x, t, cond) if weight else self.weaker(x, t, cond)
        wanted, weaker = self.both(x, t, cond)
        return Said(self.combine(wanted.reading, weaker.reading, weight), wanted.spread)


class CFG(Contrast):
    """Classifier-free guidance, away from nothing asked for or from a `negative` condition (B, or 1 for all).

    A `rescale` φ above 0 brings the spread of each guided x₀ back to that of its conditional one,
    φ·x₀·std(conditional)/std(guided) + (1 - φ)·x₀ (Lin et al. 2023, arXiv 2305.08891, eq. 14 to 16).
    Branches of at most `together` numbers are one call of the network. Raises ConfigError for numbers out of range
    and, when asked, without a condition to guide to.
    """

    def __init__(
        self,
        denoiser: Reader,
        scale: float,
        interval: Interval = (0.0, 1.0),
        rescale: float = 0.0,
        *,
        negative: Condition | None = None,
        together: int = TOGETHER,
    ):
        super().__init__(saying(denoiser, X0()) if rescale else denoiser, scale, interval)
        if not 0 <= rescale <= 1:
            raise ConfigError(f"rescale {rescale}: a number in [0, 1] is wanted")
        if rescale and scale == 0:
            raise ConfigError(f"rescale {rescale} at guidance scale 0: nothing conditional is read to rescale to")
        self.rescale, self.negative, self.together = rescale, negative, together

    def wanted(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        return self.denoiser.read(x, t, something(cond))

    def weaker(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        return self.denoiser.read(x, t, self._free(cond))

    def both(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Sequence[Said]:
        return ask(self.denoiser, x, t, (something(cond), self._free(cond)), self.together)

    def combine(self, wanted: Tensor, weaker: Tensor, weight: float | Tensor) -> Tensor:
        guided = super().combine(wanted, weaker, weight)
        if self.rescale == 0:
            return guided
        axes = tuple(range(1, guided.ndim))
        std, found = (reading.std(axes, correction=0, keepdim=True) for reading in (wanted, guided))
        return guided * (1 + self.rescale * (torch.where(found > 0, std / found, 1) - 1))

    def _free(self, cond: Condition | None) -> Condition:
        cond = something(cond)
        free = dict(without_condition(cond))
        for name, value in (self.negative or {}).items():
            if name not in cond:
                raise ConfigError(f"negative condition '{name}' of none asked for; {suggest(name, cond)}")
            if len(value) not in (1, count := len(cond[name])):
                raise ConfigError(f"negative condition '{name}' of {len(value)} samples; 1 or {count} are wanted")
            free[name] = value.expand(count, *value.shape[1:])
        return free


class APG(CFG):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1), without its momentum.

    Guidance is a difference of two x₀; it is shortened to the norm `threshold`, and what of it is parallel to the
    conditional x₀, which saturates colours, counts `eta`-fold. eta = 1 without a threshold is plain guidance.
    The paper's running mean of differences would make a picture depend on more than the sample and its time.
    """

    def __init__(
        self,
        denoiser: Reader,
        scale: float,
        interval: Interval = (0.0, 1.0),
        *,
        eta: float = 0.0,
        threshold: float = math.inf,
        negative: Condition | None = None,
        together: int = TOGETHER,
    ):
        super().__init__(saying(denoiser, X0()), scale, interval, negative=negative, together=together)
        if not (scale >= 1 and threshold > 0 and math.isfinite(eta)):
            raise ConfigError(
                f"scale {scale}, threshold {threshold}, eta {eta}: "
                "scale >= 1, threshold > 0 and a finite eta are wanted"
            )
        self.eta, self.threshold = eta, threshold

    def combine(self, wanted: Tensor, weaker: Tensor, weight: float | Tensor) -> Tensor:
        axes = tuple(range(1, wanted.ndim))
        difference = wanted - weaker
        if self.threshold < math.inf:
            norm = torch.linalg.vector_norm(difference, dim=axes, keepdim=True)
            difference = difference * (self.threshold / norm).clamp_max(1)
        square = wanted.square().sum(axes, keepdim=True).clamp_min(torch.finfo(wanted.dtype).tiny)
        parallel = (difference * wanted).sum(axes, keepdim=True) / square * wanted
        return wanted + (weight - 1) * (difference + (self.eta - 1) * parallel)


class Autoguidance(Contrast):
    """Guidance away from a worse model with the same condition (Karras et al. 2024, arXiv 2406.02507, eq. 3).

    The worse one may say another reading. Raises RefusedError if it is on another schedule.
    """

    def __init__(self, denoiser: Reader, worse: Reader, scale: float, interval: Interval = (0.0, 1.0)):
        super().__init__(denoiser, scale, interval)
        if worse.schedule != denoiser.schedule:
            raise RefusedError(
                f"autoguidance of a model on {denoiser.schedule} by one on {worse.schedule}: at one time they see "
                "samples of different noise; both models must be on one schedule"
            )
        self.worse = saying(worse, denoiser.target)
        self.first = min(denoiser.first, worse.first)

    def wanted(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        return self.denoiser.read(x, t, cond)

    def weaker(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        return self.worse.read(x, t, cond)


def ask(reader: Reader, x: Tensor, t: Tensor | float, conds: Sequence[Condition], together: int) -> list[Said]:
    """What a reader says under each condition, in one call or in one each, as TOGETHER says.

    Conditions of different shapes, such as texts of different lengths, take a call each too.
    """
    count = len(conds)
    shapes = [{name: value.shape for name, value in cond.items()} for cond in conds]
    large = x.device.type == "cpu" and x.numel() > together
    if count == 1 or large or any(other != shapes[0] for other in shapes):
        return [reader.read(x, t, cond) for cond in conds]
    times = t.repeat(count) if isinstance(t, Tensor) else t
    joined = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
    reading, spread = reader.read(torch.cat((x,) * count), times, joined)
    spreads = (None,) * count if spread is None else spread.chunk(count)
    return [Said(*one) for one in zip(reading.chunk(count), spreads, strict=True)]


def scale_at(scale: float, t: Tensor | float, interval: Interval, like: Tensor) -> float | Tensor:
    """The scale inside the interval and one outside: a number for one time, else (B, 1, ...) to scale `like` with."""
    low, high = interval
    if not isinstance(t, Tensor):
        return scale if low <= t <= high else 1.0
    if scale == 1:
        return scale
    inside = ((t >= low) & (t <= high)).reshape(-1, *(1,) * (like.ndim - 1))
    return torch.where(inside, scale, 1.0).to(like)


def checked(interval: Interval) -> Interval:
    """The interval; raises ConfigError unless it is a part of [0, 1]."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance interval ({low}, {high}): 0 <= low <= high <= 1 is wanted")
    return interval


def something(cond: Condition | None) -> Condition:
    """The condition; raises ConfigError where there is none."""
    if cond is None:
        raise ConfigError("guidance without a condition: give a class label, or leave the guide out")
    return cond
