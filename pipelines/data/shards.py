"""Shards: plain tar files of `{key}.json` + `{key}.png`, in the order of their content.

A shard holds no clock time, user or machine, so the same pictures give the same bytes. WebDataset and `tarfile` read
them. Headers are written here, in the ustar format (POSIX.1-2001): all are alike but for name and size.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.data.index import NO_LABEL, PictureRow

BLOCK = 512  # tar pads every member to a multiple of this
BUFFER = 1 << 20  # bytes
END = bytes(2 * BLOCK)
KEY_DIGITS = 16
ALIKE = b"".join(  # the header of every member but for its name, size and checksum
    (
        bytes(100),  # the name
        b"0000444\0",  # mode
        b"0000000\0" * 2,  # user and group
        bytes(12),  # the size
        b"%011o\0" % 0,  # time of change
        b" " * 8,  # the checksum
        b"0".ljust(101, b"\0"),  # a plain file, linked to nothing
        b"ustar\x0000",  # and no names of user and group
    )
).ljust(BLOCK, b"\0")
ALIKE_SUM = sum(ALIKE)
NOTES = ("origin", "caption", "licence", "source")


def shard_name(split: str, shape: tuple[int, int] | None, number: int) -> str:
    """The file name of one shard; `shape` (height, width) is told where there are several."""
    size = "" if shape is None else f"-{shape[0]}x{shape[1]}"
    return f"{split}{size}-{number:05d}.tar"


def write_shard(path: Path, pictures: Iterable[tuple[PictureRow, bytes]]) -> Iterator[PictureRow]:
    """Write one shard from rows and their PNGs; yields each row with its place, once it is written.

    The shard is whole when the iterator has ended.
    """
    end = 0
    with path.open("wb", BUFFER) as file:
        for row, png in pictures:
            head = _member(f"{row.key}.json", _said(row)) + _header(f"{row.key}.png", len(png))
            file.writelines((head, png, _padding(len(png))))
            yield row._replace(shard=path.name, offset=end + len(head))
            end += len(head) + len(png) + len(_padding(len(png)))
        file.write(END)


def _said(row: PictureRow) -> bytes:
    """What is said of a picture; a picture without a class says so, what else is not known is left out."""
    known = {name: getattr(row, name) for name in NOTES if getattr(row, name) is not None}
    about = {"label": None if row.label == NO_LABEL else row.label, "sha256": row.sha256} | known
    return json.dumps(about, sort_keys=True, ensure_ascii=False).encode()


def _member(name: str, data: bytes) -> bytes:
    return _header(name, len(data)) + data + _padding(len(data))


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _header(name: str, size: int) -> bytes:
    told = name.encode(), b"%011o" % size
    # The checksum counts itself as eight blanks, which ALIKE does.
    checksum = ALIKE_SUM + sum(told[0]) + sum(told[1])
    head = bytearray(ALIKE)
    head[: len(told[0])] = told[0]
    head[124:135] = told[1]
    head[148:156] = b"%06o\0 " % checksum
    return bytes(head)
