"""The journal: an append-only file of JSON lines that any process of a stage may write to.

One call is one line is one `write` on a descriptor opened with O_APPEND, so that lines of several processes
never mix. Each line has `kind` (open, params, metrics, tags, artifact, close) and `ms`, the wall time in
milliseconds since 1970 that MLflow keeps as the point's time.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """One parsed line and the byte offset just behind it; `content` is None where the bytes are not a line of ours."""

    end: int
    content: dict[str, Any] | None


class Journal:
    """The writing end of a journal; cheap to make, so a worker process makes its own from the path."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append numbers of one step; raises OSError if the disk does not take them."""
        self.append("metrics", step=int(step), values={key: float(value) for key, value in values.items()})

    def params(self, values: Mapping[str, str]) -> None:
        """Append parameters of the run."""
        self.append("params", values=dict(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Append tags of the run; a later value of a tag replaces the earlier."""
        self.append("tags", values=dict(values))

    def append(self, kind: str, **content: object) -> None:
        """Append one line of any kind; raises OSError if the disk does not take all of it."""
        line = json.dumps({"kind": kind, "ms": time.time_ns() // 1_000_000, **content}).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(descriptor, line)
        finally:
            os.close(descriptor)
        if written != len(line):
            raise OSError(f"{self.path} took {written} of {len(line)} bytes; is the disk full?")


def read(path: Path, offset: int) -> Iterator[Line]:
    """The finished lines from a byte offset on; bytes behind the last newline are still being written."""
    with path.open("rb") as stream:
        stream.seek(offset)
        for raw in stream:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            yield Line(offset, _parse(raw))


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(raw)
    except ValueError:
        return None
    return content if isinstance(content, dict) and {"kind", "ms"} <= content.keys() else None
