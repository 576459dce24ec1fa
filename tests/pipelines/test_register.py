"""Register and its gate, against a real MLflow on SQLite: what is promoted, what is refused, and in which words."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from diffusion_core import manifest
from diffusion_core.errors import ConfigError, GateError, IntegrityError, UnreachableError
from diffusion_core.spec import build
from pipelines.gate import Bounds, Score, choose, examine, promote
from pipelines.register import BUNDLES, Config, main
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from pipelines.tracking.registry import Registry
from tests.pipelines.stores import client_of, fresh_state, make_template

METRIC = "FD (digits-cnn, 1234abcd)"
GOOD = {"teacher": (0.2, 50), "progressive": (0.5, 4), "consistency": (0.3, 2)}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout with its own registry."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    fresh_state(template, tmp_path)
    return tmp_path


@pytest.fixture
def stage(root: Path) -> Iterator[Stage]:
    tracker = Tracker.start("register", root / ".inkwell", {"git.commit": "abc", "pipeline": "d" * 64}, print)
    (root / "draft").mkdir()
    yield Stage("register", root / "draft", root / "work", tracker, Console(quiet=True))
    tracker.close("FINISHED")


def score(name: str, distance: float, calls: int, **other: object) -> Score:
    measured = {"metric": METRIC, "unit": 12.5, "count": 1440, "accuracy": 0.98}
    return build(Score, measured | {"name": name, "distance_u": distance, "calls": calls} | other, "test")


def judged(models: dict[str, tuple[float, int]], **other: object) -> dict[str, str]:
    """Write bundles and evaluations as the earlier stages do; gives the bundles' digests."""
    data, codec, digests = Path("artifacts/data"), Path("artifacts/codec"), {}
    for folder, parents in ((data, []), (codec, [data])):
        folder.mkdir(parents=True, exist_ok=True)
        manifest.seal(folder, folder.name, {}, parents={str(p): manifest.read(p).digest for p in parents})
    for name, (distance, calls) in models.items():
        bundle, evaluation = Path(BUNDLES[name]), Path("artifacts/evaluation") / name
        bundle.mkdir(parents=True, exist_ok=True)
        evaluation.mkdir(parents=True, exist_ok=True)
        (bundle / "denoiser.safetensors").write_bytes(name.encode() * 100 + str(distance).encode())
        made = manifest.seal(bundle, "bundle", {}, parents={str(codec): manifest.read(codec).digest})
        digests[name] = made.digest
        measured = {
            "name": name,
            "metric": METRIC,
            "distance_u": distance,
            "unit": 12.5,
            "count": 1440,
            "accuracy": 0.98,
            "calls": calls,
            "seconds_per_image": 0.01,
        }
        (evaluation / "metrics.json").write_text(json.dumps(measured | other))
        manifest.seal(evaluation, "evaluation", {"bundle": made.digest, "passport": f"{made.digest} {distance}"})
    return digests


def aliases(root: Path) -> dict[str, str]:
    return {
        alias: str(number)
        for alias, number in client_of(root / ".inkwell").get_registered_model("digits").aliases.items()
    }


def test_the_cheapest_model_that_passes_is_promoted_with_its_lineage(root: Path, stage: Stage) -> None:
    digests = judged(GOOD)
    about = main(Config(), stage)
    decision = json.loads((stage.out / "decision.json").read_text())
    assert about["chosen"] == decision["chosen"] == "consistency"
    assert aliases(root) == {"candidate": decision["versions"]["consistency"], "champion": decision["champion"]}
    client = client_of(root / ".inkwell")
    version = client.get_model_version_by_alias("digits", "champion")
    assert version.tags["bundle.digest"] == digests["consistency"]
    assert version.tags["data.digest"] == manifest.read(Path("artifacts/data")).digest
    assert version.tags["codec.digest"] == manifest.read(Path("artifacts/codec")).digest
    assert (version.tags["git.commit"], version.tags["gate"]) == ("abc", "passed")
    found, folder = Registry.connect(root / ".inkwell").download("digits@champion", root / "served")
    assert str(found.number) == str(version.version)
    assert manifest.verify(folder, "bundle").digest == digests["consistency"]


def test_registering_twice_adds_nothing(root: Path, stage: Stage) -> None:
    judged(GOOD)
    main(Config(), stage)
    first = json.loads((stage.out / "decision.json").read_text())
    main(Config(), stage)
    again = json.loads((stage.out / "decision.json").read_text())
    assert again["versions"] == first["versions"] and again["champion"] == first["champion"]
    assert len(client_of(root / ".inkwell").search_model_versions("name = 'digits'")) == 3


