"""The harness of the faults: what it writes, and that an outcome other than the expected one makes the command fail."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.faults import __main__ as command
from tests.faults.figure import Figure, SkippedError, share


def fault(run: Callable[[Path, int, bool], list[Figure]]) -> SimpleNamespace:
    return SimpleNamespace(FAULT="a fault", INJECTION="done so", OUTCOME="comes to this", run=run)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three made-up faults: one as expected, one not, one that cannot be done."""

    def skipped(place: Path, seed: int, full: bool) -> list[Figure]:
        raise SkippedError("it needs root")

    faults = {
        "F1": fault(lambda place, seed, full: [share("found", [True] * (20 if full else 2))]),
        "F2": fault(lambda place, seed, full: [Figure("writers at once", 2, "", "<= 1")]),
        "F3": fault(skipped),
    }
    monkeypatch.setattr(command, "FAULTS", faults)
    monkeypatch.setattr(command, "PAGE", tmp_path / "faults.md")
    monkeypatch.setattr(command, "TWIN", tmp_path / "faults.json")
    return tmp_path / "faults.md"


def test_the_page_and_its_twin_say_what_was_measured(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "7")
    assert command.main([]) == 1
    rows = {row["name"]: row for row in json.loads(command.TWIN.read_text())}
    assert rows["F1: found, 2 of 2"]["measured"] == 100 and rows["F1: found, 2 of 2"]["ok"]
    assert not rows["F2: writers at once"]["ok"]
    assert rows["F3: a fault"]["skipped"] == "it needs root" and rows["F3: a fault"]["ok"]
    assert {row["command"] for row in rows.values()} == {f"make faults F=F{n} SEED=7" for n in (1, 2, 3)}
    lines = [line for line in page.read_text().splitlines() if line.startswith("| F")]
    assert len(lines) == 3 and "**missed**" in lines[1] and "skipped: it needs root" in lines[2]


def test_one_fault_replaces_its_own_rows_alone(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main([]) == 1
    monkeypatch.setenv("FULL", "1")
    assert command.main(["f1"]) == 0
    names = [row["name"] for row in json.loads(command.TWIN.read_text())]
    assert names == ["F1: found, 20 of 20", "F2: writers at once", "F3: a fault"]


def test_an_unknown_fault_is_refused_with_the_nearest_name(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["F4"]) == 2
    assert "allowed: F1, F2, F3" in capsys.readouterr().out and not page.exists()
