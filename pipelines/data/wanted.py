"""What a data folder wants of the store: one key for every picture, mirrored picture and caption, in the index's order.

Of a sample nothing but its key and its label is held in memory, so that the plan for a million pictures is small.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.data import index
from pipelines.data.index import INDEX, CaptionRow, LatentRow, PictureRow
from pipelines.data.latent_store import KEY_BYTES, Keys, key_of, sortable
from pipelines.data.latents import file_of

What = Literal["moments", "mirrored", "caption"]
Size = tuple[int, int]  # height and width of a picture
UNSAID = bytes(KEY_BYTES)  # stands where a picture has no caption


class Recipes(NamedTuple):
    """Digests of how pictures of a size, mirrored or not, and captions are encoded; None for captions left out."""

    picture: Callable[[Size, bool], bytes]
    caption: bytes | None


@dataclass
class Group:
    """Consecutive rows of one split and size, from row `start` of the split on: labels, and keys one after another."""

    split: str
    size: Size
    start: int
    labels: "array[int]" = field(default_factory=lambda: array("q"))
    keys: dict[What, bytearray] = field(default_factory=dict)

    def table(self, what: What) -> Keys:
        """The keys of one kind (n, 32); those of captions that are not said are zeros."""
        return np.frombuffer(self.keys[what], np.uint8).reshape(-1, KEY_BYTES)


class Part(NamedTuple):
    """The entries of one kind that a group wants: `where` they stand among all wanted, and their rows in the split."""

    group: Group
    what: What
    where: slice
    rows: NDArray[np.int64]


class Wanted(NamedTuple):
    """Everything that is wanted: `keys` (N, 32), first the pictures', then the mirrored ones', last the captions'."""

    groups: list[Group]
    parts: list[Part]
    keys: Keys

    def file(self, group: Group) -> str:
        """The name of the file that holds a group's latents."""
        several = len({group.size for group in self.groups}) > 1
        return file_of(group.split, group.size if several else None)

    def parts_of(self, what: What) -> list[Part]:
        """The parts of one kind, in the order of the index."""
        return [part for part in self.parts if part.what == what]


class Captions(NamedTuple):
    """Unique captions, numbered from 1 in the order in which the index first says them; 0 is the null caption.

    `where` (M,) is a place of each among all wanted, `number` (K,) the number of each caption wanted.
    """

    where: NDArray[np.int64]
    number: NDArray[np.int64]


def plan(folder: Path, recipes: Recipes, flip: bool) -> Wanted:
    """Read the index of a data folder once and name all that is wanted."""
    groups = list(_groups(folder, recipes, flip))
    parts: list[Part] = []
    tables: list[Keys] = [np.empty((0, KEY_BYTES), np.uint8)]
    count = 0
    for what in _kinds(recipes, flip):
        for group in groups:
            table = group.table(what)
            said = np.flatnonzero(table.any(1))
            parts.append(Part(group, what, slice(count, count + len(said)), group.start + said))
            tables.append(table[said])
            count += len(said)
    return Wanted(groups, parts, np.concatenate(tables))


def unique_captions(wanted: Wanted) -> Captions:
    """The captions that are wanted, each text once."""
    start = wanted.parts_of("caption")[0].where.start
    _, first, inverse = np.unique(sortable(wanted.keys[start:]), return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(first), np.int64)
    number[order] = np.arange(1, len(first) + 1)
    return Captions(start + first[order], number[inverse])


def latent_rows(folder: Path, wanted: Wanted) -> Iterator[LatentRow]:
    """Which row of which file holds which picture, in the order of the index."""
    pictures = index.stream(folder / INDEX, PictureRow)
    for group in wanted.groups:
        name = wanted.file(group)
        for number, key in enumerate(group.table("moments")):
            picture = next(pictures)
            yield LatentRow(picture.key, picture.sha256, picture.split, name, number, key.tobytes().hex())


def caption_rows(folder: Path, wanted: Wanted, captions: Captions) -> Iterator[CaptionRow]:
    """Which row holds which text, in ascending order."""
    told = 0
    pictures = index.stream(folder / INDEX, PictureRow)
    said = (picture.caption for picture in pictures if picture.caption is not None)
    for number, text in zip(captions.number.tolist(), said, strict=True):
        if number > told:
            told = number
            yield CaptionRow(number, text, wanted.keys[captions.where[number - 1]].tobytes().hex())


def _kinds(recipes: Recipes, flip: bool) -> list[What]:
    kinds: list[What] = ["moments"]
    return kinds + (["mirrored"] if flip else []) + (["caption"] if recipes.caption else [])


def _groups(folder: Path, recipes: Recipes, flip: bool) -> Iterator[Group]:
    group: Group | None = None
    for picture in index.stream(folder / INDEX, PictureRow):
        size = (picture.height, picture.width)
        if group is None or (group.split, group.size) != (picture.split, size):
            start = 0
            if group is not None:
                yield group
                start = group.start + len(group.labels) if group.split == picture.split else 0
            group = Group(picture.split, size, start, keys={what: bytearray() for what in _kinds(recipes, flip)})
            ways = {what: recipes.picture(size, what == "mirrored") for what in group.keys if what != "caption"}
        group.labels.append(picture.label)
        for what, recipe in ways.items():
            group.keys[what] += key_of(recipe, bytes.fromhex(picture.sha256))
        if recipes.caption is not None:
            said = picture.caption
            group.keys["caption"] += UNSAID if said is None else key_of(recipes.caption, said.encode())
    if group is not None:
        yield group