def test_nothing_passes_and_nothing_moves(root: Path, stage: Stage) -> None:
    judged(GOOD)
    main(Config(), stage)
    before = aliases(root)
    judged({"teacher": (0.9, 50), "progressive": (0.93, 4), "consistency": (0.45, 2)})
    with pytest.raises(GateError) as refused:
        main(Config(), stage)
    assert "progressive: FD 0.93 U is above the bound 0.80 U" in str(refused.value)
    assert "consistency: FD 0.45 U is worse than the champion consistency's 0.30 U by more than 0.10 U" in str(
        refused.value
    )
    assert aliases(root) == before
    versions = client_of(root / ".inkwell").search_model_versions("name = 'digits'")
    assert len(versions) == 6
    assert sum(version.tags["gate"] != "passed" for version in versions) == 3


def test_a_dearer_model_becomes_candidate_but_not_champion(root: Path, stage: Stage) -> None:
    judged(GOOD)
    main(Config(), stage)
    champion = aliases(root)["champion"]
    judged({"teacher": (0.25, 50), "progressive": (0.9, 4), "consistency": (0.9, 2)})
    main(Config(), stage)
    decision = json.loads((stage.out / "decision.json").read_text())
    assert decision["chosen"] == "teacher"
    assert aliases(root) == {"candidate": decision["versions"]["teacher"], "champion": champion}
    assert any("50 network calls are more than the champion consistency's 2" in note for note in decision["notes"])


def test_an_evaluation_of_another_bundle_is_refused(root: Path, stage: Stage) -> None:
    judged(GOOD)
    swapped = Path(BUNDLES["teacher"])
    (swapped / "denoiser.safetensors").write_bytes(b"other weights")
    manifest.seal(swapped, "bundle", {})
    with pytest.raises(IntegrityError, match="artifacts/evaluation/teacher judged bundle"):
        main(Config(), stage)


def test_a_number_that_is_none_is_refused(root: Path, stage: Stage) -> None:
    judged(GOOD, accuracy=float("nan"))
    with pytest.raises(ConfigError, match=r"metrics.json.accuracy is nan"):
        main(Config(), stage)


def test_files_that_are_gone_are_stored_again(root: Path, stage: Stage) -> None:
    judged(GOOD)
    main(Config(), stage)
    client = client_of(root / ".inkwell")
    gone = client.get_model_version_by_alias("digits", "champion")
    folder = Path(gone.source.removeprefix("file://"))
    for file in folder.iterdir():
        file.unlink()
    main(Config(), stage)
    assert client.get_model_version_by_alias("digits", "champion").version != gone.version


def test_an_unknown_alias_names_those_there_are(root: Path, stage: Stage) -> None:
    judged(GOOD)
    main(Config(), stage)
    with pytest.raises(GateError, match="did you mean 'digits@champion'"):
        Registry.connect(root / ".inkwell").download("digits@champoin", root / "served")


def test_a_registry_that_fails_is_unreachable(root: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(GOOD)

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("the server went away")

    monkeypatch.setattr(MlflowClient, "create_model_version", fail)
    with pytest.raises(UnreachableError, match="the server went away"):
        main(Config(), stage)


def test_the_gate_compares_only_what_was_judged_alike() -> None:
    bounds, champion = Bounds(distance=0.8, accuracy=0.95), score("old", 0.2, 2)
    assert not examine(score("new", 0.5, 2), bounds, champion, 0.1).passed
    assert examine(score("new", 0.3, 2), bounds, champion, 0.1).passed
    other = examine(score("new", 0.5, 2, metric="FD (digits-cnn, ffff)"), bounds, champion, 0.1)
    assert other.passed and "not compared with the champion old: its metric is FD (digits-cnn, ffff)" in other.notes[0]
    assert not examine(score("new", 0.5, 2, accuracy=0.94), bounds, None, 0.1).passed


def test_the_gate_prefers_few_calls_and_then_small_distances() -> None:
    few, better, many = score("few", 0.5, 2), score("better", 0.4, 2), score("many", 0.1, 50)
    assert choose([many, few, better]) is better
    assert not promote(many, score("champion", 0.15, 2), 0.1).passed
    assert promote(many, score("champion", 0.35, 2), 0.1).passed


def test_a_score_survives_its_tags() -> None:
    one = score("a", 0.1 + 0.2, 4)
    assert Score.of_tags(one.tags()) == one
    assert Score.of_tags({"some": "other model's tags"}) is None


@pytest.mark.parametrize("wrong", [{"model": "a/b"}, {"tolerance": -1}, {"bounds": {"distance": 0, "accuracy": 1}}])
def test_wrong_bounds_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="register"):
        build(Config, wrong, "params.yaml: register")
