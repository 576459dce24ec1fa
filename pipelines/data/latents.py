"""Training batches from cached moments: mapped from disk, gathered a batch at a time, drawn anew for every step.

A batch is a pure function of its row numbers, the seed and the step. A file is held against the manifest when it is
opened; one that is replaced afterwards stops the run at its next batch.
"""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from diffusion_core import bundle, manifest
from diffusion_core.codec import Moments
from diffusion_core.errors import DataError, IntegrityError, suggest
from diffusion_core.manifest import Manifest
from diffusion_core.noise import Noise, Stream
from diffusion_core.objective import Batch
from diffusion_core.weights import read_tensors

KIND = "latents"
CAPTIONS = "captions.safetensors"
LOOK_EVERY = 1.0  # seconds between two looks at whether the mapped files are still those that were opened


def file_of(split: str, size: tuple[int, int] | None = None) -> str:
    """The name of a split's file, or of its pictures of one size (h, w) where they have several."""
    return f"{split}.safetensors" if size is None else f"{split}-{size[0]}x{size[1]}.safetensors"


def check_codec(found: Manifest, codec: Path) -> None:
    """Raise IntegrityError if the latents of a manifest were made by another codec than the one in a folder."""
    made, here = found.about["codec"], bundle.codec_digest(codec)
    if made != here:
        raise IntegrityError(
            f"the latents were made by the codec {made[:12]}...; {codec} holds {here[:12]}...: run cache_latents again"
        )


class Stamp(NamedTuple):
    """What tells a file from another put in its place, without reading either."""

    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The stamp of a file; raises IntegrityError if it is gone."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise IntegrityError(f"{path} is gone, while it was being read") from None
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)


class Latents:
    """The latent moments of one split; a batch draws a fresh latent from each picture's own distribution.

    `groups` says how many consecutive rows share a shape, `shapes` their shapes (c, h, w), of which `shape` is the
    first; `text_shape` is (L, D) of the captions' tokens, or None without captions.
    """

    def __init__(
        self,
        parts: Sequence[Mapping[str, Tensor]],
        captions: Mapping[str, Tensor],
        classes: tuple[str, ...],
        stamps: Mapping[Path, Stamp],
    ) -> None:
        self.parts, self.captions, self.classes, self.stamps = parts, captions, classes, stamps
        self.groups = tuple(len(part["label"]) for part in parts)
        self.ends = torch.tensor(self.groups).cumsum(0)
        self.shapes = tuple((part["moments"].shape[1] // 2, *part["moments"].shape[2:]) for part in parts)
        self.shape: tuple[int, ...] = self.shapes[0]
        self.text_shape: tuple[int, ...] | None = tuple(captions["text"].shape[1:]) if captions else None
        self.labels = torch.cat([part["label"] for part in parts])
        self.looked = time.monotonic()

    @classmethod
    def open(cls, folder: Path, split: str) -> Self:
        """Map the moments of a latents folder.

        Raises IntegrityError if a file is missing or its bytes changed, DataError for a split that there is not.
        """
        found = manifest.read(folder, KIND)
        names = _files(found, split)
        if not names:
            raise DataError(f"{folder} has no latents of '{split}'; {suggest(split, found.about['counts'])}")
        captions = [CAPTIONS] if found.about["text"] else []
        stamps = {folder / name: _checked(folder / name, found.files[name]) for name in [*names, *captions]}
        tensors = [read_tensors(path) for path in stamps]
        classes = tuple(found.about["classes"])
        latents = cls(tensors[: len(names)], tensors[-1] if captions else {}, classes, stamps)
        latents.look()  # nothing was replaced between reading the digests and mapping
        return latents

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, ids: Tensor, noise: Noise) -> Batch:
        """Rows `ids` (B,) of one group as x float32 (B, c, h, w), drawn by `noise`, with cond "label" int64 (B,).

        With captions, cond has "text" float32 (B, L, D) and "mask" bool (B, L) as well. Where the moments of the
        mirrored pictures are kept, `noise` draws which of the two is taken. Raises DataError for ids of several groups.
        """
        if time.monotonic() - self.looked > LOOK_EVERY:
            self.look()
        part, rows = self._place(ids)
        moments = part["moments"].index_select(0, rows)
        if "mirrored" in part:
            turned = noise.uniform((), Stream.AUGMENT) < 0.5
            moments[turned] = part["mirrored"].index_select(0, rows[turned])
        cond = {"label": self.labels[ids]}
        if self.captions:
            places = part["caption"][rows]
            cond["text"] = self.captions["text"].index_select(0, places).float()
            cond["mask"] = self.captions["mask"].index_select(0, places)
        mean, std = moments.float().chunk(2, 1)
        return Batch(Moments(mean, std).draw(noise), cond, ids)

    def look(self) -> None:
        """Raise IntegrityError if one of the mapped files is no longer the one that was opened."""
        self.looked = time.monotonic()
        for path, stamp in self.stamps.items():
            if Stamp.of(path) != stamp:
                raise IntegrityError(f"{path} was replaced while it was being read; start again to read the new one")

    def _place(self, ids: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        """The group that all ids are of, and their rows in it."""
        if len(self.parts) == 1:
            return self.parts[0], ids
        groups = torch.searchsorted(self.ends, ids, right=True)
        number = int(groups[0])
        if (groups != number).any():
            raise DataError(
                f"a batch of latents of several sizes, groups {sorted(set(groups.tolist()))}; one is wanted"
            )
        return self.parts[number], ids - (int(self.ends[number]) - self.groups[number])


def _files(found: Manifest, split: str) -> list[str]:
    """The names of a split's files, by height and width: the order of the rows in the index."""
    sizes = {name: re.fullmatch(rf"{re.escape(split)}(?:-(\d+)x(\d+))?\.safetensors", name) for name in found.files}
    return sorted(
        (name for name, match in sizes.items() if match),
        key=lambda name: [int(side or 0) for side in re.findall(r"\d+", name.removeprefix(split))],
    )


def _checked(path: Path, wanted: manifest.File) -> Stamp:
    """The stamp of a file whose bytes agree with the manifest; raises IntegrityError naming one that does not."""
    stamp = Stamp.of(path)
    if stamp.size != wanted.size or (digest := manifest.hash_file(path)) != wanted.sha256:
        got = f"{stamp.size} bytes" if stamp.size != wanted.size else f"SHA-256 {digest[:12]}..."
        said = f"{wanted.size} bytes, SHA-256 {wanted.sha256[:12]}..."
        raise IntegrityError(f"{path} has {got}; {path.parent / manifest.NAME} says {said}")
    return stamp
