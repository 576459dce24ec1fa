"""Prepare: pictures as found -> shards of equal pictures, an index of them, and a quarantine with reasons.

Each item is decoded, turned upright, cropped, resized, encoded once and hashed. The hash is its identity: it gives the
key, the split and the place in the shards, so neither the source's order, nor the number of workers, nor a rerun
changes a byte.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion_core import images
from diffusion_core.errors import ConfigError
from diffusion_core.images import Color, Crop, Fit, Shape
from diffusion_core.spec import snake, spec
from pipelines import launch
from pipelines.data import duplicates, index, opt_out, preparing, quarantine
from pipelines.data.index import INDEX, NO_LABEL, PictureRow, RefusalRow
from pipelines.data.phash import spelt
from pipelines.data.preparing import About, Budget, Recipe, Task
from pipelines.data.quarantine import DECISIONS, Quarantine
from pipelines.data.shards import KEY_DIGITS, shard_name, write_shard
from pipelines.data.sources import Catalog, Part, Source, address
from pipelines.data.spool import Spool, spooled
from pipelines.progress import Bar
from pipelines.stage import Stage, run

SPLITS = ("train", "val")
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Config:
    """`resolution` in pixels; `val_share` of all contents goes to val; a shard holds `shard_samples` pictures.

    `buckets` are (height, width): a picture goes to the one of the nearest aspect ratio; without any, all become
    squares of `resolution`. Two pictures whose 64-bit perceptual hashes differ by `near_duplicates` bits or less are
    one. `workers` of 0 is this process, more are Ray tasks.
    """

    source: Source
    channels: Literal[1, 3]
    resolution: int = 32
    crop: Crop = "center"
    buckets: tuple[Shape, ...] = ()
    background: Color = images.WHITE
    min_side: int = 1
    max_pixels: int = images.MAX_PIXELS
    val_share: float = 0.2
    shard_samples: int = 1000
    duplicates: Literal["remove", "keep"] = "remove"
    near_duplicates: int | None = None
    opt_out: str | None = None
    max_quarantine_percent: float = 1.0
    max_consecutive: int = 100
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("resolution", "shard_samples", "min_side", "max_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: at least 1 is wanted")
        if self.max_pixels > images.MOST_PIXELS:
            raise ConfigError(f"max_pixels {self.max_pixels}: at most {images.MOST_PIXELS} can be decoded")
        for name in ("max_consecutive", "workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)}: 0 or more are wanted")
        if not 0 <= self.val_share < 1:
            raise ConfigError(f"val_share {self.val_share}: a share in [0, 1) is wanted")
        if not 0 <= self.max_quarantine_percent <= 100:
            raise ConfigError(f"max_quarantine_percent {self.max_quarantine_percent}: a number in [0, 100] is wanted")
        if self.near_duplicates is not None and not 0 <= self.near_duplicates <= duplicates.MOST:
            bits = f"a number of bits in [0, {duplicates.MOST}], or null, is wanted"
            raise ConfigError(f"near_duplicates {self.near_duplicates}: {bits}")
        if self.near_duplicates is not None and self.duplicates == "keep":
            raise ConfigError("near_duplicates removes equal pictures too; duplicates: keep would contradict it")
        if not all(0 <= level <= 255 for level in self.background):
            raise ConfigError(f"background {list(self.background)}: three levels in [0, 255] are wanted")
        self._check_buckets()
        if self.opt_out is not None:
            address.check(self.opt_out)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The sizes (height, width) that pictures may get."""
        return tuple(sorted(self.buckets)) or ((self.resolution, self.resolution),)

    def _check_buckets(self) -> None:
        if any(min(bucket) < 1 for bucket in self.buckets):
            raise ConfigError(f"buckets {spec(self.buckets)}: height and width of at least 1 are wanted")
        ratios = Counter(bucket[0] / bucket[1] for bucket in self.buckets)
        if twice := [spec(bucket) for bucket in self.buckets if ratios[bucket[0] / bucket[1]] > 1]:
            raise ConfigError(f"buckets {twice[0]} and {twice[1]} have one aspect ratio; no picture would go to one")


class Content(NamedTuple):
    """All prepared pictures by content, the names of their classes, and what became of each.

    `stands_for` is the place of the picture because of which one is left out, or -1 for one that is kept.
    """

    table: NDArray[np.void]
    classes: tuple[str, ...]
    stands_for: NDArray[np.int64]


