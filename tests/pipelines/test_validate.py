"""Validate as a stage: clean data pass, another schema or a broken judge closes the gate, and the run has the pages."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from diffusion_core.errors import ConfigError, DataError, IntegrityError
from diffusion_core.spec import build
from pipelines import validate
from pipelines.data import claims
from pipelines.data.index import INDEX
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from tests.pipelines.data_folder import make, reseal
from tests.pipelines.stores import client_of, fresh_state, make_template
from tests.pipelines.validating import CLASSES, DATA, DRAFT, VALIDATION, judge, pictures, real_stage


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of its own with clean data in place."""
    monkeypatch.chdir(tmp_path)
    make(DATA, pictures(), CLASSES)


def test_clean_data_pass_and_leave_a_report_for_people() -> None:
    result = judge()
    assert result["counts"] == {"expectations": len(result["outcomes"]), "failed": 0, "warnings": 0}
    assert all(outcome["held"] and not outcome["found"] for outcome in result["outcomes"])
    tables = {"columns", "pictures", "decoded", "exchange", "counts", "classes", "val"}
    assert {outcome["expectation"].split(".")[0] for outcome in result["outcomes"]} == tables
    pages = list(validate.DOCS.rglob("*.html"))
    assert {page.stem for page in pages if page.parent.name == "expectations"} == tables
    links = re.findall(
        r"[\"']((?:expectations|validations|static)/[^\"']+)", (validate.DOCS / "index.html").read_text()
    )
    assert {page.relative_to(validate.DOCS).as_posix() for page in pages} == {"index.html", *links} - {
        link for link in links if link.startswith("static")
    }
    assert all((validate.DOCS / link).exists() for link in links)
    assert sum(path.stat().st_size for path in validate.DOCS.rglob("*") if path.is_file()) < 2**20


COLUMNS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "a new column": (
        lambda t: t.append_column("mood", pa.array(["sad"] * 60)),
        r"index.parquet: mood \(string against nothing\)",
    ),
    "a missing column": (lambda t: t.drop_columns(["phash"]), r"index.parquet: phash \(nothing against string\)"),
    "a mistyped column": (
        lambda t: t.set_column(8, "label", t["label"].cast(pa.string())),
        r"index.parquet: label \(string against int64\)",
    ),
}


@pytest.mark.parametrize("drift", COLUMNS)
def test_another_schema_closes_the_gate(drift: str) -> None:
    change, sentence = COLUMNS[drift]
    pq.write_table(change(pq.read_table(DATA / INDEX)), DATA / INDEX)
    reseal(DATA)
    wanted = f"every column is there with its type, and no other, but 1 of 1. rows .*{sentence}"
    with pytest.raises(DataError, match=wanted):
        judge()


def test_columns_in_another_order_and_torn_tables_are_refused() -> None:
    table = pq.read_table(DATA / INDEX)
    pq.write_table(table.select(table.column_names[::-1]), DATA / INDEX)
    reseal(DATA)
    with pytest.raises(IntegrityError, match="index.parquet has the columns origin: string"):
        judge()
    (DATA / INDEX).write_bytes((DATA / INDEX).read_bytes()[:-9])
    reseal(DATA)
    with pytest.raises(IntegrityError, match="index.parquet cannot be read as Parquet"):
        judge()


def test_what_cannot_be_judged_has_failed_though_it_be_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(about: dict[str, Any], limits: claims.Limits, *, compared: bool) -> list[claims.Claim]:
        return [
            replace(claim, columns=("lost",)) if claim.rule == "contrast" else claim
            for claim in real(about, limits, compared=compared)
        ]

    real = claims.of_data
    monkeypatch.setattr(claims, "of_data", broken)
    with pytest.raises(DataError, match=r"decoded.lost .*of one colour, but it could not be judged \(.*lost"):
        judge(warnings=["contrast"])


def test_the_same_data_give_the_same_report() -> None:
    assert judge(decode_sample=8) == judge(decode_sample=8)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"decode_sample": 0}, "decode_sample 0"),
        ({"min_class_percent": 101.0}, "101"),
        ({"min_caption_percent": -1.0}, "-1"),
        ({"caption_length": [5, 4]}, r"caption_length \[5, 4\]"),
        ({"near_leak": {"distance": 17}}, r"near_leak: distance 17"),
        ({"near_leak": {"max_percent": 101.0}}, r"near_leak: max_percent 101"),
        ({"drift": {"size": -0.1}}, "drift: size -0.1"),
        ({"warnings": ["near_leek"]}, "did you mean 'near_leak'"),
        ({"warnings": ["key"]}, "'key' is no rule"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(validate.Config, params, "validate")


def test_the_real_stage_publishes_nothing_of_another_schema() -> None:
    change, sentence = COLUMNS["a mistyped column"]
    pq.write_table(change(pq.read_table(DATA / INDEX)), DATA / INDEX)
    reseal(DATA)
    done = real_stage("validate", "{decode_sample: 8}")
    assert done.returncode == 2
    assert re.search(sentence, done.stderr)
    assert "Traceback" not in done.stderr
    assert not VALIDATION.exists()
    assert (validate.DOCS / "index.html").exists()


def test_a_judge_that_falls_over_publishes_nothing() -> None:
    """A file stands where the Data Docs belong, so that Great Expectations' own work cannot be kept."""
    validate.DOCS.write_text("in the way")
    done = real_stage("validate", "{decode_sample: 8}")
    assert done.returncode == 1
    assert "NotADirectoryError" in done.stderr
    assert not VALIDATION.exists()
    assert list(Path("artifacts").glob(".data_docs*")) == []
    assert validate.DOCS.read_text() == "in the way"


def test_docs_half_built_are_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    judge(decode_sample=1)
    from great_expectations.data_context import EphemeralDataContext

    def fall_over(self: EphemeralDataContext, *given: Any, **named: Any) -> None:
        raise RuntimeError("out of pages")

    monkeypatch.setattr(EphemeralDataContext, "build_data_docs", fall_over)
    with pytest.raises(RuntimeError, match="out of pages"):
        judge(decode_sample=1)
    assert [path.name for path in Path("artifacts").iterdir()] == ["data"]


def test_the_run_in_mlflow_has_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    state = fresh_state(make_template(tmp_path), tmp_path / "own")
    tracker = Tracker.start("validate", state, {"pipeline": "c0ffee" * 8}, pytest.fail)
    out = DRAFT
    out.mkdir()
    validate.main(validate.Config(), Stage("validate", out, out, tracker, Console(quiet=True)))
    shutil.rmtree(validate.DOCS)  # the run has its own copy
    tracker.close("FINISHED")
    client = client_of(state)
    run = client.get_run(tracker.run_id)
    assert run.data.tags["data_docs"] == "data_docs/index.html"
    assert run.data.metrics["failed"] == 0 and run.data.metrics["pictures.train"] == 48
    site = Path(client.download_artifacts(tracker.run_id, "data_docs"))
    links = re.findall(r"[\"'](validations/[^\"']+)", (site / "index.html").read_text())
    assert links and all((site / link).is_file() for link in links)
    assert (
        json.loads(Path(client.download_artifacts(tracker.run_id, "result.json")).read_text())["counts"]["failed"] == 0
    )
    assert not (state / "journal" / "files" / tracker.journal.stem).exists()
