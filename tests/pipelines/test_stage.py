"""A stage as a process: what it refuses and with which code, one writer at a time, nothing left when it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from diffusion_core import manifest
from pipelines.processes import living
from tests.pipelines.stores import client_of, fresh_state, make_template

ROOT = Path(__file__).resolve().parents[2]
TINY = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from diffusion_core.errors import DataError
from diffusion_core.schedule import Linear, Schedule
from pipelines import launch
from pipelines.stage import run

@dataclass(frozen=True)
class Config:
    number: int
    act: str = "write"
    schedule: Schedule = Linear()

def linger(item):
    Path("ready").touch()
    time.sleep(120)

def main(config, stage):
    (stage.out / "half").write_text("half")
    if config.act == "wait":
        linger(0)
    if config.act == "linger":
        try:
            linger(0)
        finally:
            time.sleep(120)
    if config.act == "ray":
        list(launch.map(linger, [0], workers=1))
    if config.act == "refuse":
        raise DataError("the picture is torn; a whole one is wanted")
    if config.act == "bug":
        raise ZeroDivisionError("oh")
    if config.act == "read":
        stage.input("artifacts/before", "data")
    (stage.out / "half").rename(stage.out / "whole")
    stage.samples["whole"] = config.number
    stage.tracker.metrics({"loss": 0.5}, step=3)
    return {"number": config.number}

if __name__ == "__main__":
    run("tiny", Config, main, out="artifacts/tiny", kind="tiny")
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


class Place:
    """A checkout of one stage."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "tiny.py").write_text(TINY)
        self.params("tiny: {number: 5}")

    def params(self, text: str) -> None:
        (self.folder / "params.yaml").write_text(text)

    def start(self, *command: str, **more: object) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        command = command or (sys.executable, "tiny.py")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": ""}
        return subprocess.Popen(command, cwd=self.folder, env=environment, **pipes | more)

    def run(self) -> tuple[int, str]:
        """Exit code and what was said."""
        process = self.start()
        _, said = process.communicate(timeout=90)
        return process.returncode, said

    def wait(self, name: str, process: subprocess.Popen[str]) -> None:
        """Until the stage has written this file."""
        last = time.monotonic() + 90
        while not (self.folder / name).exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < last, f"{name} did not come"
            time.sleep(0.05)

    @property
    def out(self) -> Path:
        return self.folder / "artifacts/tiny"

    @property
    def drafts(self) -> list[Path]:
        return list((self.folder / ".inkwell/drafts").glob("*"))


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Iterator[Place]:
    fresh_state(template, tmp_path)
    yield Place(tmp_path)


def test_writes_a_sealed_folder_and_twice_the_same(place: Place) -> None:
    assert place.run()[0] == 0
    sealed = manifest.verify(place.out, "tiny")
    assert (place.out / "whole").read_text() == "half"
    assert sealed.about == {"number": 5} and sealed.files["whole"].samples == 5
    assert sealed.config == manifest.digest_of({"number": 5, "act": "write", "schedule": {"kind": "linear"}})
    assert place.run()[0] == 0
    assert manifest.verify(place.out).digest == sealed.digest
    assert not place.drafts
    client = client_of(place.folder / ".inkwell")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    tracked = [run for run in runs if run.data.tags.get("output.digest") == sealed.digest]
    assert len(tracked) == 2
    assert tracked[0].data.metrics["loss"] == 0.5 and tracked[0].data.params["schedule.kind"] == "linear"


