"""Prepare: pictures as found -> shards of equal pictures, an index of them, and a quarantine with reasons.

Each item is decoded, turned upright, cropped, resized, encoded once and hashed. The hash is its identity: it
gives the key, the split and the place in the shards, so neither the source's order nor a rerun changes a byte.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from diffusion_core import images
from diffusion_core.errors import ConfigError, DataError
from diffusion_core.spec import spec
from pipelines.data import index
from pipelines.data.index import INDEX, QUARANTINE, PictureRow, RefusalRow
from pipelines.data.shards import Entry, Sample, Spool, key_of, write_shards
from pipelines.data.sources import Item, Source
from pipelines.progress import Bar
from pipelines.stage import Stage, run

SPLITS = ("train", "val")
EXAMPLES = 3  # refusals quoted when there are too many


@dataclass(frozen=True)
class Config:
    """`resolution` in pixels; `val_share` of all contents goes to val; a shard holds `shard_samples` pictures."""

    source: Source
    channels: Literal[1, 3]
    resolution: int = 32
    val_share: float = 0.2
    shard_samples: int = 1000
    max_quarantine_percent: float = 1.0

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.shard_samples < 1:
            raise ConfigError(f"resolution {self.resolution}, shard_samples {self.shard_samples}: at least 1 is wanted")
        if not 0 <= self.val_share < 1:
            raise ConfigError(f"val_share {self.val_share}: a share in [0, 1) is wanted")
        if not 0 <= self.max_quarantine_percent <= 100:
            raise ConfigError(f"max_quarantine_percent {self.max_quarantine_percent}: a number in [0, 100] is wanted")


class Quarantine:
    """The refused items of one run; raises DataError as soon as there are more than allowed."""

    def __init__(self, total: int, max_percent: float) -> None:
        self.rows: list[RefusalRow] = []
        self.total, self.max_percent = total, max_percent

    def add(self, origin: str, reason: str, sha256: str) -> None:
        """Leave one item out."""
        self.rows.append(RefusalRow(origin, reason, sha256))
        if 100 * len(self.rows) > self.max_percent * self.total:
            examples = "; ".join(row.reason for row in self.rows[:EXAMPLES])
            refused = f"{len(self.rows)} of {self.total} pictures cannot be used"
            raise DataError(f"{refused}, max_quarantine_percent allows {self.max_percent:g} %: {examples}")


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Write shards, index and quarantine; raises DataError for an unusable source or too many unusable pictures."""
    feed = config.source.open()
    quarantine = Quarantine(feed.total, config.max_quarantine_percent)
    with Spool(stage.out.parent) as spool:
        with stage.bar("decode", feed.total) as bar:
            for item in feed.items:
                try:
                    spool.add(prepared(item, config))
                except DataError as error:
                    quarantine.add(item.origin, str(error), hashlib.sha256(item.data).hexdigest())
                bar.step()
        kept, twins = spool.unique()
        for twin, first in twins:
            reason = f"duplicate of {key_of(first.sha256)} ({feed.classes[first.label]}: {first.origin})"
            quarantine.add(twin.origin, reason, twin.sha256)
        if not kept:
            raise DataError(f"no usable picture among {feed.total}: {quarantine.rows[0].reason}")
        with stage.bar("write", len(kept)) as bar:
            tally = _write(stage, config, spool, kept, bar)
    index.write(stage.out / QUARANTINE, RefusalRow, sorted(quarantine.rows))
    counts = {split: sum(tally[split].values()) for split in SPLITS}
    stage.tracker.metrics({**counts, "quarantined": len(quarantine.rows)})
    stage.say(f"{counts['train']:,} pictures in train, {counts['val']:,} in val, {len(quarantine.rows):,} quarantined")
    return {
        "source": spec(config.source),
        "resolution": config.resolution,
        "channels": config.channels,
        "classes": list(feed.classes),
        "counts": counts,
        "class_counts": {split: [tally[split][label] for label in range(len(feed.classes))] for split in SPLITS},
        "quarantined": len(quarantine.rows),
    }


def prepared(item: Item, config: Config) -> Sample:
    """One item as it will stand in a shard; raises DataError if it is no usable picture."""
    pixels = images.decode(item.data, config.channels, origin=item.origin)
    png = images.encode_png(images.resize(pixels, config.resolution))
    side = config.resolution
    return Sample(png, hashlib.sha256(png).hexdigest(), side, side, item.label, item.origin)


def split_of(sha256: str, val_share: float) -> str:
    """The split a content belongs to, for ever: its hash read as a number in [0, 1) against `val_share`."""
    return "val" if int(sha256[:8], 16) / 2**32 < val_share else "train"


def _write(stage: Stage, config: Config, spool: Spool, kept: list[Entry], bar: Bar) -> dict[str, Counter[int]]:
    """Write every shard and the index beside them; counts the pictures of each split by class."""
    tally: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}

    def rows() -> Iterator[PictureRow]:
        for split in SPLITS:
            entries = (entry for entry in kept if split_of(entry.sha256, config.val_share) == split)
            for row in write_shards(stage.out, split, spool.samples(entries), config.shard_samples):
                tally[split][row.label] += 1
                stage.samples[row.shard] = stage.samples.get(row.shard, 0) + 1
                bar.step()
                yield row

    index.write(stage.out / INDEX, PictureRow, rows())
    return tally


if __name__ == "__main__":
    run("prepare", Config, main, out="artifacts/data", kind="data")
