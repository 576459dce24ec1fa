"""Quality against network calls: which ways of sampling make a given number of calls, and what one of them scores."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_core.bundle import Bundle
from diffusion_core.errors import ConfigError, DataError
from diffusion_core.metrics.passport import Passport
from diffusion_core.metrics.ruler import Ruler, Score, Scoring
from diffusion_core.sampler import Sampling, generate
from diffusion_core.solver import Solver
from diffusion_core.spec import spec

Captions = Callable[[Tensor], Sequence[str | None]]  # of the training pictures in these rows (B,)


class Point(NamedTuple):
    """What one way of sampling scored, and the seconds one picture took."""

    score: Score
    seconds: float
    passport: Passport

    @property
    def calls(self) -> int:
        """Network calls a picture."""
        return self.passport.sampling.calls

    def numbers(self) -> dict[str, float]:
        """What was measured."""
        return {
            "distance_u": self.score.distance_u,
            "distance_val_u": self.score.distance_val_u,
            "accuracy": self.score.accuracy,
            "seconds_per_image": self.seconds,
        }


def candidates(defaults: Sampling, calls: int, solvers: Sequence[Solver]) -> tuple[Sampling, ...]:
    """The samplings that make exactly `calls` network calls: the default solver's and those of `solvers`.

    A solver that cannot make as many is left out (Heun makes 2n - 1), and of a single step only the default, since
    all solvers agree on it. Raises ConfigError if none is left.
    """
    steps = [n for n in defaults.allowed_steps or range(1, calls + 1) if n <= calls]
    tried = [
        replace(defaults, solver=solver, steps=n)
        for solver in dict.fromkeys((defaults.solver, *solvers))
        for n in steps
        if solver == defaults.solver or n > 1 and n >= solver.fewest_steps
    ]
    found = tuple(sampling for sampling in tried if sampling.calls == calls)
    if not found:
        allowed = f"; its steps are {list(defaults.allowed_steps)}" if defaults.allowed_steps else ""
        raise ConfigError(f"calls {calls}: no solver makes exactly as many at guidance {defaults.guidance:g}{allowed}")
    return found


def measure(
    bundle: Bundle,
    ruler: Ruler,
    passport: Passport,
    batch: int,
    on_batch: Callable[[int], None] = lambda done: None,
    captions: Captions | None = None,
) -> Point:
    """Make the pictures that a passport speaks of, in batches, and score them.

    With `captions` picture i is asked for that of training picture i too. `on_batch` hears how many network calls a
    batch took. Raises DataError for pictures that are not finite or not as many as the passport says.
    """
    scoring, seconds = Scoring(ruler), 0.0
    for start in range(0, passport.count, batch):
        ids = torch.arange(start, min(start + batch, passport.count))
        rows = ids % len(ruler.real.labels)
        labels = ruler.real.labels[rows]
        asked = bundle.condition(labels, None if captions is None else captions(rows))
        begun = time.perf_counter()
        images = generate(
            bundle.denoiser, bundle.codec, passport.sampling, bundle.latent_shape, passport.first_seed + ids, asked
        )
        seconds += time.perf_counter() - begun
        try:
            scoring.add(images, labels)
        except DataError as error:
            how = f"{solver_name(passport.sampling.solver)} in {passport.sampling.steps} steps"
            raise DataError(f"{how}, seeds from {passport.first_seed + start}: {error}") from error
        on_batch(len(ids) * passport.sampling.calls)
    score = scoring.score()
    if score.count != passport.count:
        raise DataError(f"{score.count} pictures were made; {passport.count} were asked for")
    return Point(score, seconds / passport.count, passport)


def solver_name(solver: Solver) -> str:
    """A solver as a legend tells it: its kind, then its settings."""
    described: Mapping[str, Any] = spec(solver)
    kind, *settings = (str(value["kind"] if isinstance(value, Mapping) else value) for value in described.values())
    return f"{kind} ({', '.join(settings)})" if settings else kind
