"""Pictures of a prepared folder by row number, straight from its tars.

A row is found through the index and read at its offset, so any order costs the same and a batch is a pure function of
its row numbers, the seed and the step. Of a row only numbers are held; its texts stay in Arrow's columns. Every file
is held against the manifest before it is used, and again when another stands in its place.
"""

import mmap
import time
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property, lru_cache
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_core import images, manifest
from diffusion_core.errors import DataError, IntegrityError, suggest
from diffusion_core.manifest import Manifest
from diffusion_core.noise import Noise, Stream
from diffusion_core.objective import Batch
from pipelines.data import index
from pipelines.data.index import INDEX, PictureRow
from pipelines.data.latents import LOOK_EVERY, Stamp

CACHE_BYTES = 256 * 2**20  # decoded pictures kept by one reader: all of a small set, a part of a large one
MAPPED = 256  # files kept mapped: a process may have about a thousand open
PLACES = ("split", "shard", "offset", "size", "height", "width", "label")


class Samples(NamedTuple):
    """A whole split in memory: images uint8 (N, H, W, C), labels int64 (N,) and keys, in index order."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    keys: tuple[str, ...]


def read_samples(folder: Path, split: str) -> Samples:
    """Decode a whole split as squares of the folder's resolution, whatever shapes it has; raises as `Pictures` does."""
    pictures = Pictures.open(folder, split)
    side: int = manifest.read(folder, "data").about["resolution"]
    decoded = np.empty((len(pictures), side, side, pictures.shape[0]), np.uint8)
    square = images.Fit(((side, side),))
    for row in range(len(pictures)):
        decoded[row] = pictures.resized(row, square)
    return Samples(decoded, pictures.labels.numpy(), tuple(pictures.keys))


class Mapped(NamedTuple):
    """A file in memory, its stamp when it was opened, and when that was last looked at (monotonic seconds)."""

    file: mmap.mmap
    view: memoryview
    stamp: Stamp
    looked: float


class Shards:
    """The files of a folder, mapped into memory when they are asked for; at most `most` of them stay mapped.

    A file's bytes are held against the manifest when it is first opened, and again when the file of its name is another
    or was written to, which is looked for once in LOOK_EVERY seconds of use. Without a manifest such a file is refused.
    """

    def __init__(self, folder: Path, found: Manifest | None, most: int = MAPPED) -> None:
        self.folder, self.found, self.most = folder, found, most
        self.mapped: OrderedDict[str, Mapped] = OrderedDict()
        self.verified: dict[str, Stamp] = {}

    def view(self, name: str) -> memoryview:
        """A file's bytes, not empty.

        Raises IntegrityError naming one missing, unlisted or unlike the manifest, DataError naming an empty one.
        """
        mapped = self.mapped.get(name)
        if (
            mapped is None
            or time.monotonic() - mapped.looked > LOOK_EVERY
            or mapped.file.size() < mapped.stamp.size  # to touch what was cut off would end the process by a signal
        ):
            self.mapped[name] = mapped = self._look(name, mapped)
            if len(self.mapped) > self.most:
                self.mapped.popitem(last=False)
        self.mapped.move_to_end(name)
        return mapped.view

    def _look(self, name: str, mapped: Mapped | None) -> Mapped:
        path, looked = self.folder / name, time.monotonic()
        if not path.is_file():
            raise IntegrityError(f"{path} is missing")
        stamp = Stamp.of(path)  # before the bytes are read: what is written after it is seen at the next look
        if mapped is not None and mapped.stamp == stamp:
            return mapped._replace(looked=looked)
        verified = self.verified.get(name)
        if self.found is None and verified not in (None, stamp):
            raise IntegrityError(f"{path} was replaced while it was being read; start again to read the new one")
        wanted = None if self.found is None else self._listed(name, self.found)
        if wanted is not None and stamp.size != wanted.size:
            raise IntegrityError(f"{path} has {stamp.size} bytes; {self.folder / manifest.NAME} says {wanted.size}")
        if stamp.size == 0:
            raise DataError(f"{path} is an empty file")
        with path.open("rb") as stream:
            file = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(file)
        if wanted is not None and verified != stamp and (digest := sha256(view).hexdigest()) != wanted.sha256:
            said = f"{self.folder / manifest.NAME} says {wanted.sha256[:12]}..."
            raise IntegrityError(f"{path} has SHA-256 {digest[:12]}...; {said}")
        self.verified[name] = stamp
        return Mapped(file, view, stamp, looked)

    def _listed(self, name: str, found: Manifest) -> manifest.File:
        if name not in found.files:
            raise IntegrityError(f"{self.folder / manifest.NAME} does not list '{name}'; {suggest(name, found.files)}")
        return found.files[name]


