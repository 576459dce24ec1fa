"""The tracker: what a stage holds in its hand to say what it was given, what it measured and what it made."""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipelines.tracking import identity
from pipelines.tracking.journal import Journal
from pipelines.tracking.outbox import Outbox
from pipelines.tracking.sender import Sender
from pipelines.tracking.store import Address


class Tracker:
    """One stage's record: every verb appends to the journal and returns at once."""

    def __init__(self, journal: Journal, sender: Sender, tags: Mapping[str, str], warn: Callable[[str], None]) -> None:
        self.journal = journal.path
        self.given = dict(tags)  # what the run was opened with: commit, pipeline and the like
        self._journal, self._sender, self._warn = journal, sender, warn
        self._numbers = itertools.count(1)
        self._full = False

    @classmethod
    def start(cls, name: str, state: Path, tags: Mapping[str, str], warn: Callable[[str], None]) -> "Tracker":
        """Open the journal of one stage under `state` and begin to send it; `warn` hears what goes wrong, once."""
        state = state.resolve()
        folder = state / "journal"
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f".{time.time_ns() // 1000 % 1_000_000:06d}"
        path = folder / f"{name}-{stamp}-{os.getpid()}.jsonl"
        path.touch()
        address = Address.of(state)
        identity.promise(state, address)
        # Locked while still empty: a stage that looks for what others left behind must not take this one.
        outbox = Outbox.claim(path, wait=True)
        assert outbox is not None
        journal = Journal(path)
        journal.append("open", name=name, tags=dict(tags))
        sender = Sender(outbox, state, address, warn)
        sender.start()
        return cls(journal, sender, tags, warn)

    @property
    def run_id(self) -> str | None:
        """The id of the stage's run in MLflow, once there is one."""
        return self._sender.outbox.sent.run or None

    def params(self, values: Mapping[str, str]) -> None:
        """Record parameters."""
        self._append("params", values=dict(values))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers of one step."""
        self._append("metrics", step=int(step), values={key: float(value) for key, value in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags; a later value of a tag replaces the earlier."""
        self._append("tags", values=dict(values))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, or a folder with all it holds, as it is now, under `folder` of the run's files.

        It may be moved or changed afterwards.
        """
        copy = Path(str(next(self._numbers))) / path.name
        try:
            target = self._sender.outbox.files / copy
            target.parent.mkdir(parents=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)
        except OSError as error:
            self._complain(error)
        else:
            self._append("artifact", file=copy.as_posix(), folder=folder)

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait until MLflow has what was recorded so far; False if it did not take it in time."""
        return self._sender.flush(seconds)

    def close(self, status: str) -> None:
        """End the record with FINISHED, FAILED or KILLED; waits some seconds for the last lines to be taken."""
        self._append("close", status=status)
        self._sender.end()

    def _append(self, kind: str, **content: object) -> None:
        try:
            self._journal.append(kind, **content)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._full:
            self._full = True
            self._warn(f"the journal {self.journal} cannot be written ({error}); the stage goes on unrecorded")
