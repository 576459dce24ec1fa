"""An outbox: one journal on its way to MLflow, and a note of how far it got.

The note (`<journal>.sent`) moves on only after MLflow took the lines, so a crash sends some lines twice and
none never; twice is harmless, since params and tags are overwritten and a metric point is the same row by
key, step, time and value. Whoever sends a journal holds a lock on it: its stage for as long as it lives,
then the first later stage that reaches the server.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from diffusion_core.manifest import write_atomic
from pipelines.tracking import runs
from pipelines.tracking.journal import Line, read
from pipelines.tracking.store import REFUSED, Store

MERGED = ("params", "metrics", "tags")
LINES = 500  # lines in one batch: few enough that a slow server's answer still comes within its timeout
LIMITS = {"params": 100, "tags": 100, "metrics": 1000}  # of one log_batch call


@dataclass
class Sent:
    """How far a journal got: to which store, into which run, up to which byte; `done` once its run was ended."""

    store: str = ""
    run: str = ""
    offset: int = 0
    done: bool = False


class Outbox:
    """One journal that this process alone may send, until `release`."""

    def __init__(self, path: Path, lock: IO[bytes]) -> None:
        self.path, self._lock = path, lock
        self.note = path.with_suffix(".sent")
        self.files = path.parent / "files" / path.stem
        self.sent = Sent(**json.loads(self.note.read_text())) if self.note.exists() else Sent()

    @classmethod
    def claim(cls, path: Path, *, wait: bool = False) -> Self | None:
        """Take the journal's lock; None if another process has it."""
        lock = path.open("rb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            lock.close()
            return None
        return cls(path, lock)

    def release(self) -> None:
        """Let another process send what is left."""
        self._lock.close()

    def forward(self, store: Store, state: Path, refused: Callable[[str], None]) -> None:
        """Send the finished lines not yet sent; `refused` hears of a line that MLflow will never take."""
        if self.sent.store != store.identity:
            self.sent = Sent(store.identity)
        for batch in _batches(read(self.path, self.sent.offset)):
            self._send(store, state, batch, refused)
            self.sent.offset = batch[-1].end
            self._remember()

    def finish(self, store: Store) -> None:
        """End the run of a journal whose process died before it could say how it ended."""
        if self.sent.run and not self.sent.done:
            runs.close_stage(store, self.sent.run, "KILLED", int(self.path.stat().st_mtime * 1000))
            self._done()

    def _send(self, store: Store, state: Path, batch: list[Line], refused: Callable[[str], None]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._deliver(store, state, [line.content for line in batch if line.content is not None])
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                # Somebody deleted the run for good: the next try makes another and begins anew.
                self.sent = Sent(store.identity)
            if error.error_code not in REFUSED:
                raise
            if len(batch) == 1:
                refused(f"MLflow refused a line of {self.path.name}: {str(error).splitlines()[0][:200]}")
                return
            # One bad line must not take its neighbours with it.
            for line in batch:
                self._send(store, state, [line], refused)

    def _deliver(self, store: Store, state: Path, lines: list[dict[str, Any]]) -> None:
        """Hand over one batch: mergeable lines together, any other alone."""
        if not lines:
            return
        first = lines[0]
        if first["kind"] == "open":
            self.sent.run = runs.open_stage(store, state, self.path.stem, first["name"], first["tags"], first["ms"])
        elif not self.sent.run:
            return
        elif first["kind"] == "artifact":
            self._upload(store, first["file"], first["folder"])
        elif first["kind"] == "close":
            runs.close_stage(store, self.sent.run, first["status"], first["ms"])
            self._done()
        else:
            self._log(store, lines)

    def _log(self, store: Store, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        rows: dict[str, list[Any]] = {
            "params": [Param(k, v) for line in lines if line["kind"] == "params" for k, v in line["values"].items()],
            "metrics": [
                Metric(key, value, line["ms"], line["step"])
                for line in lines
                if line["kind"] == "metrics"
                for key, value in line["values"].items()
            ],
        }
        latest = {k: v for line in lines if line["kind"] == "tags" for k, v in line["values"].items()}
        rows["tags"] = [RunTag(key, value) for key, value in latest.items()]
        for kind, limit in LIMITS.items():
            for start in range(0, len(rows[kind]), limit):
                store.client.log_batch(self.sent.run, **{kind: rows[kind][start : start + limit]})

    def _upload(self, store: Store, file: str, folder: str) -> None:
        path = self.files / file
        if path.exists():
            store.client.log_artifact(self.sent.run, str(path), folder or None)

    def _done(self) -> None:
        self.sent.done = True
        self._remember()
        shutil.rmtree(self.files, ignore_errors=True)

    def _remember(self) -> None:
        write_atomic(self.note, (json.dumps(asdict(self.sent)) + "\n").encode())


def pending(folder: Path) -> list[Path]:
    """Journals with something left to send, oldest first; some may belong to stages that still run."""
    return [path for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime) if _is_pending(path)]


def _is_pending(path: Path) -> bool:
    try:
        return not json.loads(path.with_suffix(".sent").read_text())["done"]
    except FileNotFoundError:
        return True


def _batches(lines: Iterable[Line]) -> Iterable[list[Line]]:
    """Runs of mergeable lines, at most LINES long; every other line alone, in order."""
    batch: list[Line] = []
    for line in lines:
        alone = line.content is not None and line.content["kind"] not in MERGED
        if batch and (alone or len(batch) == LINES):
            yield batch
            batch = []
        batch.append(line)
        if alone:
            yield batch
            batch = []
    if batch:
        yield batch
