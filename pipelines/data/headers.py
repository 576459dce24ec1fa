"""Ordinary tar headers, many at once: those of plain files in the POSIX format, as nearly every shard has.

They are guessed by their magic word, and proved: each is whole by its checksum, and each begins where the one before it
ends. Where the proof breaks off, these stop, and whoever walks header by header finds out why.
"""

from mmap import mmap

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
WINDOW = 4096  # blocks looked at together: 2 MB, whose headers stay in the processor's cache
MAGIC_WORD = 32  # of eight bytes each: the end of an empty link name, "ustar", NUL and the version's first digit
MAGIC = np.frombuffer(b"\0ustar\x000", np.uint64)[0]
EVEN_BYTES = np.uint64(0x00FF00FF00FF00FF)
Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]


def ordinary(data: bytes | memoryview | mmap, position: int) -> list[tuple[str, int, int]]:
    """Name, offset and size of the members from `position` on, as far as they are proved to be plain files."""
    count = min(WINDOW, (len(data) - position) // BLOCK)
    blocks = np.frombuffer(data, np.uint8, count * BLOCK, position).reshape(count, BLOCK)
    places = np.flatnonzero(blocks.view(np.uint64)[:, MAGIC_WORD] == MAGIC)
    if not len(places) or places[0] != 0:
        return []
    heads = blocks[places]
    sizes, proved = _octal(heads[:, 124:135])
    checksums, whole = _octal(heads[:, 148:154])
    proved &= whole & (checksums == _sums(heads)) & (heads[:, 135] == 0) & (heads[:, 154] == 0)
    proved &= (heads[:, 156] == ord("0")) & (heads[:, 345] == 0)
    proved &= (heads[:, 0] != 0) & (heads[:, 0] != ord("/"))
    after = places + 1 + -(-sizes // BLOCK)
    proved &= position + after * BLOCK <= len(data)
    proved[1:] &= after[:-1] == places[1:]
    length = len(proved) if proved.all() else int(proved.argmin())
    names = _names(np.ascontiguousarray(heads[:length, :100]))
    offsets = position + (places[: len(names)] + 1) * BLOCK
    return list(zip(names, offsets.tolist(), sizes[: len(names)].tolist(), strict=True))


def _names(fields: Bytes) -> list[str]:
    """The names in fields padded with NUL (n, 100), or none if one of them is not UTF-8 or may leave its folder."""
    raw = b"\0".join(fields.view("S100").ravel().tolist())
    try:
        names = raw.decode().split("\0")
    except UnicodeDecodeError:
        return []
    return names if len(names) == len(fields) and b".." not in raw else []


def _octal(digits: Bytes) -> tuple[Numbers, NDArray[np.bool_]]:
    """The numbers that rows of octal digits are, and which rows have no other characters."""
    values = digits - np.uint8(ord("0"))  # what is below wraps to far above
    powers = 8 ** np.arange(digits.shape[1] - 1, -1, -1, dtype=np.int64)
    right = np.logical_and.reduce(values < 8, 1)
    return values.astype(np.int64) @ powers, right


def _sums(heads: Bytes) -> Numbers:
    """The checksum of each header: the sum of its bytes, those of the checksum itself taken as spaces."""
    words = heads.view(np.uint64)
    lanes = ((words & EVEN_BYTES) + (words >> np.uint64(8) & EVEN_BYTES)).sum(1)  # four sums of below 2^16
    total = np.ascontiguousarray(lanes).view(np.uint16).reshape(-1, 4).sum(1, dtype=np.int64)
    return total - heads[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
