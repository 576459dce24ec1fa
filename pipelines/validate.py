"""Validate: the gate between preparing and everything after it; later stages depend on what it publishes.

A failed critical expectation stops the pipeline and publishes nothing but the Data Docs, for a person to
look at. A failed warning is told and recorded.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_core.errors import ConfigError, DataError
from pipelines.data import expectations
from pipelines.stage import Stage, run

DOCS = Path("artifacts/data_docs")
RESULT = "result.json"


@dataclass(frozen=True)
class Config:
    """`decode_sample` pictures of each split are decoded; each class has `min_class_percent` of its split at least."""

    decode_sample: int = 256
    seed: int = 0
    min_class_percent: float = 1.0

    def __post_init__(self) -> None:
        if self.decode_sample < 1:
            raise ConfigError(f"decode_sample {self.decode_sample}: at least 1 is wanted")
        if not 0 <= self.min_class_percent <= 100:
            raise ConfigError(f"min_class_percent {self.min_class_percent}: a number in [0, 100] is wanted")


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Judge the data set; raises DataError with one sentence for each critical expectation that failed."""
    folder, found = stage.input("artifacts/data", "data")
    tables = expectations.measure(folder, found, config.decode_sample, config.seed)
    outcomes = expectations.check(tables, expectations.claims(found.about, config.min_class_percent), DOCS)
    failed = [outcome for outcome in outcomes if not outcome.held]
    critical = [outcome for outcome in failed if outcome.severity == "critical"]
    counts = {"expectations": len(outcomes), "failed": len(critical), "warnings": len(failed) - len(critical)}
    result = {"counts": counts, "outcomes": [asdict(outcome) for outcome in outcomes]}
    (stage.out / RESULT).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    stage.tracker.metrics({**counts, **{f"pictures.{split}": count for split, count in found.about["counts"].items()}})
    for path in (stage.out / RESULT, DOCS / "index.html"):
        stage.tracker.artifact(path, "data_docs")
    for outcome in failed:
        if outcome.severity == "warning":
            stage.say(f"warning: {outcome.sentence}")
    if critical:
        head = f"{folder} fails {len(critical)} of {len(outcomes)} expectations (see {DOCS}/index.html)"
        raise DataError("\n  ".join([head, *(outcome.sentence for outcome in critical)]))
    stage.say(f"{len(outcomes)} expectations judged, {counts['warnings']} warnings; see {DOCS}/index.html")
    return counts


if __name__ == "__main__":
    run("validate", Config, main, out="artifacts/validation", kind="validation")
