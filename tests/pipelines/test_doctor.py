"""The doctor in small checkouts: what it restores byte for byte, what it sweeps, and what it only names."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_core import manifest
from pipelines import doctor
from pipelines.stage import holding

GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
ENTRY = """\
  {name}:
    cmd: python -m pipelines.{name}
    deps:
    - path: pipelines/{name}.py
      hash: md5
      md5: {digest}
      size: 123
    params:
      params.yaml:
        {name}:
          number: {number}
    outs:
    - path: artifacts/{name}
      hash: md5
      md5: {digest}.dir
      size: 4567
      nfiles: 12
    - path: artifacts/{name}_docs
      hash: md5
      md5: {digest}.dir
"""


def lock(**stages: int) -> str:
    """A dvc.lock as DVC writes it, with one number a stage."""
    entries = (ENTRY.format(name=name, number=number, digest=f"{number:031x}a") for name, number in stages.items())
    return "schema: '2.0'\nstages:\n" + "".join(entries)


WHOLE = lock(prepare=1, validate=2, train=3)


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three stages that have run, with their lock in git and DVC's own table empty."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text("stages: {prepare: {cmd: a}, validate: {cmd: b}, train: {cmd: c}}\n")
    Path("dvc.lock").write_text(WHOLE)
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "State"]):
        subprocess.run([*GIT, *words], check=True)
    Path(".dvc/tmp").mkdir(parents=True)
    doctor.RWLOCK.write_text('{"write": {}, "read": {}}')
    return tmp_path


def test_a_sound_checkout_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    assert capsys.readouterr().out == "nothing is wrong\n"
    assert Path("dvc.lock").read_text() == WHOLE


def test_elsewhere_than_in_a_checkout_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert doctor.main() == 2


def test_a_lock_cut_anywhere_is_restored_byte_for_byte(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [at + 1 for at, letter in enumerate(WHOLE) if letter == "\n"][:-1]
    for cut in [0, *lines, *random.Random(0).sample(range(1, len(WHOLE)), 20)]:
        Path("dvc.lock").write_text(WHOLE[:cut])
        assert doctor.main() == 0
        assert Path("dvc.lock").read_text() == WHOLE, f"cut at {cut}"
        assert "dvc.lock is " in capsys.readouterr().out
    Path("dvc.lock").unlink()
    assert doctor.main() == 0 and Path("dvc.lock").read_text() == WHOLE
    Path("dvc.lock").write_bytes(b"\xff\xfe\0")
    assert doctor.main() == 0 and Path("dvc.lock").read_text() == WHOLE


def test_what_git_does_not_have_comes_from_the_last_stages_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two, the one with which DVC would run less; and what is whole of the torn one is newer than both."""
    copy = lock(prepare=7, validate=8, train=3)
    Path(".inkwell").mkdir()
    Path(".inkwell/dvc.lock").write_text(copy)
    monkeypatch.setattr(doctor, "_changed", lambda raw: float(raw.decode() != copy))
    Path("dvc.lock").write_text("")
    assert doctor.main() == 0 and Path("dvc.lock").read_text() == copy

    now = lock(prepare=7, validate=9, train=10)
    Path("dvc.lock").write_text(now[: now.index("  train:") + 20])
    monkeypatch.setattr(doctor, "_changed", lambda raw: 0.0)
    assert doctor.main() == 0
    restored = doctor.read_lock(Path("dvc.lock").read_bytes())
    numbers = {name: entry["params"]["params.yaml"][name]["number"] for name, entry in restored.stages.items()}
    assert not restored.defect and numbers["train"] == 3 and numbers["prepare"] in (1, 7)


def test_a_stage_that_dvc_yaml_no_longer_has_is_not_missed() -> None:
    Path("dvc.yaml").write_text("stages: {prepare: {cmd: a}, validate: {cmd: b}}\n")
    Path("dvc.lock").write_text(lock(prepare=1, validate=2))
    assert doctor.main() == 0 and Path("dvc.lock").read_text() == lock(prepare=1, validate=2)


def test_nothing_to_restore_from_is_no_fault(tmp_path: Path) -> None:
    subprocess.run([*GIT, "rm", "-q", "dvc.lock"], check=True)
    subprocess.run([*GIT, "commit", "-q", "-m", "None"], check=True)
    assert doctor.main() == 0 and not Path("dvc.lock").exists()


def held_by(pid: int) -> str:
    return json.dumps({"write": {"out": {"pid": pid, "cmd": "dvc repro"}}, "read": {"in": [{"pid": pid, "cmd": "x"}]}})


def gone() -> int:
    """The number of a process that has just ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


TABLES: dict[str, tuple[Callable[[], str], bool]] = {
    "torn": (lambda: '{"write": {"a": {"pi', False),
    "emptied": (lambda: "", False),
    "of another form": (lambda: '{"write": [1]}', False),
    "of a process that is gone": (lambda: held_by(gone()), False),
    "of one at work": (lambda: held_by(os.getpid()), True),
}


@pytest.mark.parametrize("case", TABLES)
def test_dvcs_own_table_is_removed_unless_somebody_is_at_work(case: str) -> None:
    text, stays = TABLES[case]
    doctor.RWLOCK.write_text(text())
    assert doctor.main() == 0
    assert doctor.RWLOCK.exists() == stays


def test_a_number_that_was_given_again_holds_nothing() -> None:
    doctor.RWLOCK.write_text(held_by(os.getpid()))
    os.utime(doctor.RWLOCK, (1, 1))  # written long before this process was there
    assert doctor.main() == 0 and not doctor.RWLOCK.exists()


def test_a_draft_is_swept_unless_its_stage_is_at_work() -> None:
    for name in ("prepare", "train"):
        Path(f".inkwell/drafts/{name}").mkdir(parents=True)
    with holding("train"):
        assert doctor.main() == 0
    assert [path.name for path in Path(".inkwell/drafts").iterdir()] == ["train"]


def test_an_altered_folder_is_named_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("artifacts/students/one")
    folder.mkdir(parents=True)
    (folder / "rows").write_text("abc")
    manifest.seal(folder, "bundle", {})
    assert doctor.main() == 0
    (folder / "rows").write_text("abd")
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "artifacts/students/one/rows has SHA-256" in said and "dvc checkout --force artifacts/students/one" in said


def test_a_package_of_another_version_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    pins = f'pytest=={pytest.__version__} \\\n    --hash=sha256:0\nnot-there==1.0 ; sys_platform == "win32" \\\n'
    Path("requirements.lock").write_text(pins)
    assert doctor.main() == 0
    Path("requirements.lock").write_text(f"{pins}pyyaml==0.1 \\\nnot-there-either==1.0 \\\n")
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "locked is 0.1" in said and "not-there-either is missing" in said
