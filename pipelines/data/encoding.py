"""Encoding samples into the store, as tasks that run here or on any worker.

A task opens what it reads itself and names what it makes by what it opened: the digest of the picture's own bytes, or
of the caption's, and of the encoder's weights. So a folder that changes under it cannot leave a wrong entry behind.

Every call of an encoder has exactly `batch` samples, the last one repeated where there are fewer, and one thread. What
a sample gives is then the same to the bit, whichever others are encoded with it.
"""

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_core import bundle, images, manifest
from diffusion_core.codec import Codec
from diffusion_core.errors import DataError, IntegrityError
from diffusion_core.nets.text import TextEncoder
from pipelines.data.latent_store import Store, key_of, keys_of
from pipelines.data.reader import Pictures
from pipelines.data.wanted import What

LAYOUT, TEXT_LAYOUT = "mean+std", "text+mask"
RANGE = [-1, 1]
CORE = "diffusion_core."
FOLLOWED = (f"{CORE}nets.", f"{CORE}adapters.tokenizer")
SEGMENT_BYTES = 64 * 2**20  # a segment is closed at this size
SEGMENT_SECONDS = 120.0  # or after this time: all that a killed worker can lose


class Encoder(NamedTuple):
    """The folder of a codec or a text encoder, absolute, and the digests of its weights and of its code that are meant.

    `batch` samples are encoded at once; what comes out is stored as `dtype`.
    """

    folder: Path
    digest: str
    code: str
    dtype: str
    batch: int


def picture_recipe(shape: Sequence[int], mirrored: bool, codec: Encoder) -> bytes:
    """Digest of all but the picture itself that its moments depend on; `shape` is (C, H, W)."""
    transform = {"image_shape": list(shape), "range": RANGE, "mirrored": mirrored}
    return _digest({"transform": transform, "layout": LAYOUT}, codec)


def caption_recipe(encoder: Encoder) -> bytes:
    """Digest of all but the caption itself that its tokens depend on."""
    return _digest({"layout": TEXT_LAYOUT}, encoder)


def code_of(encoder: nn.Module) -> str:
    """SHA-256 (hex) over our source files that a module's classes, and those they inherit from, stand in.

    The files of networks and tokenizers that these import count too, and the one in which pixels become numbers, so
    that a corrected encoder reads no entries of a wrong one.
    """
    names = {known.__module__ for part in encoder.modules() for known in type(part).__mro__}
    waiting = sorted(name for name in names if name.startswith(CORE)) + [images.__name__]
    found: dict[str, str] = {}
    while waiting:
        module = sys.modules[name := waiting.pop()]
        found[name] = manifest.hash_file(Path(str(module.__file__)))
        used = {str(getattr(value, "__module__", "")) for value in vars(module).values()}
        waiting += [other for other in used if other.startswith(FOLLOWED) and other not in found]
    return manifest.digest_of(found)


def _digest(recipe: dict[str, object], encoder: Encoder) -> bytes:
    made_by = {"weights": encoder.digest, "code": encoder.code, "dtype": encoder.dtype}
    made_by |= {"batch": str(encoder.batch)}  # another one may round otherwise
    return bytes.fromhex(manifest.digest_of(recipe | made_by))


class Entries(NamedTuple):
    """Encoded samples: a key each and, by name, tensors of as many rows."""

    keys: list[bytes]
    tensors: dict[str, Tensor]


