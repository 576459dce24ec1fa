"""Tracking: nothing lost, nothing doubled, nobody waits. MLflow itself, through its own client, is the oracle."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from diffusion_core.errors import UnreachableError
from pipelines.tracking import Journal, Tracker, identity, sender, store
from pipelines.tracking.outbox import Outbox
from pipelines.tracking.store import Address
from tests.pipelines.stores import client_of, fresh_state, make_template

TAGS = {"pipeline": "c0ffee" * 8, "git.commit": "abc"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def state(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return fresh_state(template, tmp_path)


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A port that accepts connections and never says a word."""
    with ExitStack() as held, socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    held.enter_context(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def start(state: Path, name: str = "train", said: list[str] | None = None) -> Tracker:
    return Tracker.start(name, state, TAGS, (said if said is not None else []).append)


def points(client: MlflowClient, run: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run, key)]


def runs_of(client: MlflowClient, role: str) -> list:
    experiment = client.get_experiment_by_name("inkwell")
    return client.search_runs([experiment.experiment_id], f"tags.role = '{role}'")


def test_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    program = (
        "import sys; from pathlib import Path; from pipelines.tracking import Journal\n"
        "for step in range(400): Journal(Path(sys.argv[1])).metrics({sys.argv[2] * 50: step}, step)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), word]) for word in ("a", "b")]
    assert [writer.wait(30) for writer in writers] == [0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for word in ("a", "b"):
        assert [line["step"] for line in lines if word * 50 in line["values"]] == list(range(400))


def test_everything_said_arrives_once_under_one_parent(state: Path, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = start(state, said=said)
    tracker.params({f"p{i}": str(i) for i in range(150)})
    for step in range(1200):
        tracker.metrics({"loss": 1 / (step + 1), "rate": 0.5}, step)
    Journal(tracker.journal).metrics({"from.worker": 7.0}, 3)
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"pixels as they were")
    tracker.artifact(picture, "samples")
    picture.unlink()
    tracker.tags({"output.digest": "one"})
    tracker.tags({"output.digest": "two"})
    tracker.close("FINISHED")
    second = start(state, "evaluate.teacher", said)
    second.close("FAILED")

    client = client_of(state)
    (parent,) = runs_of(client, "pipeline")
    run = client.get_run(tracker.run_id)
    assert sorted(points(client, tracker.run_id, "loss")) == [(step, 1 / (step + 1)) for step in range(1200)]
    assert points(client, tracker.run_id, "from.worker") == [(3, 7.0)]
    assert run.data.params == {f"p{i}": str(i) for i in range(150)}
    assert (run.info.run_name, run.info.status, run.data.tags["output.digest"]) == ("train", "FINISHED", "two")
    assert Path(client.download_artifacts(tracker.run_id, "samples/grid.png")).read_bytes() == b"pixels as they were"
    assert (parent.info.run_name, parent.info.status) == ("pipeline c0ffeec0", "FAILED")
    assert {one.data.tags["mlflow.parentRunId"] for one in runs_of(client, "stage")} == {parent.info.run_id}
    assert said == []
    assert not list((state / "journal" / "files").iterdir())


def test_a_silent_server_costs_one_warning_and_no_points(
    state: Path, black_hole: str, closed_port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of silence at once, at a quarter of the delays that users get; then the server is back."""
    assert store.PROBE + store.DEADLINE < 14 and sender.SILENCE < 14
    for module, name in ((store, "PROBE"), (sender, "SILENCE"), (sender, "PATIENCE")):
        monkeypatch.setattr(module, name, getattr(module, name) / 4)
    trackers, said, begun = {}, {}, time.monotonic()
    for uri in (black_hole, closed_port):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        said[uri] = []
        trackers[uri] = start(state, said=said[uri])
        for step in range(100):
            trackers[uri].metrics({"loss": step}, step)
    assert time.monotonic() - begun < 0.5
    while not all(said.values()) and time.monotonic() - begun < 15:
        time.sleep(0.1)
    assert time.monotonic() - begun < 5
    closing = time.monotonic()
    for tracker in trackers.values():
        tracker.close("FINISHED")
    assert time.monotonic() - closing < 1
    for uri, sentences in said.items():
        assert len(sentences) == 1 and uri in sentences[0]
    assert json.loads((state / "registry.json").read_text())["identity"] is None
    # The stages' processes end here; in this one, the threads must let go of their journals first.
    for tracker in trackers.values():
        tracker._sender.join(20)

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    start(state, "next").close("FINISHED")
    client = client_of(state)
    for tracker in trackers.values():
        (run,) = [one for one in runs_of(client, "stage") if one.data.tags["journal"] == tracker.journal.stem]
        assert run.info.status == "FINISHED"
        assert sorted(points(client, run.info.run_id, "loss")) == [(step, float(step)) for step in range(100)]


def test_a_crash_before_the_note_doubles_nothing(state: Path) -> None:
    """The lines reached MLflow, the note that they did was lost: they are sent again."""
    tracker = start(state)
    for step in range(50):
        tracker.metrics({"loss": 1.5}, step)
    tracker.close("FINISHED")
    note = tracker.journal.with_suffix(".sent")
    note.unlink()
    start(state, "next").close("FINISHED")
    client = client_of(state)
    assert json.loads(note.read_text())["run"] == tracker.run_id
    assert sorted(points(client, tracker.run_id, "loss")) == [(step, 1.5) for step in range(50)]
    assert len(runs_of(client, "stage")) == 2


def test_a_killed_stage_is_told_as_killed_and_a_running_one_is_left_alone(state: Path) -> None:
    folder = state / "journal"
    folder.mkdir()
    for name in ("killed", "running"):
        journal = Journal(folder / f"{name}.jsonl")
        journal.append("open", name=name, tags=TAGS)
        journal.metrics({"loss": 1.0}, 1)
        with journal.path.open("a") as torn:
            torn.write('{"kind": "metr')
    alive = Outbox.claim(folder / "running.jsonl")
    start(state, "next").close("FINISHED")
    client = client_of(state)
    found = {run.info.run_name: run for run in runs_of(client, "stage")}
    assert set(found) == {"killed", "next"}
    assert found["killed"].info.status == "KILLED"
    assert points(client, found["killed"].info.run_id, "loss") == [(1, 1.0)]
    assert alive is not None


def test_a_line_that_mlflow_refuses_does_not_hold_back_the_others(state: Path) -> None:
    said: list[str] = []
    tracker = start(state, said=said)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.metrics({"no//such/../name": 1.0}, 1)
    tracker.metrics({"loss": 2.0}, 2)
    with tracker.journal.open("a") as torn:
        torn.write("not a line of ours\n")
    tracker.metrics({"loss": 3.0}, 3)
    tracker.close("FINISHED")
    assert sorted(points(client_of(state), tracker.run_id, "loss")) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(said) == 1 and "no//such" in said[0]


def test_a_store_that_fails_in_between_gets_every_point(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all batches fail, after or before MLflow took them; the stage only sees a later end."""
    real, calls = MlflowClient.log_batch, iter(range(1000))

    def flaky(self: MlflowClient, *given: object, **named: object) -> None:
        turn = next(calls) % 4
        if turn == 1:
            raise ConnectionError("before")
        real(self, *given, **named)
        if turn == 2:
            raise ConnectionError("after")

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    monkeypatch.setattr(sender, "POLL", 0.05)
    said: list[str] = []
    tracker = start(state, said=said)
    for step in range(40):
        tracker.metrics({"loss": step}, step)
        if step % 10 == 0:
            tracker.flush(5)
    assert tracker.flush(10)
    tracker.close("FINISHED")
    assert sorted(points(client_of(state), tracker.run_id, "loss")) == [(step, float(step)) for step in range(40)]
    assert said == []


def test_a_full_disk_is_said_once_and_stops_nobody(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    tracker = start(state, said=said)
    assert tracker.flush(10)
    monkeypatch.setattr("os.write", lambda descriptor, line: len(line) // 2)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.metrics({"loss": 1.0}, 2)
    assert len(said) == 1 and "disk full" in said[0]
    monkeypatch.undo()
    tracker.close("FINISHED")


def test_a_server_with_errors_is_unreachable(tmp_path: Path) -> None:
    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UnreachableError, match="status 500"):
            store.probe(Address(f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()


def test_an_address_never_shows_its_password() -> None:
    assert str(Address("https://ann:p@ss@host:5000/x")) == "https://host:5000/x"
    assert str(Address("postgresql+psycopg2://ann:secret@db/mlflow")) == "postgresql+psycopg2://db/mlflow"
    assert str(Address("sqlite:////tmp/a@b.db")) == "sqlite:////tmp/a@b.db"


def run_identity(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "pipelines.tracking"]
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_another_registry_has_another_identity(state: Path, template: Path) -> None:
    address = Address.of(state)
    first = identity.write(state, address, store.connect(address, state).identity).read_text()
    written = (state / "registry.json").stat().st_mtime_ns
    identity.write(state, address, store.connect(address, state).identity)
    assert (state / "registry.json").stat().st_mtime_ns == written
    (state / "mlflow.db").write_bytes(template.read_bytes())
    replaced = run_identity(state.parent)  # a process that has not seen the first database
    assert replaced.returncode == 0 and replaced.stdout == (state / "registry.json").read_text()
    assert json.loads(replaced.stdout)["uri"] == json.loads(first)["uri"]
    assert json.loads(replaced.stdout)["identity"] != json.loads(first)["identity"]


def test_a_silent_registry_is_an_error_within_15_s(black_hole: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    ended = run_identity(tmp_path, MLFLOW_TRACKING_URI=black_hole)
    assert time.monotonic() - begun < 15
    assert ended.returncode == 2 and black_hole in ended.stderr and "Traceback" not in ended.stderr
