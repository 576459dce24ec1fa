"""Samples from published folders, by row number: pictures straight from the tars, latents mapped from disk.

A row is found through the index and read at its offset, so any order costs the same and a batch is a pure
function of its row numbers. Every file is checked against the manifest when it is first opened.
"""

import mmap
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_core import images, manifest
from diffusion_core.codec import Moments
from diffusion_core.errors import DataError, IntegrityError, suggest
from diffusion_core.manifest import Manifest
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch
from diffusion_core.weights import read_tensors
from pipelines.data import index
from pipelines.data.index import INDEX, PictureRow

CACHE_BYTES = 256 * 2**20  # decoded pictures kept by one reader: all of a small set, a part of a large one


class Samples(NamedTuple):
    """A whole split in memory: images uint8 (N, H, W, C), labels int64 (N,) and keys, in index order."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    keys: tuple[str, ...]


def read_samples(folder: Path, split: str) -> Samples:
    """Decode a whole split; raises IntegrityError naming a shard that differs from its manifest."""
    pictures = Pictures.open(folder, split)
    channels, height, width = pictures.shape
    decoded = np.empty((len(pictures), height, width, channels), np.uint8)
    for row in range(len(pictures)):
        decoded[row] = pictures.pixels(row)
    return Samples(decoded, pictures.labels.numpy(), pictures.keys)


class Pictures:
    """The pictures of one split, by row: encoded, as uint8 (H, W, C), or as training batches; `shape` is (C, H, W)."""

    def __init__(self, folder: Path, found: Manifest, rows: list[PictureRow]) -> None:
        self.folder, self.found, self.rows = folder, found, rows
        self.classes: tuple[str, ...] = tuple(found.about["classes"])
        channels, side = found.about["channels"], found.about["resolution"]
        self.shape: tuple[int, int, int] = (channels, side, side)
        self.keys = tuple(row.key for row in rows)
        self.labels = torch.tensor([row.label for row in rows])
        self.pixels = lru_cache(maxsize=CACHE_BYTES // int(np.prod(self.shape)))(self._decode)
        self.shards: dict[str, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: Path, split: str) -> Self:
        """Read the index of a data folder; raises IntegrityError for changed bytes, DataError for an empty split."""
        found = manifest.read(folder, "data")
        table = index.read(checked(folder, found, INDEX), PictureRow)
        rows = index.rows(table.filter(pc.field("split") == split), PictureRow)
        if not rows:
            raise DataError(f"{folder} has no pictures in '{split}'; {suggest(split, found.about['counts'])}")
        return cls(folder, found, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def png(self, row: int) -> bytes:
        """The encoded picture as it stands in its shard."""
        place = self.rows[row]
        return self._shard(place.shard)[place.offset : place.offset + place.size]

    def batch(self, ids: Tensor, noise: Noise) -> Batch:
        """Rows `ids` (B,) as x float32 (B, C, H, W) in [-1, 1] and cond {"label": int64 (B,)}; nothing is drawn."""
        del noise
        return Batch(self.tensor(ids), {"label": self.labels[ids]}, ids)

    def tensor(self, ids: Tensor) -> Tensor:
        """The pictures of rows `ids` (B,), float32 (B, C, H, W) in [-1, 1]."""
        return images.to_tensor([self.pixels(row) for row in ids.tolist()])

    def _decode(self, row: int) -> NDArray[np.uint8]:
        return images.decode(self.png(row), self.shape[0], origin=f"{self.rows[row].shard}: {self.keys[row]}")

    def _shard(self, name: str) -> mmap.mmap:
        if name not in self.shards:
            with checked(self.folder, self.found, name).open("rb") as file:
                self.shards[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self.shards[name]


class Latents:
    """The latent moments of one split; a batch draws a fresh latent from each picture's own distribution."""

    def __init__(self, mean: Tensor, std: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
        self.mean, self.std, self.labels, self.classes = mean, std, labels, classes
        self.shape: tuple[int, ...] = tuple(mean.shape[1:])

    @classmethod
    def open(cls, folder: Path, split: str) -> Self:
        """Map the moments of a latents folder; raises IntegrityError if the file is missing or its bytes changed."""
        found = manifest.read(folder, "latents")
        tensors = read_tensors(checked(folder, found, f"{split}.safetensors"))
        return cls(tensors["mean"], tensors["std"], tensors["label"], tuple(found.about["classes"]))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, ids: Tensor, noise: Noise) -> Batch:
        """Rows `ids` (B,) as x float32 (B, c, h, w), drawn anew by `noise`, and cond {"label": int64 (B,)}."""
        moments = Moments(self.mean[ids].float(), self.std[ids].float())
        return Batch(moments.draw(noise), {"label": self.labels[ids]}, ids)


def checked(folder: Path, found: Manifest, name: str) -> Path:
    """The path of a folder's file, once its bytes agree with the manifest; raises IntegrityError naming the file."""
    path = folder / name
    if name not in found.files:
        raise IntegrityError(f"{folder / manifest.NAME} does not list '{name}'; {suggest(name, found.files)}")
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; {folder / manifest.NAME} lists it")
    if (digest := manifest.hash_file(path)) != (wanted := found.files[name].sha256):
        raise IntegrityError(f"{path} has SHA-256 {digest[:12]}...; {folder / manifest.NAME} says {wanted[:12]}...")
    return path