REFUSED = {
    "unknown key": ("tiny: {number: 5, acct: x}", ["params.yaml: tiny.acct is unknown", "did you mean 'act'"]),
    "unknown key, deep": (
        "tiny: {number: 5, schedule: {kind: cosine, shfit: 0.1}}",
        ["params.yaml: tiny.schedule.shfit is unknown", "did you mean 'shift'"],
    ),
    "unknown kind": ("tiny: {number: 5, schedule: {kind: linaer}}", ["tiny.schedule.kind", "did you mean 'linear'"]),
    "wrong type": ("tiny: {number: five}", ["params.yaml: tiny.number is 'five' (str)", "type int is wanted"]),
    "bool for int": ("tiny: {number: true}", ["params.yaml: tiny.number is True (bool)"]),
    "nothing given": ("tiny:", ["params.yaml: tiny is None"]),
    "key missing": ("tiny: {act: write}", ["params.yaml: tiny lacks number"]),
    "section missing": ("tinny: {number: 5}", ["params.yaml: lacks 'tiny'", "did you mean 'tinny'"]),
    "no YAML": ("tiny: {number: [", ["params.yaml is not valid YAML"]),
    "a tag that runs code": ("tiny: !!python/object/apply:os.system [touch ran]", ["params.yaml is not valid YAML"]),
    "empty": ("", ["params.yaml: lacks 'tiny'"]),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_parameter_is_one_sentence_and_code_2(place: Place, text: str, words: list[str]) -> None:
    place.params(text)
    code, said = place.run()
    assert code == 2
    assert said.startswith("tiny: ") and "Traceback" not in said
    assert all(word in said for word in words), said
    assert not place.out.exists() and not place.drafts and not (place.folder / "ran").exists()


def test_params_missing_altogether(place: Place) -> None:
    (place.folder / "params.yaml").unlink()
    code, said = place.run()
    assert code == 2 and f"{place.folder}/params.yaml is missing" in said and "root of the checkout" in said


@pytest.mark.parametrize(("act", "code"), [("refuse", 2), ("bug", 1)])
def test_an_error_leaves_the_old_output_and_no_draft(place: Place, act: str, code: int) -> None:
    assert place.run()[0] == 0
    before = manifest.verify(place.out).digest
    place.params(f"tiny: {{number: 6, act: {act}}}")
    found, said = place.run()
    assert found == code
    assert ("ZeroDivisionError: oh" in said and "Traceback" in said) == (act == "bug")
    assert ("tiny: the picture is torn; a whole one is wanted\n" in said) == (act == "refuse")
    assert manifest.verify(place.out).digest == before and not place.drafts


def test_an_altered_input_is_refused_by_name(place: Place) -> None:
    before = place.folder / "artifacts/before"
    before.mkdir(parents=True)
    (before / "rows.txt").write_text("abc")
    place.params("tiny: {number: 5, act: read}")
    code, said = place.run()
    assert code == 2 and "artifacts/before has no manifest.json: it was never finished" in said
    sealed = manifest.seal(before, "data", {})
    assert place.run()[0] == 0
    assert manifest.verify(place.out).parents == {"artifacts/before": sealed.digest}
    (before / "rows.txt").write_text("abd")
    code, said = place.run()
    assert code == 2 and "artifacts/before/rows.txt has SHA-256" in said


def test_one_writer_at_a_time_and_a_killed_one_holds_nothing(place: Place) -> None:
    place.params("tiny: {number: 5, act: wait}")
    first = place.start()
    place.wait("ready", first)
    try:
        code, said = place.run()
        assert code == 2 and f"another 'tiny' is running (process {first.pid})" in said
        assert place.drafts  # those of the first, not taken away by the second
    finally:
        first.kill()
        first.communicate()
    place.params("tiny: {number: 5}")
    assert place.run()[0] == 0
    assert manifest.verify(place.out) and not place.drafts


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_half_written_output(place: Place, sent: signal.Signals, code: int) -> None:
    assert place.run()[0] == 0
    before = manifest.verify(place.out).digest
    place.params("tiny: {number: 6, act: wait}")
    process = place.start()
    place.wait("ready", process)
    assert (place.drafts[0] / "half").exists()
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in said
    assert manifest.verify(place.out).digest == before and not place.drafts
    place.params("tiny: {number: 6}")
    assert place.run()[0] == 0
    assert manifest.verify(place.out).about == {"number": 6}


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_no_process_of_a_cluster_outlives_its_stage(place: Place, sent: signal.Signals, code: int) -> None:
    place.params("tiny: {number: 6, act: ray}")
    process = place.start(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    place.wait("ready", process)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) > 3
    process.send_signal(sent)
    try:
        assert process.wait(60) == code
        last = time.monotonic() + 20
        while (alive := list(filter(living, below))) and time.monotonic() < last:
            time.sleep(0.1)
        assert not alive
    finally:
        for one in filter(living, below):
            one.kill()
    assert not place.out.exists() and not place.drafts


def test_a_stage_ends_with_its_parent(place: Place) -> None:
    """As when `dvc repro` is killed outright: its shell and our stage must not write on."""
    place.params("tiny: {number: 6, act: wait}")
    starter = "import subprocess, sys; subprocess.run([sys.executable, 'tiny.py'])"
    parent = place.start(sys.executable, "-c", starter)
    place.wait("ready", parent)
    (stage,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.communicate()
    last = time.monotonic() + 20
    while living(stage) and time.monotonic() < last:
        time.sleep(0.1)
    assert not living(stage) and not place.drafts
    assert not place.out.exists()


def test_a_stage_whose_parent_was_gone_before_it_asked_writes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when `dvc repro` is killed while the stage still loads its modules."""
    monkeypatch.setenv("DVC_STAGE", "tiny")
    late = "import os, sys, time; time.sleep(1.5); os.execv(sys.executable, [sys.executable, 'tiny.py'])"
    starter = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {late!r}]).pid, flush=True)"
    parent = place.start(sys.executable, "-c", starter)
    stage = psutil.Process(int(parent.stdout.readline()))
    parent.wait(30)
    last = time.monotonic() + 60
    while living(stage) and time.monotonic() < last:
        time.sleep(0.1)
    parent.communicate()
    assert not living(stage)
    assert not place.out.exists() and not place.drafts


def test_under_dvc_a_stage_with_its_parent_writes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "tiny")
    starter = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, 'tiny.py']).returncode)"
    parent = place.start(sys.executable, "-c", starter)
    _, said = parent.communicate(timeout=90)
    assert parent.returncode == 0, said
    assert manifest.verify(place.out)


def test_an_interrupted_stage_that_will_not_end_is_ended(place: Place) -> None:
    place.params("tiny: {number: 6, act: linger}")
    process = place.start(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    place.wait("ready", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    place.params("tiny: {number: 6}")
    assert place.run()[0] == 0
    assert manifest.verify(place.out).about == {"number": 6} and not place.drafts


def test_dvcs_lock_is_kept_as_it_was_when_the_stage_began(place: Place) -> None:
    (place.folder / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    assert place.run()[0] == 0
    assert (place.folder / ".inkwell/dvc.lock").read_text() == "schema: '2.0'\nstages: {}\n"