class Texts:
    """A column of texts by row number, kept as Arrow keeps it."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> str:
        return self.values[row].as_py()

    def __iter__(self) -> Iterator[str]:
        return (value.as_py() for value in self.values)


class Pictures:
    """The pictures of one split, by row: encoded, as uint8 (H, W, C), or as training batches.

    `groups` says how many consecutive rows share a shape, `shapes` their shapes (C, H, W), of which `shape` is the
    first. With `flip`, half of the pictures of a batch are mirrored, drawn by (seed, step, id).
    """

    def __init__(self, shards: Shards, classes: tuple[str, ...], channels: int, table: pa.Table, flip: bool) -> None:
        self.shards, self.classes, self.flip, self.split = shards, classes, flip, table["split"][0].as_py()
        encoded = table["shard"].combine_chunks().dictionary_encode()
        self.names: list[str] = encoded.dictionary.to_pylist()
        self.shard: NDArray[np.int32] = encoded.indices.to_numpy()
        self.offset, self.size, height, width, label = (table[name].to_numpy() for name in PLACES[2:])
        starts = [0, *(np.flatnonzero(np.diff(height) | np.diff(width)) + 1).tolist()]
        self.groups = tuple(np.diff([*starts, len(label)]).tolist())
        self.shapes = tuple((channels, int(height[start]), int(width[start])) for start in starts)
        self.shape: tuple[int, int, int] = self.shapes[0]
        self.ends = np.cumsum(self.groups)
        self.labels = torch.tensor(label)
        self.pixels = lru_cache(CACHE_BYTES // max(map(prod, self.shapes)))(self._decode)

    @classmethod
    def open(cls, folder: Path, split: str, *, flip: bool = False) -> Self:
        """Read the index of a data folder; raises IntegrityError for changed bytes, DataError for an empty split."""
        found = manifest.read(folder, "data")
        shards = Shards(folder, found)
        shards.view(INDEX)
        table = index.read(folder / INDEX, PictureRow, PLACES).filter(pc.field("split") == split)
        if not len(table):
            raise DataError(f"{folder} has no pictures in '{split}'; {suggest(split, found.about['counts'])}")
        return cls(shards, tuple(found.about["classes"]), found.about["channels"], table, flip)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def keys(self) -> Texts:
        """The pictures' keys."""
        return Texts(self._texts("key"))

    @cached_property
    def sha256s(self) -> Texts:
        """The SHA-256 (hex) of the pictures' PNGs."""
        return Texts(self._texts("sha256"))

    def captions(self, ids: Tensor) -> list[str | None]:
        """The captions of rows `ids` (B,), None where there is none."""
        return self._captions.take(pa.array(ids.numpy())).to_pylist()

    def png(self, row: int) -> bytes:
        """The encoded picture as it stands in its shard."""
        start = int(self.offset[row])
        return bytes(self.shards.view(self.names[self.shard[row]])[start : start + int(self.size[row])])

    def batch(self, ids: Tensor, noise: Noise) -> Batch:
        """Rows `ids` (B,) of one shape as x float32 (B, C, H, W) in [-1, 1], with cond {"label": int64 (B,)}."""
        x = self.tensor(ids)
        if self.flip:
            turned = noise.uniform((), Stream.AUGMENT) < 0.5
            x[turned] = x[turned].flip(3)
        return Batch(x, {"label": self.labels[ids]}, ids)

    def tensor(self, ids: Tensor) -> Tensor:
        """The pictures of rows `ids` (B,), float32 (B, C, H, W) in [-1, 1].

        Raises DataError naming a picture that cannot be decoded, or for rows of several shapes, and IntegrityError
        naming a shard that is no longer what the manifest says, also where its pictures have been decoded before.
        """
        rows = ids.numpy()
        groups = np.unique(np.searchsorted(self.ends, rows, side="right"))
        if len({self.shapes[group] for group in groups}) > 1:
            raise DataError(f"a batch of pictures of several shapes, {[self.shapes[g] for g in groups]}; one is wanted")
        for shard in np.unique(self.shard[rows]):
            self.shards.view(self.names[shard])
        return images.to_tensor([self.pixels(row) for row in rows.tolist()])

    def resized(self, row: int, fit: images.Fit) -> NDArray[np.uint8]:
        """One picture in the nearest of some sizes, uint8 (H, W, C); raises as `tensor` does."""
        if self._shape(row)[1:] in fit.shapes:
            return self.pixels(row)
        channels, origin = self.shape[0], self._origin(row)
        return images.decode(images.transcode(self.png(row), channels, fit, origin=origin).png, channels, origin=origin)

    def _shape(self, row: int) -> tuple[int, int, int]:
        return self.shapes[np.searchsorted(self.ends, row, side="right")]

    def _origin(self, row: int) -> str:
        return f"{self.shards.folder / self.names[self.shard[row]]}: {self.keys[row]}"

    def _decode(self, row: int) -> NDArray[np.uint8]:
        channels, height, width = self._shape(row)
        pixels = images.decode(self.png(row), channels, origin=self._origin(row))
        if pixels.shape[:2] != (height, width):
            found = f"{pixels.shape[0]}x{pixels.shape[1]}"
            raise DataError(f"{self._origin(row)} is {found}, and {INDEX} says {height}x{width}")
        return pixels

    @cached_property
    def _captions(self) -> pa.Array:
        return self._texts("caption")

    def _texts(self, column: str) -> pa.Array:
        """A column of this split, read when it is first wanted; its texts may be more than the 2 GB of a `string`."""
        self.shards.view(INDEX)
        table = index.read(self.shards.folder / INDEX, PictureRow, ("split", column))
        return table.filter(pc.field("split") == self.split)[column].cast(pa.large_string()).combine_chunks()