class Source(NamedTuple):
    """The data folder that samples are read from, absolute, and the digest of the manifest that is meant."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class Task:
    """Rows of one split and size to be encoded into the store below a folder.

    All folders are on storage that all workers see.
    """

    store: Path
    source: Source
    encoder: Encoder
    what: What
    split: str
    rows: tuple[int, ...]

    def encode(self, rows: Tensor) -> Entries:
        """The entries of some rows (B,); raises DataError naming a sample whose numbers are not finite."""
        pictures = _pictures(self.source, self.split)
        return self._captions(pictures, rows) if self.what == "caption" else self._moments(pictures, rows)

    def _moments(self, pictures: Pictures, rows: Tensor) -> Entries:
        x, mirrored = pictures.tensor(rows), self.what == "mirrored"
        recipe = picture_recipe(x.shape[1:], mirrored, self.encoder)
        keys = [key_of(recipe, hashlib.sha256(pictures.png(row)).digest()) for row in rows.tolist()]
        moments = torch.cat(_codec(self.encoder).encode(x.flip(3) if mirrored else x), 1)
        return Entries(
            keys, {"moments": self._stored(moments, [f"picture {pictures.keys[row]}" for row in rows.tolist()])}
        )

    def _captions(self, pictures: Pictures, rows: Tensor) -> Entries:
        texts = [text or "" for text in pictures.captions(rows)]
        recipe = caption_recipe(self.encoder)
        keys = [key_of(recipe, text.encode()) for text in texts]
        text, mask = _text(self.encoder).encode(texts)
        return Entries(keys, {"text": self._stored(text, [f"caption {text!r}" for text in texts]), "mask": mask})

    def _stored(self, value: Tensor, names: Sequence[str]) -> Tensor:
        """A value (B, ...) as it is kept."""
        value = value.to(getattr(torch, self.encoder.dtype))
        finite = value.isfinite().flatten(1).all(1)
        if not finite.all():
            name = names[int((~finite).nonzero()[0])]
            raise DataError(f"what {self.encoder.folder} makes of {name} is not finite as {self.encoder.dtype}")
        return value


@torch.no_grad()
def encode(task: Task) -> int:
    """Encode a task's rows into segments of its store; returns how many they were."""
    store, threads = Store(task.store), torch.get_num_threads()
    torch.set_num_threads(1)  # sums are split differently among more; other cores are for other tasks
    try:
        for entries in _segments(_batches(task)):
            store.put(keys_of(entries.keys), entries.tensors)
    finally:
        torch.set_num_threads(threads)
    return len(task.rows)


def _batches(task: Task) -> Iterator[Entries]:
    for start in range(0, len(task.rows), task.encoder.batch):
        rows = task.rows[start : start + task.encoder.batch]
        keys, tensors = task.encode(torch.tensor(rows + rows[-1:] * (task.encoder.batch - len(rows))))
        yield Entries(keys[: len(rows)], {name: value[: len(rows)] for name, value in tensors.items()})


def _segments(batches: Iterable[Entries]) -> Iterator[Entries]:
    """Batches joined up to the size or the age of a segment."""
    some: list[Entries] = []
    size, begun = 0, time.monotonic()
    for one in batches:
        some.append(one)
        size += sum(value.nbytes for value in one.tensors.values())
        if size >= SEGMENT_BYTES or time.monotonic() - begun > SEGMENT_SECONDS:
            yield _joined(some)
            some, size, begun = [], 0, time.monotonic()
    if some:
        yield _joined(some)


def _joined(some: Sequence[Entries]) -> Entries:
    tensors = {name: torch.cat([one.tensors[name] for one in some]) for name in some[0].tensors}
    return Entries([key for one in some for key in one.keys], tensors)


@lru_cache(maxsize=2)
def _pictures(source: Source, split: str) -> Pictures:
    """The pictures of a split, opened once by every process that encodes."""
    _same(source.folder, manifest.read(source.folder).digest, source.digest)
    return Pictures.open(source.folder, split)


@lru_cache(maxsize=1)
def _codec(meant: Encoder) -> Codec:
    codec, _ = bundle.load_codec(meant.folder)
    _same(meant.folder, bundle.codec_digest(meant.folder), meant.digest)
    _same(Path(bundle.__file__).parent, code_of(codec), meant.code)
    return codec


@lru_cache(maxsize=1)
def _text(meant: Encoder) -> TextEncoder:
    encoder = bundle.load_text(meant.folder)
    _same(meant.folder, bundle.text_digest(meant.folder), meant.digest)
    _same(Path(bundle.__file__).parent, code_of(encoder), meant.code)
    return encoder


def _same(folder: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise IntegrityError(f"{folder} changed while it was being read: digest {found[:12]}..., not {wanted[:12]}...")
