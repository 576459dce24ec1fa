"""Every stage with tiny settings in a clone of its own: real DVC, real Ray, real MLflow, real Serve."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from dvc.repo import Repo

from diffusion_core import manifest

ROOT = Path(__file__).parents[1]
STAGES = 13
BUNDLES = ("artifacts/teacher", "artifacts/students/progressive", "artifacts/students/consistency")
pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600)]


def tiny(params: dict) -> dict:
    """The same pipeline, small enough to say only that it runs: far too little training to be good."""
    params["train_judge"] |= {"images": 6400}
    params["train_vae"]["codec"]["widths"] = [8, 8, 16]
    params["train_vae"]["plan"] |= {"images": 1280, "warm_up": 640}
    params["train"]["denoiser"]["net"] |= {"width": 32, "depth": 1, "heads": 2}
    params["train"]["plan"] |= {"images": 25600, "log_every": 6400, "checkpoint_every": 1280}
    params["distill"]["progressive"] |= {"start": 8, "stop": 4}
    for student in params["distill"].values():
        student["plan"] |= {"images": 640, "log_every": 320, "checkpoint_every": 320}
    for evaluation in params["evaluate"].values():
        evaluation |= {"count": 128, "calls": [4], "solvers": []}
    params["register"]["bounds"] = {"distance": 1e9, "accuracy": 0.0}
    params["deploy"] |= {"min_correct": 0, "requests": 20}
    return params


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone of this checkout as it stands, with tiny settings."""
    place = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / ".venv").symlink_to(sys.prefix)
    (place / "params.yaml").write_text(yaml.safe_dump(tiny(yaml.safe_load((ROOT / "params.yaml").read_text()))))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "Clone"]):
        subprocess.run([*git, *command], cwd=place, check=True)
    run(place, "-m", "dvc", "repro")
    yield place
    assert not living(place), "processes outlive the pipeline"


def run(place: Path, *words: str) -> str:
    """Run a Python module in the clone; the output of a failure is shown."""
    done = subprocess.run([sys.executable, *words], cwd=place, env=environment(place), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def environment(place: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}


def living(place: Path) -> list[psutil.Process]:
    """Processes that work in the clone."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(place):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def test_every_folder_is_whole_and_its_lineage_leads_back_to_the_data(checkout: Path) -> None:
    data = manifest.verify(checkout / "artifacts/data", "data").digest
    for name in BUNDLES:
        folder, seen = manifest.verify(checkout / name, "bundle"), set()
        waiting = dict(folder.parents)
        while waiting:
            parent, digest = waiting.popitem()
            found = manifest.verify(checkout / parent)
            assert found.digest == digest, f"{name} comes from another {parent}"
            seen.add(digest)
            waiting |= found.parents
        assert data in seen


def test_the_registry_and_the_endpoint_agree_on_the_champion(checkout: Path) -> None:
    decision = json.loads((checkout / "artifacts/registration/decision.json").read_text())
    smoke = json.loads((checkout / "artifacts/deployment/smoke.json").read_text())
    assert set(decision["versions"]) == {"teacher", "progressive", "consistency"}
    chosen = {"teacher": BUNDLES[0], "progressive": BUNDLES[1], "consistency": BUNDLES[2]}[decision["chosen"]]
    assert smoke["model"]["digest"] == manifest.read(checkout / chosen).digest


def test_one_pipeline_run_holds_one_finished_run_a_stage(checkout: Path) -> None:
    with sqlite3.connect(checkout / ".inkwell/mlflow.db") as database:
        runs = database.execute("select run_uuid, status from runs where lifecycle_stage = 'active'").fetchall()
        parents = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall())
        losses = database.execute(
            "select step from metrics join runs using (run_uuid) where name = 'train' and key = 'loss/denoiser'"
        ).fetchall()
        tags = {key for (key,) in database.execute("select distinct key from tags").fetchall()}
    assert len(parents) == STAGES and len(set(parents.values())) == 1
    assert all(status == "FINISHED" for run, status in runs if run in parents)
    assert sorted(losses) == [(6400,), (12800,), (19200,), (25600,)]  # images seen
    assert {"git.commit", "params.digest", "input.artifacts/latents", "output.digest"} <= tags


def test_a_second_repro_runs_nothing_and_a_changed_student_only_its_branch(checkout: Path) -> None:
    begun = time.monotonic()
    assert "Running stage" not in run(checkout, "-m", "dvc", "repro")
    assert time.monotonic() - begun < 15
    params = checkout / "params.yaml"
    before = params.read_text()
    changed = yaml.safe_load(before)
    changed["distill"]["consistency"]["method"]["huber"] = 0.05
    params.write_text(yaml.safe_dump(changed))
    status = json.loads(run(checkout, "-m", "dvc", "status", "--json"))
    params.write_text(before)
    assert list(status) == ["distill@consistency"]


def test_a_changed_parameter_touches_the_stages_that_declare_it_and_no_other(checkout: Path) -> None:
    """Every setting in turn, held against dvc.yaml as plain YAML."""
    declared: dict[str, list[str]] = {}
    for name, stage in yaml.safe_load((checkout / "dvc.yaml").read_text())["stages"].items():
        for item in stage.get("foreach", [None]):
            (section,) = stage.get("do", stage)["params"]
            section = section.replace("${item}", str(item)).replace("${key}", str(item))
            declared[name if item is None else f"{name}@{item}"] = section.split(".")
    params = checkout / "params.yaml"
    before = params.read_text()
    try:
        for section in declared.values():
            for setting in at(yaml.safe_load(before), section):
                changed = yaml.safe_load(before)
                at(changed, section)[setting] = "another"
                params.write_text(yaml.safe_dump(changed))
                with Repo(str(checkout)) as repo:
                    touched = {name.rpartition(":")[2] for name in repo.status()}
                assert touched == {name for name, other in declared.items() if other == section}, (section, setting)
    finally:
        params.write_text(before)


def at(params: dict, section: list[str]) -> dict:
    """One section of the settings."""
    for name in section:
        params = params[name]
    return params


def test_an_interrupted_training_leaves_no_process_and_resumes(checkout: Path) -> None:
    work, teacher = checkout / "work/train", checkout / "artifacts/teacher"
    before = manifest.read(teacher)
    command = [sys.executable, "-m", "pipelines.train"]
    running = subprocess.Popen(command, cwd=checkout, env=environment(checkout), start_new_session=True)
    wait_for(lambda: list(work.glob("step-*/manifest.json")), 120)
    os.killpg(running.pid, signal.SIGINT)  # what Ctrl-C does: the whole foreground group hears it
    assert running.wait(30) == 130
    wait_for(lambda: not living(checkout), 15)
    assert manifest.read(teacher) == before, "an interrupted stage touched what was published"
    kept = max(int(path.name.removeprefix("step-")) for path in work.glob("step-*"))
    assert kept > 0
    run(checkout, "-m", "pipelines.train")
    assert manifest.verify(teacher) == before, "the resumed run ended at other bytes than the undisturbed one"


def wait_for(condition, seconds: float) -> None:  # noqa: ANN001
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing within {seconds} s"
        time.sleep(0.1)
