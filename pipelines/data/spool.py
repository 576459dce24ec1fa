"""Prepared pictures on this machine's disk until the last has come, since content order is known only then.

In memory a picture is one record of 62 bytes. The folder lies inside the stage's draft and goes when the stage ends,
however it ends: a draft that a killed stage left is cleared by the next.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.data.preparing import RECORD, About, Done

BLOCK = 1 << 20


class Spool:
    """One file with the pictures of all parts, and the table of them."""

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self.folder, self.file = folder, file
        self.end = 0
        self.parts: list[NDArray[np.void]] = []
        self.labels: dict[str, int] = {}

    def take(self, done: Done) -> None:
        """Move one part's pictures to the end."""
        records = done.records.copy()  # from another process it comes read-only
        numbers = [self.labels.setdefault(label, len(self.labels)) for label in done.labels]
        records["start"] += self.end
        records["label"] = np.array([*numbers, -1])[records["label"]]  # the last, -1, is itself
        self.parts.append(records)
        with done.file.open("rb") as part:
            shutil.copyfileobj(part, self.file, BLOCK)
        self.file.flush()  # it is read past the buffer
        self.end = self.file.tell()
        done.file.unlink()

    def table(self, classes: tuple[str, ...]) -> tuple[NDArray[np.void], tuple[str, ...]]:
        """All records by content, then by origin, and the names of the classes, whose numbers are now the labels.

        Without given `classes` they stand in numeric order if all are numbers, and in alphabetic order otherwise.
        """
        table = np.concatenate([np.empty(0, RECORD), *self.parts])
        self.parts.clear()
        names = classes or tuple(sorted(self.labels, key=_numeric if all(map(_is_number, self.labels)) else None))
        numbers = {name: number for number, name in enumerate(names)}
        table["label"] = np.array([*(numbers[label] for label in self.labels), -1])[table["label"]]
        order = np.argsort(table["sha256"], kind="stable")
        table = table[order]
        self._order_twins(table)
        return table, names

    def read(self, record: np.void) -> tuple[bytes, About]:
        """One picture's PNG and what is said of it."""
        size, place = int(record["png"]), int(record["start"])
        both = os.pread(self.file.fileno(), size + int(record["about"]), place)
        return both[:size], About(*json.loads(both[size:]))

    def _order_twins(self, table: NDArray[np.void]) -> None:
        """Sort records of equal content by origin, and equal origins by all else that is said."""
        same = np.concatenate(([False], table["sha256"][1:] == table["sha256"][:-1], [False]))
        starts, ends = np.flatnonzero(~same[:-1] & same[1:]), np.flatnonzero(same[:-1] & ~same[1:])
        for start, end in zip(starts, ends + 1, strict=True):
            keys = [(self.read(record)[1], int(record["label"])) for record in table[start:end]]
            order = sorted(range(len(keys)), key=lambda place: json.dumps(keys[place]))
            table[start:end] = table[start:end][order]


@contextmanager
def spooled(draft: Path) -> Iterator[Spool]:
    """An empty spool, which is gone when the context ends."""
    folder = draft / "spool"
    folder.mkdir()
    try:
        with (folder / "pictures").open("w+b") as file:
            yield Spool(folder, file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _numeric(label: str) -> tuple[int, str, str]:
    """The order of whole numbers, however long they are."""
    digits = label.lstrip("0")
    return len(digits), digits, label
