"""Shards: plain tar files of `{key}.json` + `{key}.png`, in the order of their content.

The key of a picture is the head of its hash, and a shard holds no clock time, user or machine. So the same
pictures give the same bytes, in whatever order their source listed them. WebDataset and `tarfile` read them.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple, Self

from webdataset.writer import TarWriter

from pipelines.data.index import PictureRow

BLOCK = 512  # tar pads every member to a multiple of this
KEY_DIGITS = 16


class Sample(NamedTuple):
    """One prepared picture: its PNG, the SHA-256 (hex) of that PNG, its size in pixels, class and origin."""

    png: bytes
    sha256: str
    width: int
    height: int
    label: int
    origin: str


class Entry(NamedTuple):
    """A picture in the spool; entries sort by content, then origin."""

    sha256: str
    origin: str
    label: int
    width: int
    height: int
    offset: int
    size: int


def key_of(sha256: str) -> str:
    """The key of a picture in shards and tables: the first 16 hex digits of its hash."""
    return sha256[:KEY_DIGITS]


class Spool:
    """Prepared pictures on disk until the last has come, since content order is known only then.

    The file under `folder` has no name: it goes with the process, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self.entries: list[Entry] = []
        self.end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, sample: Sample) -> None:
        """Put one picture at the end."""
        self.file.write(sample.png)
        place = (self.end, len(sample.png))
        self.entries.append(Entry(sample.sha256, sample.origin, sample.label, sample.width, sample.height, *place))
        self.end += len(sample.png)

    def unique(self) -> tuple[list[Entry], list[tuple[Entry, Entry]]]:
        """Entries in content order, one a key, and each entry left out beside the one kept in its place."""
        kept: list[Entry] = []
        twins: list[tuple[Entry, Entry]] = []
        for entry in sorted(self.entries):
            if kept and key_of(kept[-1].sha256) == key_of(entry.sha256):
                twins.append((entry, kept[-1]))
            else:
                kept.append(entry)
        return kept, twins

    def samples(self, entries: Iterable[Entry]) -> Iterator[Sample]:
        """The pictures of some entries, read back one at a time."""
        for entry in entries:
            self.file.seek(entry.offset)
            png = self.file.read(entry.size)
            yield Sample(png, entry.sha256, entry.width, entry.height, entry.label, entry.origin)


def write_shards(folder: Path, split: str, samples: Iterable[Sample], per_shard: int) -> Iterator[PictureRow]:
    """Write `{split}-00000.tar`, `{split}-00001.tar`, ... and yield each picture's row once it is written."""
    stream = iter(samples)
    for number in count():
        first = next(stream, None)
        if first is None:
            return
        name = f"{split}-{number:05d}.tar"
        with (folder / name).open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for sample in chain([first], islice(stream, per_shard - 1)):
                tar.write({"__key__": key_of(sample.sha256), "json": _metadata(sample), "png": sample.png})
                size = len(sample.png)
                offset = tar.tarstream.offset - -(-size // BLOCK) * BLOCK  # members go in sorted order: the PNG is last
                yield PictureRow(
                    key_of(sample.sha256),
                    split,
                    name,
                    offset,
                    size,
                    sample.sha256,
                    sample.width,
                    sample.height,
                    sample.label,
                    sample.origin,
                )


def _metadata(sample: Sample) -> bytes:
    about = {"label": sample.label, "sha256": sample.sha256, "origin": sample.origin}
    return json.dumps(about, sort_keys=True).encode()