@dataclass
class Tally:
    """What was written: pictures by split and class, and how many have a caption."""

    labels: dict[str, Counter[int]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    captions: int = 0


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Write shards, index and quarantine; raises DataError for an unusable source or too many unusable pictures."""
    with spooled(stage.out) as spool:
        catalog = config.source.catalog(spool.folder)
        refused = _gather(config, catalog, stage, spool)
        content = _decide(config, catalog.classes, spool)
        rows, decided = refused.rows, _decisions(content, spool, config.near_duplicates)
        left_out = quarantine.write(stage.out, rows, decided)
        kept = content.table[content.stands_for < 0]
        shapes = [config.shapes[number] for number in np.unique(kept["shape"])]
        with stage.bar("write, pictures", len(kept)) as bar:
            tally = _write(stage, config, spool, kept, len(shapes) > 1, bar)
    counts = {split: tally.labels[split].total() for split in SPLITS}
    defects = sum(count for kind, count in left_out.items() if kind not in DECISIONS)
    decisions = {kind: left_out[kind] for kind in DECISIONS}
    stage.tracker.metrics({**counts, "quarantined": defects, **decisions})
    said = [f"{counts['train']:,} pictures in train", f"{counts['val']:,} in val", f"{defects:,} quarantined"]
    said += [f"{count:,} left out as {kind}" for kind, count in decisions.items() if count]
    stage.say(f"{', '.join(said)}; see {quarantine.REPORT}")
    return {
        "source": {"kind": snake(type(config.source).__name__), "name": _name(config.source)},
        "resolution": config.resolution,
        "channels": config.channels,
        "shapes": spec(shapes),
        "classes": list(content.classes),
        "counts": counts,
        "class_counts": {
            split: [tally.labels[split][label] for label in range(len(content.classes))] for split in SPLITS
        },
        "captions": tally.captions,
        "quarantined": defects,
        "left_out": decisions,
    }


def _name(source: Source) -> str:
    """What the pictures are called: the last part of the first path, or the source's kind."""
    said = spec(source)
    path: str = next(iter(said.get("paths") or ()), None) or said.get("path") or said["kind"]
    return PurePosixPath(path).name


def in_val(sha256: NDArray[np.bytes_], val_share: float) -> NDArray[np.bool_]:
    """Which contents belong to val, for ever: their hashes (n,) read as numbers in [0, 1) against `val_share`."""
    heads = np.ascontiguousarray(sha256).view(">u4").reshape(len(sha256), -1)[:, 0]
    return np.asarray(heads / 2**32 < val_share)


def _gather(config: Config, catalog: Catalog, stage: Stage, spool: Spool) -> Quarantine:
    """Prepare all parts into the spool; raises DataError for more refusals than the budgets allow."""
    budget = Budget(catalog.pictures, config.max_quarantine_percent, config.max_consecutive)
    recipe = Recipe(
        config.source,
        config.channels,
        Fit(config.shapes, config.crop),
        config.background,
        config.min_side,
        config.max_pixels,
        catalog.classes,
        opt_out.keep(config.opt_out, spool.folder).resolve() if config.opt_out else None,
        budget,
    )
    refused = Quarantine(budget, catalog.total, catalog.unit)
    tasks = map(partial(_task, recipe, spool.folder.resolve()), catalog.parts)
    done = launch.map(preparing.prepare, tasks, config.workers)
    with stage.bar(f"decode, {catalog.unit}", catalog.total) as bar:
        for part in done:
            refused.take(part)
            spool.take(part)
            bar.step(part.part.weight)
    refused.close()
    return refused


def _task(recipe: Recipe, folder: Path, part: Part) -> Task:
    return Task(part, recipe, folder / f"{part.number:08d}")


def _decide(config: Config, classes: tuple[str, ...], spool: Spool) -> Content:
    """Put everything into content order and find what is left out as a duplicate."""
    table, names = spool.table(classes)
    stands_for = np.full(len(table), -1)
    if config.duplicates == "remove":
        stands_for = duplicates.equal(np.ascontiguousarray(table["sha256"]))
    if config.near_duplicates is not None:
        single = np.flatnonzero(stands_for < 0)
        near = duplicates.near(table["phash"][single], config.near_duplicates)
        stands_for[single[near >= 0]] = single[near[near >= 0]]
        further = stands_for[stands_for]  # of what is equal to a picture that is left out itself
        stands_for = np.where((stands_for >= 0) & (further >= 0), further, stands_for)
    return Content(table, names, stands_for)


def _decisions(content: Content, spool: Spool, near: int | None) -> Iterator[RefusalRow]:
    """Each picture left out for another one, in the order of their content."""
    table = content.table
    for place in np.flatnonzero(content.stands_for >= 0):
        out, other = table[place], table[content.stands_for[place]]
        about, kept = spool.read(out)[1], spool.read(other)[1]
        name = content.classes[other["label"]] + ": " if other["label"] != NO_LABEL else ""
        by = f"{_hex(other)[:KEY_DIGITS]} ({name}{kept.origin})"
        if out["sha256"] == other["sha256"]:
            yield RefusalRow(about.origin, "duplicate", f"duplicate of {by}", about.found)
        else:
            bits = int(out["phash"] ^ other["phash"]).bit_count()
            reason = f"{bits} of 64 bits of the perceptual hash differ from {by}; up to {near} make a near-duplicate"
            yield RefusalRow(about.origin, "near_duplicate", reason, about.found)


def _write(stage: Stage, config: Config, spool: Spool, kept: NDArray[np.void], shaped: bool, bar: Bar) -> Tally:
    """Write every shard and the index beside them; counts what was written."""
    tally, val, copies = Tally(), in_val(kept["sha256"], config.val_share), _copies(kept["sha256"])
    order = np.lexsort((kept["shape"], val))  # which is stable: by content within a split and shape

    def pictures(split: str, places: NDArray[np.int64]) -> Iterator[tuple[PictureRow, bytes]]:
        for place in places:
            png, about = spool.read(kept[place])
            yield _row(kept[place], about, split, int(copies[place]), config.shapes[kept["shape"][place]]), png

    def rows() -> Iterator[PictureRow]:
        for (split, shape), name, places in _shards(order, val, kept["shape"], config.shard_samples):
            path = stage.out / shard_name(SPLITS[split], config.shapes[shape] if shaped else None, name)
            stage.samples[path.name] = len(places)
            for row in write_shard(path, pictures(SPLITS[split], places)):
                tally.labels[row.split][row.label] += 1
                tally.captions += row.caption is not None
                yield row
            bar.step(len(places))

    index.write(stage.out / INDEX, PictureRow, rows())
    return tally


def _shards(
    order: NDArray[np.int64], val: NDArray[np.bool_], shapes: NDArray[np.int16], most: int
) -> Iterator[tuple[tuple[int, int], int, NDArray[np.int64]]]:
    """(split and shape, number, places) of each shard: consecutive places of one split and shape, at most so many."""
    marks = val[order].astype(np.int64) << 16 | shapes[order]
    edges = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(order)]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        for number, first in enumerate(range(start, end, most)):
            split, shape = divmod(int(marks[first]), 1 << 16)
            yield (split, shape), number, order[first : min(first + most, end)]


def _row(record: np.void, about: About, split: str, copy: int, shape: Shape) -> PictureRow:
    """A picture's row, of which only the place in its shard is still unknown."""
    sha256 = _hex(record)
    return PictureRow(
        key=sha256[:KEY_DIGITS] + (f"-{copy}" if copy else ""),
        split=split,
        shard="",
        offset=0,
        size=int(record["png"]),
        sha256=sha256,
        width=shape[1],
        height=shape[0],
        label=int(record["label"]),
        caption=about.caption,
        phash=spelt(int(record["phash"])),
        licence=about.licence,
        source=about.source,
        origin=about.origin,
    )


def _copies(sha256: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """How many of some sorted digests before each one would have the same key."""
    heads = np.ascontiguousarray(sha256).view(f"S{KEY_DIGITS // 2}").reshape(len(sha256), -1)[:, 0]
    first = duplicates.equal(heads)
    return np.where(first < 0, 0, np.arange(len(heads)) - first)


def _hex(record: np.void) -> str:
    """The digest of a picture; numpy takes no account of zeros at its end."""
    return bytes(record["sha256"]).ljust(DIGEST_BYTES, b"\0").hex()


if __name__ == "__main__":
    run("prepare", Config, main, out="artifacts/data", kind="data")
