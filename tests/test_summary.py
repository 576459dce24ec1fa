"""The demo's last table, on made-up files: what it prints, and that a missed bound fails the command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_core.errors import IntegrityError
from infra.local import summary

ROOT = Path(__file__).resolve().parents[1]
RIVAL = "against the teacher's own best"
GOOD = {
    "teacher": {1: 4.7, 2: 1.2, 4: 0.45, 50: 0.20},
    "progressive": {4: 0.40},
    "consistency": {1: 0.41, 2: 0.28, 4: 0.24},
}


def write(folder: Path, distances: dict[str, dict[int, float]], accuracy: float = 0.99, p50: float = 31.0) -> None:
    """A finished pipeline, as far as the table looks."""
    files: dict[str, Any] = {
        "artifacts/registration/decision.json": {
            "versions": {"teacher": 1, "progressive": 2, "consistency": 3},
            "champion": 3,
            "chosen": "consistency",
        },
        "artifacts/deployment/smoke.json": {"p50_ms": p50},
    }
    for model, by_calls in distances.items():
        rows = {str(calls): {"distance_u": d, "distance_val_u": 1.1 * d} for calls, d in by_calls.items()}
        content = {"metric": "FD (digits-cnn, 0123456789)", "unit": 1.5, "accuracy": accuracy, "by_calls": rows}
        files[f"artifacts/evaluation/{model}/metrics.json"] = content
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / ".inkwell").mkdir()
    (folder / summary.TIMES).write_text("demo_started 1000\nrepro_started 1120\nrepro_ended 1600\n")


@pytest.fixture
def show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], tuple[int, str]]:
    """Print the table in a folder of its own; gives the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run() -> tuple[int, str]:
        code = summary.main()
        return code, capsys.readouterr().out

    return run


def line(text: str, name: str) -> list[str]:
    """The cells of one row."""
    (found,) = [row for row in text.splitlines() if row.strip().startswith(name)]
    return found.strip().removeprefix(name).split()


def test_all_inside(tmp_path: Path, show: Callable[[], tuple[int, str]]) -> None:
    write(tmp_path, GOOD)
    code, text = show()
    assert code == 0
    assert line(text, "make demo, from clone to here") == ["600", "s", "≤", "960", "s", "yes"]
    assert line(text, "of it in dvc repro") == ["480", "s", "≤", "720", "s", "yes"]
    assert line(text, "teacher, 50 calls") == ["0.20", "U", "≤", "0.60", "U", "yes"]
    assert line(text, "accuracy of the champion (consistency)") == ["99.0", "%", "≥", "95.0", "%", "yes"]
    assert line(text, "consistency to the held-out pictures, 1 call") == ["0.45", "U"]
    assert "11 of 11 figures hold" in text
    assert "artifacts/evaluation/consistency/grid.png" in text
    assert '"b64_json":"\\([^"]*\\)"' in text  # the console takes square brackets for markup


@pytest.mark.parametrize(
    ("model", "calls", "distance", "missed"),
    [
        ("teacher", 50, 0.601, {"teacher, 50 calls"}),
        ("progressive", 4, 0.46, {f"progressive {RIVAL}, 4 calls"}),
        ("consistency", 2, 0.61, {f"consistency {RIVAL}, 2 calls"}),
        ("consistency", 1, 1.21, {"consistency student, 1 call", f"consistency {RIVAL}, 1 call"}),
        ("teacher", 1, 2.0, {f"consistency {RIVAL}, 1 call"}),
    ],
)
def test_a_missed_bound_is_named_and_fails(
    model: str, calls: int, distance: float, missed: set[str], tmp_path: Path, show: Callable[[], tuple[int, str]]
) -> None:
    write(tmp_path, GOOD | {model: GOOD[model] | {calls: distance}})
    code, text = show()
    assert code == 1
    refused = [row.strip() for row in text.splitlines() if row.rstrip().endswith("NO")]
    assert {name for name in missed for row in refused if row.startswith(name)} == missed
    assert len(refused) == len(missed)
    assert f"{11 - len(missed)} of 11 figures hold" in text


def test_a_slow_endpoint_and_a_confused_champion_fail(tmp_path: Path, show: Callable[[], tuple[int, str]]) -> None:
    write(tmp_path, GOOD, accuracy=0.949, p50=150.4)
    code, text = show()
    assert code == 1
    assert "9 of 11 figures hold" in text


def test_a_pipeline_run_by_hand_has_no_times(tmp_path: Path, show: Callable[[], tuple[int, str]]) -> None:
    write(tmp_path, GOOD)
    (tmp_path / summary.TIMES).unlink()
    code, text = show()
    assert code == 0
    assert "make demo, from" not in text
    assert "9 of 9 figures hold" in text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "infra.local.summary"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "artifacts/evaluation/teacher/metrics.json is missing" in ran.stdout


def test_an_earlier_champion_may_stand() -> None:
    decision = {"versions": {"teacher": 4, "consistency": 6}, "champion": 3, "chosen": "consistency"}
    assert summary.champion_of(decision) == "consistency"
    with pytest.raises(IntegrityError, match="lacks 'champion'"):
        summary.champion_of({"versions": {"teacher": 4}})
