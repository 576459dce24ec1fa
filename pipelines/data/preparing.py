"""One part of a source, prepared: what one task does, here or on another machine.

Pictures are decoded, turned upright, cropped, resized, encoded and hashed, and put into a file beside the draft. What
goes back is a table of fixed-size columns and the refusals, so that the driver holds little for each picture.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion_core import images
from diffusion_core.errors import DataError
from diffusion_core.images import Color, Fit, PictureError
from pipelines.data.index import RefusalRow
from pipelines.data.opt_out import OptOut
from pipelines.data.phash import Hasher
from pipelines.data.shards import KEY_DIGITS
from pipelines.data.sources import Item, Part, Source

BUFFER = 1 << 20  # bytes
RECORD = np.dtype(
    [
        ("sha256", "S32"),
        ("phash", np.uint64),
        ("start", np.int64),  # of the PNG in the spool; what is said of it follows
        ("png", np.int32),  # bytes
        ("about", np.int32),  # bytes
        ("shape", np.int16),  # its number among the recipe's
        ("label", np.int32),  # its number among the part's, or -1
    ]
)


class About(NamedTuple):
    """What is said of a prepared picture: `found` is the SHA-256 (hex) of the bytes as found."""

    origin: str
    found: str
    caption: str | None
    licence: str | None
    source: str | None


class Budget(NamedTuple):
    """How many defects there may be: a share of all `pictures`, where known how many, and so many in a row."""

    pictures: int | None
    max_percent: float
    max_consecutive: int

    def exceeded(self, defects: int, total: int) -> bool:
        """Whether so many of so many are too many."""
        return 100 * defects > self.max_percent * total


@dataclass(frozen=True)
class Recipe:
    """How pictures become samples, and when a task may give up."""

    source: Source
    channels: int
    fit: Fit
    background: Color
    min_side: int
    max_pixels: int
    classes: tuple[str, ...]
    opt_out: Path | None
    budget: Budget


class Task(NamedTuple):
    """One part, how to prepare it, and the file to put its pictures into."""

    part: Part
    recipe: Recipe
    file: Path


class Refused(NamedTuple):
    """An item left out and how many of its part came before it."""

    place: int
    row: RefusalRow


@dataclass
class Done:
    """What became of a part: `seen` items, of which those in `records` were prepared; `unread` if it broke off."""

    part: Part
    file: Path
    seen: int = 0
    records: NDArray[np.void] = field(default_factory=lambda: np.empty(0, RECORD))
    labels: tuple[str, ...] = ()
    refused: list[Refused] = field(default_factory=list)
    unread: bool = False


class Worker:
    """Prepares the items of one part, one after another."""

    def __init__(self, recipe: Recipe, spool: BinaryIO):
        self.recipe, self.spool = recipe, spool
        self.opt_out = OptOut(recipe.opt_out) if recipe.opt_out else None
        self.hasher, self.rows, self.end = Hasher(), list[tuple[object, ...]](), 0
        self.labels: dict[str, int] = {}

    def take(self, item: Item) -> tuple[str, str] | None:
        """Put one picture into the spool; or the kind of reason and the reason why it is left out."""
        fault = item.fault or _unfit(item, self.recipe)
        found = hashlib.sha256(item.data).hexdigest()
        origin = _text(item.origin)
        if listed := self.opt_out and self.opt_out.named((origin, origin.rpartition("/")[2], found)):
            return "opt_out", f"the opt-out list names {listed}"
        if fault:
            return fault
        try:
            png, grey = images.transcode(
                item.data,
                self.recipe.channels,
                self.recipe.fit,
                max_pixels=self.recipe.max_pixels,
                min_side=self.recipe.min_side,
                background=self.recipe.background,
                origin=item.origin,
            )
        except PictureError as error:
            return error.kind, str(error)
        digest = hashlib.sha256(png)
        sha256 = digest.hexdigest()
        if listed := self.opt_out and self.opt_out.named((sha256, sha256[:KEY_DIGITS])):
            return "opt_out", f"the opt-out list names {listed}, which is this picture as prepared"
        about = json.dumps(About(origin, found, item.caption, _note(item.licence), _note(item.source)))
        label = -1 if item.label is None else self.labels.setdefault(item.label, len(self.labels))
        shape = self.recipe.fit.shapes.index((grey.shape[0], grey.shape[1]))
        self.spool.writelines((png, about.encode()))
        self.rows.append((digest.digest(), 0, self.end, len(png), len(about), shape, label))
        self.hasher.add(grey)
        self.end += len(png) + len(about)
        return None

    def records(self) -> NDArray[np.void]:
        """The table of all that was taken."""
        table = np.array(self.rows, RECORD)
        table["phash"] = self.hasher.hashes()
        return table


def prepare(task: Task) -> Done:
    """Prepare one part; stops where its refusals alone are too many. Raises UnreachableError as the source does."""
    done, in_a_row = Done(task.part, task.file), 0
    recipe, budget, defects = task.recipe, task.recipe.budget, 0
    with task.file.open("wb", BUFFER) as spool:
        worker = Worker(recipe, spool)
        try:
            for item in recipe.source.items(task.part):
                reason = worker.take(item)
                defect = reason is not None and reason[0] != "opt_out"
                if reason:
                    found = hashlib.sha256(item.data).hexdigest()
                    row = RefusalRow(_text(item.origin), reason[0], _text(reason[1]), found)
                    done.refused.append(Refused(done.seen, row))
                done.seen += 1
                in_a_row, defects = (in_a_row + 1 if defect else 0), defects + defect
                if in_a_row > budget.max_consecutive:
                    break
                if defect and budget.pictures is not None and budget.exceeded(defects, budget.pictures):
                    break
        except DataError as error:
            where = task.part.where
            name = where["name"] if isinstance(where, Mapping) and "name" in where else f"part {task.part.number}"
            row = RefusalRow(_text(str(name)), "unreadable", _text(str(error)), hashlib.sha256().hexdigest())
            done.refused.append(Refused(done.seen, row))
            done.seen, done.unread = done.seen + 1, True
        done.records, done.labels = worker.records(), tuple(worker.labels)
    return done


def _unfit(item: Item, recipe: Recipe) -> tuple[str, str] | None:
    """What is wrong with what is said of a picture."""
    if item.caption is not None:
        if _text(item.caption) != item.caption or "\0" in item.caption:
            return "bad_caption", f"{item.origin} has a caption that is no text: {ascii(item.caption[:40])}"
        if not item.caption.strip():
            return "bad_caption", f"{item.origin} has an empty caption"
    if item.label is not None and _text(item.label) != item.label:
        return "bad_label", f"{item.origin} has a label that is no text: {ascii(item.label[:40])}"
    if item.label is not None and recipe.classes and item.label not in recipe.classes:
        return "bad_label", f"{item.origin} has the label {item.label!r}, which is none of the source's classes"
    return None


def _note(text: str | None) -> str | None:
    return None if text is None else _text(text)


def _text(text: str) -> str:
    """A text that any file can hold: what is no valid UTF-8 is spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()
