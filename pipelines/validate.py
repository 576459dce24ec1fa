"""Validate: the gate between preparing and everything after it; later stages depend on what it publishes.

A failed critical claim stops the pipeline and publishes nothing but the Data Docs, for a person to look at. A failed
warning is told and recorded. What cannot be judged has failed.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_core.errors import ConfigError, DataError
from pipelines.data import expectations
from pipelines.data.claims import Limits
from pipelines.data.expectations import Outcome
from pipelines.data.survey import survey
from pipelines.stage import Stage, run

DOCS = Path("artifacts/data_docs")
RESULT = "result.json"


@dataclass(frozen=True)
class Config(Limits):
    """`decode_sample` pictures of each split are decoded; `reference` is an earlier data folder, or its index alone,
    whose distributions these may not leave.
    """

    decode_sample: int = 256
    seed: int = 0
    reference: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode_sample < 1:
            raise ConfigError(f"decode_sample {self.decode_sample}: at least 1 is wanted")


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Judge the data set; raises DataError with one sentence for each critical claim that failed."""
    folder, found = stage.input("artifacts/data", "data")
    earlier = Path(config.reference) if config.reference else None
    seen = survey(folder, found, config, sample=config.decode_sample, seed=config.seed, reference=earlier)
    outcomes = expectations.check(seen.tables, seen.claims, config, DOCS)
    failed = Counter(outcome.severity for outcome in outcomes if not outcome.held)
    counts = {"expectations": len(outcomes), "failed": failed["critical"], "warnings": failed["warning"]}
    result = {"counts": counts, "outcomes": [asdict(outcome) for outcome in outcomes]}
    (stage.out / RESULT).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    pictures = {f"pictures.{split}": count for split, count in found.about["counts"].items()}
    _record(stage, counts | pictures | seen.figures)
    _tell(stage, outcomes)
    if counts["failed"]:
        head = f"{folder} fails {counts['failed']} of {len(outcomes)} expectations (see {DOCS}/index.html)"
        raise DataError("\n  ".join([head, *(one.sentence for one in outcomes if _stops(one))]))
    return counts


def _record(stage: Stage, figures: dict[str, float]) -> None:
    """Hand figures, report and Data Docs to the run, which says where in its files they are."""
    stage.tracker.metrics(figures)
    stage.tracker.artifact(stage.out / RESULT)
    stage.tracker.artifact(DOCS)
    stage.tracker.tags({"data_docs": f"{DOCS.name}/index.html"})


def _tell(stage: Stage, outcomes: list[Outcome]) -> None:
    """One line a table, one a warning."""
    held = Counter(one.expectation.split(".")[0] for one in outcomes if one.held)
    asked = Counter(one.expectation.split(".")[0] for one in outcomes)
    for name, count in asked.items():
        stage.say(f"{name:<9}{held[name]:>3} of {count} hold")
    for one in outcomes:
        if not one.held and not _stops(one):
            stage.say(f"warning: {one.sentence}")
    stage.say(f"Data Docs: {DOCS}/index.html")


def _stops(outcome: Outcome) -> bool:
    return not outcome.held and outcome.severity == "critical"


if __name__ == "__main__":
    run("validate", Config, main, out="artifacts/validation", kind="validation")
