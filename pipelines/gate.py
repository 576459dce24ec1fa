"""The gate: which of the judged models may be promoted, and which of those is.

A model passes when its distance is at most the bound, its accuracy at least the bound, and it is not worse
than the champion by more than a tolerance, as far as the two were judged alike. Of those that pass, the one
with the fewest network calls a picture is the candidate (the smaller distance decides a tie): the bounds say
what is good enough, and beyond that speed is what few-step models are for. The candidate then replaces the
champion unless it is dearer without being better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

from diffusion_core.errors import ConfigError
from diffusion_core.spec import build

PREFIX = "score."


@dataclass(frozen=True)
class Bounds:
    """The least a model must do: `distance` in U (at most), `accuracy` as a fraction (at least)."""

    distance: float
    accuracy: float

    def __post_init__(self) -> None:
        if self.distance <= 0:
            raise ConfigError(f"distance is {self.distance}; a number above 0 is wanted")
        if not 0 <= self.accuracy <= 1:
            raise ConfigError(f"accuracy is {self.accuracy}; a fraction from 0 to 1 is wanted")


@dataclass(frozen=True)
class Score:
    """What was measured of a model: `distance_u` in U of size `unit`, `count` pictures at `calls` network calls."""

    name: str
    metric: str
    distance_u: float
    unit: float
    count: int
    accuracy: float
    calls: int

    @classmethod
    def of(cls, measured: Mapping[str, object], path: str) -> Self:
        """Read the fields of an evaluation's metrics.json; raises ConfigError naming a missing or non-finite one."""
        return build(cls, {name: measured[name] for name in cls.__dataclass_fields__ if name in measured}, path)

    @classmethod
    def of_tags(cls, tags: Mapping[str, str]) -> Self | None:
        """Read back what `tags` wrote; None if these are not such tags."""
        try:
            raw = {name: tags[PREFIX + name] for name in cls.__dataclass_fields__}
            return cls(
                raw["name"],
                raw["metric"],
                float(raw["distance_u"]),
                float(raw["unit"]),
                int(raw["count"]),
                float(raw["accuracy"]),
                int(raw["calls"]),
            )
        except (KeyError, ValueError):
            return None

    def tags(self) -> dict[str, str]:
        """The score as tags of a version; numbers keep all their digits."""
        return {PREFIX + name: str(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Verdict:
    """Why a model was refused (passed if there is no reason) and what was not looked at."""

    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.reasons


def examine(score: Score, bounds: Bounds, champion: Score | None, tolerance: float) -> Verdict:
    """Hold a model against the bounds and, where both were judged alike, against the champion."""
    reasons, notes = [], []
    if score.distance_u > bounds.distance:
        reasons.append(f"{score.name}: FD {score.distance_u:.2f} U is above the bound {bounds.distance:.2f} U")
    if score.accuracy < bounds.accuracy:
        reasons.append(f"{score.name}: accuracy {score.accuracy:.1%} is below the bound {bounds.accuracy:.1%}")
    if champion is not None and (unlike := difference(score, champion)):
        notes.append(f"{score.name}: not compared with the champion {champion.name}: {unlike}")
    elif champion is not None and score.distance_u > champion.distance_u + tolerance:
        reasons.append(
            f"{score.name}: FD {score.distance_u:.2f} U is worse than the champion {champion.name}'s "
            f"{champion.distance_u:.2f} U by more than {tolerance:.2f} U"
        )
    return Verdict(tuple(reasons), tuple(notes))


def choose(passed: Sequence[Score]) -> Score:
    """The candidate among models that passed: fewest network calls, then smallest distance."""
    return min(passed, key=lambda score: (score.calls, score.distance_u))


def promote(candidate: Score, champion: Score | None, tolerance: float) -> Verdict:
    """The second look: whether a candidate that passed should replace the champion."""
    if champion is None or difference(candidate, champion):
        return Verdict()
    gain = champion.distance_u - candidate.distance_u
    if candidate.calls > champion.calls and gain <= tolerance:
        return Verdict(
            (
                f"{candidate.name}: {candidate.calls} network calls are more than the champion {champion.name}'s "
                f"{champion.calls}, for an FD only {gain:.2f} U better ({tolerance:.2f} U are asked for)",
            )
        )
    return Verdict()


def difference(one: Score, other: Score) -> str:
    """How two scores were judged differently, as a sentence; empty if their distances can be compared."""
    for name in ("metric", "unit", "count"):
        if getattr(one, name) != getattr(other, name):
            return f"its {name} is {getattr(one, name)}, the champion's {getattr(other, name)}"
    return ""
