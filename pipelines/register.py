"""Stage register: every judged model becomes a version with its lineage; the best that passes the gate is promoted.

A version is known by the digests of its bundle and of its passport, so running the stage again adds nothing.
No alias moves before every model was checked: if none passes, both stay where they were.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_core import manifest
from diffusion_core.errors import ConfigError, DataError, GateError, IntegrityError
from diffusion_core.manifest import Manifest
from pipelines.gate import Bounds, Score, Verdict, choose, examine, promote
from pipelines.models import BUNDLES
from pipelines.stage import STATE, Stage, run
from pipelines.tracking.registry import Registry, Version

GIVEN = (
    "git.commit",
    "dvc.lock.digest",
    "params.digest",
    "pipeline",
)  # tags of the stage's run that go to every version
LINEAGE = {"data.digest": "artifacts/data", "codec.digest": "artifacts/codec"}


@dataclass(frozen=True)
class Config:
    """The registered model's name, the gate's bounds, and by how many U a model may be worse than the champion."""

    model: str = "digits"
    bounds: Bounds = Bounds(distance=0.8, accuracy=0.95)
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if not self.model or set(self.model) & set("/:@' "):
            raise ConfigError(f"model is {self.model!r}; a name without / : @ ' and spaces is wanted")
        if self.tolerance < 0:
            raise ConfigError(f"tolerance is {self.tolerance}; a number of U from 0 up is wanted")


@dataclass(frozen=True)
class Entry:
    """One judged model: its bundle's folder, its score, and the tags its version carries."""

    folder: Path
    score: Score
    tags: dict[str, str]

    @property
    def key(self) -> dict[str, str]:
        """The tags that make two registrations the same one."""
        return {name: self.tags[name] for name in ("bundle.digest", "passport.digest")}


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Register all models, choose and promote; raises GateError with every reason if none passes."""
    registry = Registry.connect(STATE.resolve())
    stage.tracker.flush()  # the runs that made the bundles may still be on their way to the registry
    entries = [_entry(stage, name, folder) for name, folder in BUNDLES.items()]
    before = registry.alias(config.model, "champion")
    verdicts = {
        entry.score.name: examine(entry.score, config.bounds, _score(before), config.tolerance) for entry in entries
    }
    versions = {entry.score.name: _register(registry, config.model, entry, stage) for entry in entries}
    for name, verdict in verdicts.items():
        registry.tag(versions[name], {"gate": "; ".join(verdict.reasons) or "passed"})
        for sentence in verdict.reasons + verdict.notes:
            stage.say(sentence)
    passed = [entry.score for entry in entries if verdicts[entry.score.name].passed]
    if not passed:
        raise GateError("no model passes the gate: " + "; ".join(r for v in verdicts.values() for r in v.reasons))

    chosen = choose(passed)
    champion, kept = _promote(registry, versions[chosen.name], chosen, config)
    stage.say(f"{config.model}@candidate is {versions[chosen.name]} ({chosen.name}), @champion is {champion}")
    stage.tracker.tags({"candidate": versions[chosen.name].number, "champion": champion.number})
    decision = {
        "model": config.model,
        "registry": registry.store.identity,
        "chosen": chosen.name,
        "versions": {name: version.number for name, version in versions.items()},
        "candidate": versions[chosen.name].number,
        "champion": champion.number,
        "previous_champion": before.number if before else None,
        "scores": {entry.score.name: asdict(entry.score) for entry in entries},
        "reasons": {name: list(verdict.reasons) for name, verdict in verdicts.items()},
        "notes": [note for verdict in verdicts.values() for note in verdict.notes] + list(kept.reasons),
        "bounds": asdict(config.bounds) | {"tolerance": config.tolerance},
    }
    path = stage.out / "decision.json"
    path.write_text(json.dumps(decision, indent=1, sort_keys=True) + "\n")
    stage.tracker.artifact(path)
    return {key: decision[key] for key in ("model", "registry", "chosen", "candidate", "champion")}


def _promote(registry: Registry, candidate: Version, score: Score, config: Config) -> tuple[Version, Verdict]:
    """Move the aliases; gives the version that is champion afterwards and why it is not the candidate, if so."""
    registry.set_alias(candidate, "candidate")
    champion = registry.alias(config.model, "champion")  # asked again: somebody may have moved it meanwhile
    if champion is not None and champion.number == candidate.number:
        return champion, Verdict()
    standing = _score(champion)
    verdict = examine(score, config.bounds, standing, config.tolerance)
    if not verdict.passed:
        raise GateError(f"{candidate} is not promoted: " + "; ".join(verdict.reasons))
    kept = promote(score, standing, config.tolerance)
    if champion is not None and not kept.passed:
        return champion, kept
    registry.set_alias(candidate, "champion")
    return candidate, Verdict()


def _register(registry: Registry, model: str, entry: Entry, stage: Stage) -> Version:
    """The version of this bundle and evaluation, stored now if it is not there."""
    if found := registry.find(model, entry.key):
        return found
    trained = registry.run_that_made(entry.tags["bundle.digest"]) or stage.tracker.run_id
    evaluated = registry.run_that_made(entry.tags["evaluation.digest"])
    tags = entry.tags | ({"evaluation.run": evaluated} if evaluated else {})
    return registry.register(model, entry.folder, trained, tags)


def _entry(stage: Stage, name: str, folder: str) -> Entry:
    """Check a model's bundle and evaluation and read what was measured of it."""
    bundle, made = stage.input(folder, "bundle")
    evaluation, judged = stage.input(f"artifacts/evaluation/{name}", "evaluation")
    path = evaluation / "metrics.json"
    try:
        measured = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    if (found := judged.about["bundle"]) != made.digest:
        raise IntegrityError(f"{evaluation} judged bundle {found}; {bundle} is {made.digest}")
    score = Score.of(measured | {"name": name}, str(path))
    lineage = ancestors(made)
    tags = {
        "bundle.digest": made.digest,
        "evaluation.digest": judged.digest,
        "passport.digest": judged.about["passport"],
        **{tag: lineage[parent] for tag, parent in LINEAGE.items() if parent in lineage},
        **{tag: value for tag, value in stage.tracker.given.items() if tag in GIVEN},
        **score.tags(),
    }
    return Entry(bundle, score, tags)


def ancestors(made: Manifest) -> dict[str, str]:
    """Every folder that a manifest comes from, with its digest, as far back as the folders still are what they were."""
    found: dict[str, str] = {}
    for folder, digest in made.parents.items():
        found[folder] = digest
        if (Path(folder) / manifest.NAME).exists() and (parent := manifest.read(Path(folder))).digest == digest:
            found |= ancestors(parent)
    return found


def _score(version: Version | None) -> Score | None:
    """The score a version was registered with, under the version's name."""
    return Score.of_tags(version.tags) if version else None


if __name__ == "__main__":
    run("register", Config, main, out="artifacts/registration", kind="registration")
