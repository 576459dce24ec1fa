"""Long lists kept in files: written once, sorted in pieces, read back a part at a time.

An entry is a plain value and stands as one line of JSON, in which any file name can be written.
"""

import heapq
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

SORTED_AT_ONCE = 100_000
T = TypeVar("T")


def keep(entries: Iterable[Any], path: Path) -> int:
    """Write entries as they come; returns how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="ascii") as file:
        for entry in entries:
            file.write(json.dumps(entry) + "\n")
            count += 1
    return count


def kept(path: Path) -> Iterator[Any]:
    """The entries of a file as they were written; a tuple comes back as a list."""
    with path.open(encoding="ascii") as file:
        yield from map(json.loads, file)


def chunks(entries: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive entries, `size` at a time."""
    stream = iter(entries)
    while some := list(islice(stream, size)):
        yield some


def in_order(names: Iterable[str], folder: Path) -> Iterator[str]:
    """All names, sorted; more than SORTED_AT_ONCE wait in files in `folder`, which are gone afterwards."""
    pieces: list[Path] = []
    for some in chunks(names, SORTED_AT_ONCE):
        some.sort()
        if not pieces and len(some) < SORTED_AT_ONCE:
            yield from some
            return
        pieces.append(folder / f"piece-{len(pieces):05d}.jsonl")
        keep(some, pieces[-1])
    yield from heapq.merge(*map(kept, pieces))
    for piece in pieces:
        piece.unlink()
