"""What must not be used, whoever asks: a list of ids and SHA-256 digests, one a line.

The list is kept as a sorted file of 64-bit digests that every task maps, so that it may be long. That two different
entries share one has a chance of 1 in 10**7 for a million of entries and a million of pictures.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion_core.errors import DataError
from pipelines.data.sources import files

DIGEST = re.compile(r"[0-9a-fA-F]{64}")
LONGEST = 4096  # characters of one line


class OptOut:
    """A kept list, open for questions."""

    def __init__(self, path: Path) -> None:
        self.digests: NDArray[np.uint64] = np.load(path, mmap_mode="r", allow_pickle=False)

    def named(self, names: Iterable[str]) -> str | None:
        """The first of some names that is on the list."""
        for name in names:
            digest = _digest(name)
            place = int(np.searchsorted(self.digests, digest))
            if place < len(self.digests) and self.digests[place] == digest:
                return name
        return None


def keep(address: str, folder: Path) -> Path:
    """Fetch a list, a local file or a URL, into a folder; raises DataError if it cannot be read as such a list.

    An empty line and one that begins with `#` say nothing; digests may be spelt in either case.
    """
    copy = folder / "opt_out.txt"
    files.store(address).copy(address, copy)
    digests = np.fromiter((_digest(entry) for entry in _entries(copy, address)), np.uint64)
    np.save(folder / "opt_out.npy", np.unique(digests), allow_pickle=False)
    copy.unlink()
    return folder / "opt_out.npy"


def _entries(path: Path, address: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                entry = line.strip()
                if len(entry) > LONGEST or "\0" in entry:
                    raise DataError(f"{address}, line {number} is no id or SHA-256")
                if entry and not entry.startswith("#"):
                    yield entry.lower() if DIGEST.fullmatch(entry) else entry
    except UnicodeDecodeError as error:
        raise DataError(f"{address} is no text in UTF-8 ({error.reason}); one id or SHA-256 a line is wanted") from None


def _digest(entry: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(entry.encode(), digest_size=8).digest()))
