"""Measured pages: rows of what was measured, as JSON and as a table of the page beside it."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One measured figure; `bound` is how it must compare (">= 2.0"), empty where it is only told."""

    name: str
    measured: float
    unit: str
    bound: str
    ok: bool
    peer: str
    device: str
    commit: str
    command: str


def holds(measured: float, bound: str) -> bool:
    """Whether a figure meets a bound such as "<= 0.2"; an empty bound always."""
    if not bound:
        return True
    relation, number = bound.split()
    return {"<=": measured <= float(number), ">=": measured >= float(number)}[relation]


def peak_memory() -> int:
    """The most memory that this process has had, in bytes (Linux).

    What getrusage tells begins with what the parent had when it started this process, and may hide all of it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def device() -> str:
    """This machine's processor by name, and how many."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The checkout's commit, with a + where files differ from it."""
    asked = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The rows as JSON, one a line."""
    lines = ",\n".join(f" {json.dumps(asdict(row), ensure_ascii=False)}" for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


def read_rows(path: Path) -> list[Row]:
    """Rows written earlier; none if the file is not there."""
    return [Row(**one) for one in json.loads(path.read_text())] if path.exists() else []
