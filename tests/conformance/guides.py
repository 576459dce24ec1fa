"""Every guide against its formula, written out with the scores of a mixture whose classes are known.

A class picks the component; a picture that was seen through noise tells something of every pixel, and with both there
are two conditions. What one guide does outside its interval is what all do: the conditional reading.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_core.classifier import ClassifierGuided
from diffusion_core.denoiser import Condition, Reader
from diffusion_core.errors import RefusedError
from diffusion_core.guidance import APG, CFG, Autoguidance
from diffusion_core.inpainting import Inpaint
from diffusion_core.pair import Pair, Row
from diffusion_core.schedule import Schedule
from diffusion_core.target import Target
from diffusion_core.thresholding import Clip, DynamicThreshold
from diffusion_core.two_conditions import TwoConditions
from tests.conformance.cell import Cell, exact
from tests.conformance.landings import difference
from tests.core.oracle import BLIND, PURE_NOISE, Answering, LinearGaussian, Mixture, per_sample, perfect

LAW, WORSE = Mixture((-0.8, 0.9), (0.4, 0.6), 0.6), Mixture((-0.8, 0.9), (0.4, 0.6), 0.9)
INTERVAL = (0.3, 0.7)
T = torch.tensor([0.2005, 0.3605, 0.5105, 0.6705, 0.8005, 0.5105], dtype=torch.float64)
INSIDE = torch.tensor([False, True, True, True, False, True]).reshape(-1, 1, 1, 1)
ALWAYS = torch.ones_like(INSIDE)
X0, EPS, SEEN = torch.randn(3, len(T), 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 0, 1, -1])
SPREAD = 0.8  # of the noise through which a picture was seen
MASK = torch.tensor([[True, False], [False, True]]).reshape(1, 1, 2, 2)
CLOSE = 1e-6  # x₀ is ε divided by the signal, and the oracle's rates are good to 1e-9

Formula = Callable[[Tensor, Row], Tensor]  # the guided x₀ of x at a level


class Case(NamedTuple):
    """A guide around a reader, what it must say of x₀ inside its interval, and where that is."""

    build: Callable[[Reader], Reader]
    wanted: Formula
    inside: Tensor


def tweedie(x: Tensor, level: Row, score: Tensor) -> Tensor:
    """E[x₀ | x] = (x + σ²·score)/α."""
    a, b = (per_sample(part, x) for part in level)
    return (x + b**2 * score) / a


def conditional(x: Tensor, level: Row) -> Tensor:
    return tweedie(x, level, LAW.score(x, level, LABELS))


def plain(x: Tensor, level: Row) -> Tensor:
    return tweedie(x, level, LAW.score(x, level))


def guided(scale: float) -> Formula:
    return lambda x, level: tweedie(x, level, LAW.guided_score(x, level, LABELS, scale))


def rescaled(x: Tensor, level: Row) -> Tensor:
    """φ·x₀·std(conditional)/std(guided) + (1 - φ)·x₀ with φ = 0.7."""
    found, wanted = guided(3.0)(x, level), conditional(x, level)
    ratio = wanted.flatten(1).std(1) / found.flatten(1).std(1)
    return 0.7 * per_sample(ratio, x) * found + 0.3 * found


def negative(x: Tensor, level: Row) -> Tensor:
    away, given = (LAW.score(x, level, labels) for labels in (torch.zeros_like(LABELS), LABELS))
    return tweedie(x, level, away + 3.0 * (given - away))


def projected(x: Tensor, level: Row) -> Tensor:
    """x₀ + (w - 1)·(orthogonal + η·parallel) of the shortened difference, w = 3, η = 0.2, no longer than 0.5."""
    rows = []
    for given, free in zip(conditional(x, level), plain(x, level), strict=True):
        apart, along = (given - free).flatten(), given.flatten() / given.norm()
        apart = apart * min(1.0, 0.5 / max(apart.norm().item(), 1e-300))
        parallel = apart.dot(along) * along
        rows.append(given + 2.0 * (apart - parallel + 0.2 * parallel).reshape(given.shape))
    return torch.stack(rows)


def from_worse(x: Tensor, level: Row) -> Tensor:
    better, worse = (law.score(x, level, LABELS) for law in (LAW, WORSE))
    return tweedie(x, level, worse + 3.0 * (better - worse))


def two_conditions(x: Tensor, level: Row) -> Tensor:
    """s + w₁·(s(seen) - s) + w₂·(s(seen, class) - s(seen)) with w = 1.5 and 3."""
    seen = LAW.observed(SEEN, SPREAD)
    free, first, both = LAW.score(x, level), seen.score(x, level), seen.score(x, level, LABELS)
    return tweedie(x, level, free + 1.5 * (first - free) + 3.0 * (both - first))


def thresholded(x: Tensor, level: Row) -> Tensor:
    """clip(x₀, -s, s)/s, s the 0.9-quantile of |x₀| if above one."""
    x0 = conditional(x, level).numpy()
    s = np.maximum(1, np.quantile(np.abs(x0), 0.9, axis=(1, 2, 3), keepdims=True))
    return torch.from_numpy(np.clip(x0, -s, s) / s)


def class_posterior(schedule: Schedule) -> Callable[[Tensor, Tensor, Condition | None], Tensor]:
    """ln p(class | x) of every pixel, as a classifier of noisy samples says it; nothing for "no class"."""

    def log_prob(x: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        label = cond["label"].reshape(-1, 1, 1, 1, 1)
        found = LAW.responsibilities(x, schedule(t)).log()
        told = found.gather(-1, label.clamp_min(0).expand(*found.shape[:-1], 1))
        return torch.where(label < 0, 0, told).flatten(1).sum(1)

    return log_prob


CASES: Mapping[str, Case] = {
    "CFG": Case(lambda reader: CFG(reader, 3.0), guided(3.0), ALWAYS),
    "CFG in an interval": Case(lambda reader: CFG(reader, 3.0, INTERVAL), guided(3.0), INSIDE),
    "CFG, rescaled": Case(lambda reader: CFG(reader, 3.0, INTERVAL, 0.7), rescaled, INSIDE),
    "CFG, negative": Case(
        lambda reader: CFG(reader, 3.0, INTERVAL, negative={"label": torch.tensor([0])}), negative, INSIDE
    ),
    "APG": Case(lambda reader: APG(reader, 3.0, INTERVAL, eta=0.2, threshold=0.5), projected, INSIDE),
    "autoguidance": Case(
        lambda reader: Autoguidance(reader, perfect(WORSE, reader.schedule, "x0"), 3.0, INTERVAL), from_worse, INSIDE
    ),
    "classifier": Case(
        lambda reader: ClassifierGuided(CFG(reader, 0.0), class_posterior(reader.schedule), 3.0), guided(3.0), ALWAYS
    ),
    "clip": Case(lambda reader: Clip(reader, 0.7), lambda x, level: conditional(x, level).clamp(-0.7, 0.7), ALWAYS),
    "dynamic threshold": Case(lambda reader: DynamicThreshold(reader, 0.9), thresholded, ALWAYS),
    "inpainting": Case(
        lambda reader: Inpaint(reader, SEEN, MASK),
        lambda x, level: torch.where(MASK, SEEN, conditional(x, level)),
        ALWAYS,
    ),
}
OWN = ("two conditions", "classifier of a linear view")  # laws of their own, below


def cells(name: str, schedule: Schedule) -> Iterator[Cell]:
    """The largest difference over all targets, or what is refused in pure noise."""
    x, level = noisy(schedule)
    for row, case in CASES.items():
        wanted = torch.where(case.inside, case.wanted(x, level), conditional(x, level))
        off, refused = 0.0, ""
        for target in Target.kinds():
            first = 0.97 if name in PURE_NOISE and (target in BLIND or row == "classifier") else 1.0
            guide = case.build(perfect(LAW, schedule, target, first=first))
            off = max(off, difference(read(guide, x, {"label": LABELS}), wanted))
        if row == "classifier":
            refused = refusal(lambda case=case: case.build(perfect(LAW, schedule, "v")))
            off = off if bool(refused) == (name in PURE_NOISE) else math.inf
        yield exact("guides", name, row, "x0", off, CLOSE, refused)
    yield exact("guides", name, OWN[0], "x0", difference(*seen(schedule, x, level)), CLOSE)
    yield exact("guides", name, OWN[1], "x0", difference(*viewed(schedule, x, level)), CLOSE)


def noisy(schedule: Schedule) -> tuple[Tensor, Row]:
    """Samples at times T and their levels."""
    level = schedule(T)
    return per_sample(level.a, X0) * X0 + per_sample(level.b, X0) * EPS, level


def read(guide: Reader, x: Tensor, cond: Condition | None) -> Tensor:
    """x₀ as read at one time a sample; at one for all, as samplers ask, it must be the same."""
    found = guide(x, T, cond).x0
    for row, t in enumerate(T.tolist()):
        alone = guide(x, t, cond).x0[row]
        found[row] = torch.where((alone - found[row]).abs() > CLOSE * (1 + alone.abs()), math.nan, found[row])
    return found


def refusal(build: Callable[[], Reader]) -> str:
    try:
        build()
    except RefusedError as error:
        return str(error)
    return ""


def seen(schedule: Schedule, x: Tensor, level: Row) -> tuple[Tensor, Tensor]:
    """Two conditions: what the guide says, and the formula."""

    def answer(x: Tensor, t: Tensor, cond: Condition) -> Pair:
        level, view = schedule(torch.as_tensor(t).expand(len(x))), cond["image"]
        told = LAW.observed(view, SPREAD).pair(x, level, cond["label"])
        untold = LAW.pair(x, level, cond["label"])
        blank = (view == 0).flatten(1).all(1).reshape(-1, 1, 1, 1)
        return Pair(*(torch.where(blank, one, other) for one, other in zip(untold[:2], told[:2], strict=True)))

    guide = TwoConditions(Answering(schedule, answer), 1.5, 3.0, INTERVAL, second_names=("label",))
    both = tweedie(x, level, LAW.observed(SEEN, SPREAD).score(x, level, LABELS))
    wanted = torch.where(INSIDE, two_conditions(x, level), both)
    return read(guide, x, {"image": SEEN, "label": LABELS}), wanted


def viewed(schedule: Schedule, x: Tensor, level: Row) -> tuple[Tensor, Tensor]:
    """Steering an unconditional reading of Gaussian pictures by ln p(y | x), y = Ax₀ + n, reads them given y."""
    mean, root = torch.tensor([0.5, -0.3, 0.2, -0.6]).double(), torch.eye(4).double() * 0.5 + 0.1
    matrix, y, std = torch.tensor([[1.0, 0.5, 0.0, 0.2], [0.0, -1.0, 2.0, 0.3]]).double(), X0[0, 0, 0], 0.3
    law, flat = LinearGaussian(mean, root @ root.T), x.flatten(1)

    def answer(x: Tensor, t: Tensor, cond: Condition | None) -> Pair:
        return law.pair(x, schedule(torch.as_tensor(t).expand(len(x))))

    def log_prob(x: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        """y given x is Gaussian, about A·E[x₀ | x] with the covariance that is left of x₀, seen through A."""
        level = schedule(t)
        a, b = (part[:, None] for part in level)
        left = (law.axes * (law.spread * b**2 / (a**2 * law.spread + b**2))[:, None]) @ law.axes.T
        off = y - law.pair(x, level).x0 @ matrix.T
        cov = matrix @ left @ matrix.T + std**2 * torch.eye(2, dtype=torch.float64)
        return -(off[:, None] @ torch.linalg.solve(cov, off[..., None])).flatten() / 2

    guide = ClassifierGuided(Answering(schedule, answer, first=0.97), log_prob)
    return read(guide, flat, None), law.given(matrix, y, std).pair(flat, level).x0
