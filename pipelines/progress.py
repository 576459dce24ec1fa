"""A progress bar that is also readable in a log file: rich in a terminal, a line every ten seconds elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.tracking.journal import read

LOOK_EVERY = 0.5  # seconds between two looks into a journal
LINE_EVERY = 10.0  # seconds


class Bar:
    """Progress over `total` units, with the rate and the time left; the label says the unit."""

    def __init__(self, console: Console, label: str, total: int):
        self.console, self.label, self.total, self.done = console, label, total, 0
        self.begun = self.spoken = time.monotonic()
        rate = TextColumn("{task.fields[rate]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate)
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, *times, console=console, transient=True)
        self.task = self.progress.add_task(label, total=total, rate="")

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.progress.stop()
        if kind is None:
            seconds = time.monotonic() - self.begun
            said = f"{self.label}: {self.done:,} of {self.total:,} in {seconds:.1f} s"
            self.console.print(f"{said}, {self.rate}" if self.done else said, highlight=False)

    @property
    def rate(self) -> str:
        """Units a second since the beginning."""
        speed = self.done / max(time.monotonic() - self.begun, 1e-9)
        return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s"

    def to(self, done: int, note: str = "") -> None:
        """Move the bar to `done` units."""
        self.done = min(done, self.total)
        said = f"{self.label} {note}".rstrip()
        self.progress.update(self.task, completed=self.done, rate=self.rate, description=said)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.spoken > LINE_EVERY:
            self.spoken = now
            left = (now - self.begun) * (self.total - self.done) / max(self.done, 1)
            said = f"{self.label}: {self.done:,} of {self.total:,} {note}".rstrip()
            self.console.print(f"{said}, {self.rate}, {left:.0f} s left", highlight=False)

    def step(self, count: int = 1) -> None:
        """Move the bar on by `count` units."""
        self.to(self.done + count)


@contextmanager
def follow(bar: Bar, journal: Path) -> Iterator[None]:
    """Move a bar to the newest step in a journal, and show the loss there, until the context ends."""
    over, offset = threading.Event(), journal.stat().st_size

    def advance() -> None:
        nonlocal offset
        for line in read(journal, offset):
            offset = line.end
            if line.content is not None and line.content["kind"] == "metrics":
                losses = [value for key, value in line.content["values"].items() if key.startswith("loss/")]
                bar.to(line.content["step"], f"loss {losses[0]:.4f}" if losses else "")

    def watch() -> None:
        while not over.wait(LOOK_EVERY):
            advance()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    advance()
