"""A small data folder made by hand, with the standard library and pyarrow alone, so that any row of it can be wrong."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion_core import manifest
from pipelines.data import index
from pipelines.data.index import INDEX, QUARANTINE, PictureRow, RefusalRow

Row = dict[str, Any]


def png(seed: int, mode: str = "RGB", size: tuple[int, int] = (16, 16), *, form: str = "PNG") -> bytes:
    """Noise as an encoded picture; `size` is (height, width)."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).save(buffer, form)
    return buffer.getvalue()


def picture(data: bytes, split: str = "train", label: int = -1, caption: str | None = None, **more: Any) -> Row:
    """One picture's row, and its bytes as `data`; its perceptual hash is as random as its content."""
    sha256 = hashlib.sha256(data).hexdigest()
    height, width = 16, 16
    row = {"key": sha256[:16], "split": split, "sha256": sha256, "width": width, "height": height, "label": label}
    row |= {"caption": caption, "phash": sha256[-16:], "licence": None, "source": None, "origin": f"made/{sha256[:6]}"}
    return row | {"data": data} | more


def make(folder: Path, pictures: Sequence[Row], classes: Sequence[str] = (), channels: int = 3) -> Path:
    """Write shards, index, quarantine and manifest of these pictures; the manifest says what is there."""
    folder.mkdir(parents=True)
    rows = sorted(pictures, key=lambda row: (row["split"], row["height"], row["width"], row["sha256"]))
    samples = {}
    for split in sorted({row["split"] for row in rows}):
        shard, members = f"{split}-00000.tar", [row for row in rows if row["split"] == split]
        with tarfile.open(folder / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in members:
                for suffix, data in ((".json", b"{}"), (".png", row["data"])):
                    entry = tarfile.TarInfo(row["key"] + suffix)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        with tarfile.open(folder / shard) as tar:
            places = {member.name: member for member in tar}
        for row in members:
            place = places[row["key"] + ".png"]
            row |= {"shard": shard, "offset": place.offset_data, "size": place.size}
        samples[shard] = len(members)
    write(folder / INDEX, rows)
    pq.write_table(index.schema(RefusalRow).empty_table(), folder / QUARANTINE)
    about = {
        "source": {"kind": "hand"},
        "resolution": 16,
        "channels": channels,
        "shapes": sorted({(row["height"], row["width"]) for row in rows}),
        "classes": list(classes),
        "counts": {split: sum(row["split"] == split for row in rows) for split in ("train", "val")},
        "class_counts": {
            split: [
                sum((row["split"], row["label"]) == (split, label) for row in rows) for label in range(len(classes))
            ]
            for split in ("train", "val")
        },
        "captions": sum(row["caption"] is not None for row in rows),
        "quarantined": 0,
        "left_out": {"duplicate": 0, "near_duplicate": 0, "opt_out": 0},
    }
    manifest.seal(folder, "data", about, samples=samples)
    return folder


def rows_of(folder: Path) -> list[Row]:
    """The index as plain data."""
    return pq.read_table(folder / INDEX).to_pylist()


def write(path: Path, rows: Sequence[Row]) -> None:
    """An index of these rows, whatever they say."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=index.schema(PictureRow)), path)


def reseal(folder: Path, **about: Any) -> None:
    """Seal a folder whose files were changed, as a faulty preparation would have left it."""
    found = manifest.read(folder)
    samples = {name: file.samples for name, file in found.files.items() if file.samples is not None}
    manifest.seal(folder, "data", found.about | about, samples=samples)
