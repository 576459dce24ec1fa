"""Tar files as they lie in memory: a strict walk over their headers.

Nothing is extracted and no payload is read, so a member costs its header alone. What could be read in two ways, or
reaches outside its folder, is refused: links, devices, sparse files, a name given twice, anything cut off.

The formats are those of POSIX.1-2001 (pax interchange, ustar) and of GNU tar's manual, "Basic Tar Format".
"""

import re
from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import NamedTuple

import numpy as np

from diffusion_core.errors import DataError
from pipelines.data.headers import BLOCK, ordinary

ZEROS = bytes(BLOCK)
END_MARK = 2 * BLOCK
ALLOWED = frozenset({"png", "jpg", "jpeg", "webp", "json", "txt", "cls", "npy"})
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
FILES, FOLDER = (b"0", b"\0", b"7"), b"5"
PAX, PAX_GLOBAL, GNU_NAME, GNU_LINK = b"x", b"g", b"L", b"K"
KNOWN = frozenset({*FILES, FOLDER, PAX, PAX_GLOBAL, GNU_NAME, GNU_LINK})
REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
    b"M": "a part of a file of several volumes",
}
POSIX = b"ustar\0"
OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
LONGEST_NAME = 4096  # bytes, as file systems have it
EXTENDED_BYTES = 2**20  # far beyond any file name: a longer extended header is an attack
REMEMBERED = 65_536  # names kept as they are; older ones as 64 bits, so that a million of them are 8 MB


class Member(NamedTuple):
    """One file of a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def members(data: bytes | memoryview | mmap, origin: str) -> Iterator[Member]:
    """The files of a plain tar, in order; folders are passed over.

    Raises DataError naming `origin`, the member and the reason: for a tar that is cut anywhere or has bytes after its
    end, for a header that is damaged or says more than there is, and for whatever is no plain file of a safe name.
    """
    _begins_well(data, origin)
    seen, position = Seen(), 0
    while some := ordinary(data, position):
        _once(seen, [name for name, _, _ in some], origin)
        yield from map(Member._make, some)
        _, start, size = some[-1]
        position = start + _padded(size)
    for member in _walk(data, position, origin):
        _once(seen, [member.name], origin)
        yield member


def parted(name: str) -> tuple[str, str]:
    """The key of a member, its name up to the first dot of its last part, and the rest of it in lower case.

    Members of one key are one sample, by the convention of the webdataset package.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower()


class Seen:
    """Which names have come, however many: that two of a million are taken for one has a chance of 3e-8."""

    def __init__(self) -> None:
        self.recent: set[str] = set()
        self.older = np.empty(0, np.int64)

    def again(self, names: Sequence[str]) -> str | None:
        """Remember names; the first of them that had come before, or comes twice."""
        fresh = set(names)
        known = self.recent & fresh
        if len(self.older):
            known |= {name for name in fresh if self._is_older(name)}
        if known or len(fresh) < len(names):
            for name in names:
                if name in known:
                    return name
                known.add(name)
        self.recent |= fresh
        if len(self.recent) >= REMEMBERED:
            numbers = np.fromiter(map(hash, self.recent), np.int64, len(self.recent))
            self.older = np.sort(np.concatenate((self.older, numbers)))
            self.recent = set()
        return None

    def _is_older(self, name: str) -> bool:
        place = np.searchsorted(self.older, number := hash(name))
        return bool(place < len(self.older) and self.older[place] == number)


def _once(seen: Seen, names: Sequence[str], origin: str) -> None:
    if again := seen.again(names):
        raise DataError(f"{origin}: member '{again}' is there twice")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _walk(data: bytes | memoryview | mmap, position: int, origin: str) -> Iterator[Member]:
    """The files from `position` on, header by header, up to an end mark and nothing after it."""
    end = len(data)
    said: dict[bytes, bytes] = {}  # what extended headers say of the next member
    while position < end:
        header = bytes(data[position : position + BLOCK])
        if header == ZEROS:
            if said:
                raise _error(origin, position, "is promised by an extended header and missing")
            _ends_well(data, position, origin)
            return
        kind, size = _checked(header, position, origin)
        start, at = position + BLOCK, position
        if kind in FILES or kind == FOLDER:
            size = _decimal(said[b"size"], at, origin) if b"size" in said else size
            name = _name(header, said, at, origin)
            folder = kind == FOLDER or (kind == b"\0" and name.endswith("/"))
            if folder and size:
                raise _error(origin, at, f"'{name}' is a folder of {size} bytes")
        position = start + _padded(size)
        if position > end:
            raise _error(origin, at, f"says {size} bytes, and {end - start} are left: cut off, or a lie")
        if kind in FILES or kind == FOLDER:
            said = {}
            if not folder:
                yield Member(name, start, size)
        else:
            _extend(said, kind, bytes(data[start : start + min(size, EXTENDED_BYTES + 1)]), at, origin)
    raise DataError(f"{origin} has no end mark after {end} bytes: it is cut off")


