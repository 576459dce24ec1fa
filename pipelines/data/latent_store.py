"""A content-addressed store of what encoding gave: each entry is found by a digest of all that it depends on.

Entries lie in segments, folders of one tensor file and a manifest that are put in place by one rename and never
changed: a writer killed at any time leaves whole segments or nothing. A segment's bytes are held against its manifest
before an entry of it is used; one that differs is thrown away, and its entries are simply not there any more.
The store belongs to no run: many may read and fill it at once, on storage that all of them see.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_core import manifest
from diffusion_core.errors import ConfigError, IntegrityError, UnreachableError
from diffusion_core.weights import read_tensors, write_tensors

Keys = NDArray[np.uint8]  # (N, 32), one SHA-256 a row
KEY_BYTES = 32
KEY, ENTRIES, KIND = "key", "entries.safetensors", "segment"
ABANDONED = 24 * 3600.0  # seconds after which a draft has no writer any more
NOWHERE = -1
NAME = re.compile("[0-9a-f]{64}")  # of a segment; what else lies in the folder is not ours


def key_of(recipe: bytes, content: bytes) -> bytes:
    """The key of a sample: a digest of how it is encoded (a digest itself) and of what it is."""
    return hashlib.sha256(recipe + content).digest()


def keys_of(digests: Sequence[bytes]) -> Keys:
    """Digests as the rows of one array (N, 32)."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, KEY_BYTES)


class Found(NamedTuple):
    """Where wanted entries lie: the number of the segment (N,), or -1, and the row of its mapped tensors (N,).

    `missing` (M,) are the places of the first of each missing key in what was wanted, ascending; `entries` is how many
    different keys were wanted, `damaged` how many segments had to be thrown away.
    """

    segments: list[dict[str, Tensor]]
    segment: NDArray[np.int64]
    row: NDArray[np.int64]
    missing: NDArray[np.int64]
    entries: int
    damaged: int

    def entry(self, name: str, part: slice | NDArray[np.int64]) -> Tensor:
        """Tensor `name` of the first of the wanted of `part`."""
        return self.segments[self.segment[part][0]][name][self.row[part][0]]

    def copy(self, name: str, part: slice | NDArray[np.int64], out: Tensor) -> None:
        """Put tensor `name` of the wanted of `part` into the rows of `out`, a segment at a time."""
        where, row = self.segment[part], self.row[part]
        order = np.argsort(where, kind="stable")
        numbers, starts = np.unique(where[order], return_index=True)
        for number, places in zip(numbers, np.split(order, starts[1:]), strict=True):
            rows = self.segments[number][name].index_select(0, torch.from_numpy(row[places]))
            out[torch.from_numpy(places)] = rows


class Store:
    """The segments below one folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.folder, self.drafts = folder, folder / "segments", folder / "drafts"
        self.opened: dict[str, dict[str, Tensor]] = {}
        for part in (self.folder, self.drafts):
            try:
                part.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"store: the folder {part} cannot be made: {error.strerror}") from error

    def find(self, wanted: Keys) -> Found:
        """Where each wanted entry (N, 32) lies; every segment that is used has been held against its manifest."""
        unique, first, inverse = np.unique(sortable(wanted), return_index=True, return_inverse=True)
        segments: list[dict[str, Tensor]] = []
        segment, row = np.full(len(unique), NOWHERE), np.zeros(len(unique), np.int64)
        damaged = 0
        for name in sorted(path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name)):
            try:
                keys = self._keys(name)
                at = np.searchsorted(unique, keys)
                here = at < len(unique)
                here[here] = (unique[at[here]] == keys[here]) & (segment[at[here]] == NOWHERE)
                if here.any():
                    segments.append(self._open(name))
                    segment[at[here]], row[at[here]] = len(segments) - 1, np.flatnonzero(here)
            except (IntegrityError, FileNotFoundError):  # or another run has just dropped it
                damaged += self._drop(name)
        missing = np.sort(first[segment == NOWHERE])
        return Found(segments, segment[inverse], row[inverse], missing, len(unique), damaged)

    def put(self, keys: Keys, tensors: Mapping[str, Tensor]) -> None:
        """Publish a segment of entries, whose tensors have one row a key (n, ...)."""
        draft = self.drafts / uuid4().hex
        draft.mkdir()
        try:
            write_tensors(draft / ENTRIES, {KEY: torch.from_numpy(keys.copy()), **tensors})
            sealed = manifest.seal(draft, KIND, {"entries": len(keys)}, samples={ENTRIES: len(keys)})
            try:
                draft.rename(self.folder / sealed.digest)
            except OSError as error:  # it is there already: a task that was tried again gives the same name
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def trim(self, limit: int) -> int:
        """Drop the least recently used segments above `limit` bytes, and old drafts; returns how many segments went."""
        for draft in self.drafts.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime > ABANDONED:
                    shutil.rmtree(draft, ignore_errors=True)
        known = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another run dropped it
                used = (path / manifest.NAME).stat().st_mtime_ns
                known.append((used, path.name, sum(file.stat().st_size for file in path.iterdir())))
        total, dropped = 0, 0
        for _, name, size in sorted(known, reverse=True):
            total += size
            if total > limit:
                dropped += self._drop(name)
        return dropped

    def _keys(self, name: str) -> NDArray[np.bytes_]:
        """The keys of a segment, not yet held against its manifest.

        Raises IntegrityError for one that is damaged, UnreachableError for one that cannot be opened just now.
        """
        try:
            with (self.folder / name / ENTRIES).open("rb"):
                pass
        except FileNotFoundError:
            raise IntegrityError(f"{self.folder / name} has no {ENTRIES}") from None
        except OSError as error:
            raise UnreachableError(f"{self.folder / name} cannot be opened: {error.strerror}") from error
        tensors = self.opened[name] if name in self.opened else read_tensors(self.folder / name / ENTRIES)
        keys = tensors.get(KEY)
        if keys is None or keys.dtype != torch.uint8 or keys.shape[1:] != (KEY_BYTES,):
            raise IntegrityError(f"{self.folder / name} has no table of keys")
        return sortable(keys.numpy())

    def _open(self, name: str) -> dict[str, Tensor]:
        """The tensors of a segment whose bytes agree with its manifest and whose name is that manifest's digest."""
        path = self.folder / name
        if name not in self.opened:
            if manifest.verify(path, KIND).digest != name:
                raise IntegrityError(f"{path} holds the manifest of another segment")
            self.opened[name] = read_tensors(path / ENTRIES)
        with suppress(FileNotFoundError):
            os.utime(path / manifest.NAME)  # what `trim` goes by
        return self.opened[name]

    def _drop(self, name: str) -> bool:
        """Take a segment out by one rename, so that nobody finds half of it; false if another run was quicker."""
        grave = self.drafts / uuid4().hex
        self.opened.pop(name, None)
        try:
            (self.folder / name).rename(grave)
        except FileNotFoundError:
            return False
        shutil.rmtree(grave, ignore_errors=True)
        return True


def sortable(keys: Keys) -> NDArray[np.bytes_]:
    """Keys as one comparable value each (N,), all of one length: numpy takes no account of zeros at the end."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").reshape(-1)