def _begins_well(data: bytes | memoryview | mmap, origin: str) -> None:
    """Raise DataError for a file that is no plain tar at the first look."""
    head = bytes(data[:6])
    if not head:
        raise DataError(f"{origin} is an empty file; a tar has an end mark at least")
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{origin} is compressed with {name}; a plain tar is wanted")
    if len(data) % BLOCK:
        raise DataError(f"{origin} is cut off: its {len(data)} bytes are no multiple of {BLOCK}")


def _ends_well(data: bytes | memoryview | mmap, position: int, origin: str) -> None:
    """Raise DataError unless from here on there are two blocks of zeros or more, and nothing else."""
    if len(data) - position < END_MARK:
        raise DataError(f"{origin} is cut off in its end mark, at byte {len(data)}")
    for start in range(position, len(data), 2**20):
        if bytes(data[start : start + 2**20]).strip(b"\0"):
            raise DataError(f"{origin} has more bytes after its end mark at byte {position}")


def _checked(header: bytes, position: int, origin: str) -> tuple[bytes, int]:
    """The kind and the size that a header says; raises DataError if it is damaged, or of what is no file."""
    sum_field = header[148:156]
    match = OCTAL.fullmatch(sum_field)
    if match is None or int(match[1], 8) != sum(header) - sum(sum_field) + 8 * 0x20:
        raise _error(origin, position, "has a header with a wrong checksum")
    kind, size_field = header[156:157], header[124:136]
    if kind in REFUSED:
        raise _error(origin, position, f"'{_text(header[:100])}' is {REFUSED[kind]}; only plain files are taken")
    if kind not in KNOWN:
        raise _error(origin, position, f"'{_text(header[:100])}' is of the unknown kind {kind!r}")
    if match := OCTAL.fullmatch(size_field):
        return kind, int(match[1], 8)
    if size_field[0] == 0x80:  # GNU's numbers of more than 33 bits, in base 256; 0xff begins a negative one
        return kind, int.from_bytes(size_field[1:])
    raise _error(origin, position, f"'{_text(header[:100])}' has the size {size_field!r}, which is no number above 0")


def _name(header: bytes, said: dict[bytes, bytes], position: int, origin: str) -> str:
    """The whole name of a member; raises DataError for one that is not UTF-8, or leads out of the tar's own folder."""
    if b"path" in said:
        raw = said[b"path"]
    else:
        raw = header[:100].partition(b"\0")[0]
        if header[345] and header.startswith(POSIX, 257):
            raw = header[345:500].partition(b"\0")[0] + b"/" + raw
    if len(raw) > LONGEST_NAME:
        raise _error(origin, position, f"has a name of {len(raw):,} bytes; at most {LONGEST_NAME:,} are allowed")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise _error(origin, position, f"'{_text(raw)}' has a name that is not UTF-8") from None
    if not name or "\0" in name:
        raise _error(origin, position, f"{name!r} has a name that is empty or holds NUL")
    if name[0] == "/" or (".." in name and ".." in name.split("/")):
        raise _error(origin, position, f"'{name}' leads out of its folder")
    return name


def _extend(said: dict[bytes, bytes], kind: bytes, payload: bytes, position: int, origin: str) -> None:
    """Remember what an extended header says of the next member; raises DataError for what is broken or said twice."""
    if len(payload) > EXTENDED_BYTES:
        raise _error(origin, position, f"is an extended header of more than {EXTENDED_BYTES} bytes")
    records = {b"path": payload.rstrip(b"\0")} if kind == GNU_NAME else {}
    if kind in (PAX, PAX_GLOBAL):
        records = _records(payload, position, origin)
    telling = {key: value for key, value in records.items() if key in (b"path", b"size")}
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise _error(origin, position, "begins a sparse file; only plain files are taken")
    if telling and kind == PAX_GLOBAL:
        raise _error(origin, position, f"gives every member one {b' and '.join(telling).decode()}")
    if twice := telling.keys() & said.keys():
        raise _error(origin, position, f"gives a second {b' and '.join(twice).decode()} of one member")
    said.update(telling)


def _records(payload: bytes, position: int, origin: str) -> dict[bytes, bytes]:
    """The "length key=value" lines of a pax header."""
    records: dict[bytes, bytes] = {}
    place = 0
    while place < len(payload):
        match = RECORD.match(payload, place)
        end = place + int(match[1]) if match else 0
        if match is None or end <= match.end() or payload[end - 1 : end] != b"\n" or match[2] in records:
            raise _error(origin, position, "is a broken pax header")
        records[match[2]] = payload[match.end() : end - 1]
        place = end
    return records


def _decimal(value: bytes, position: int, origin: str) -> int:
    if not (value.isdigit() and len(value) < 20):
        raise _error(origin, position, f"has the size {_text(value)!r}, which is no number above 0")
    return int(value)


def _text(raw: bytes) -> str:
    """Bytes for a message, whatever they are."""
    return raw.partition(b"\0")[0][:200].decode(errors="backslashreplace")


def _error(origin: str, position: int, reason: str) -> DataError:
    return DataError(f"{origin}: the member at byte {position} {reason}")
