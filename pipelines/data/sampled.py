"""A sample of each split, looked at in its shards: its hash, what its header says, and its pixels."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from diffusion_core import images
from diffusion_core.errors import InkwellError
from pipelines.data import index
from pipelines.data.claims import SPLITS
from pipelines.data.index import PictureRow
from pipelines.data.reader import Shards

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOURS = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}  # the header's colour types, as Pillow calls them
PLACE = ("key", "shard", "offset", "size", "sha256", "width", "height")  # what is needed to look a picture up


def decoded(folder: Path, table: pa.Table, channels: int, sample: int, seed: int) -> pd.DataFrame:
    """Up to `sample` pictures of each split, drawn by `seed`, of the rows that say where their picture is.

    The folder has been verified: a shard is not hashed once more, but one that changes while it is read is an error.
    """
    shards, seen = Shards(folder, None), []
    whole = np.logical_and.reduce([pc.is_valid(table[name]).to_numpy() for name in PLACE])
    for split in SPLITS:
        there = np.flatnonzero(whole & pc.equal(table["split"], split).fill_null(False).to_numpy())
        drawn = random.Random(f"{seed} {split}").sample(range(len(there)), min(sample, len(there)))
        rows = index.rows(table.take(there[sorted(drawn)]), PictureRow)
        seen += [_seen(shards, row, channels) for row in rows]
    names = ["key", "declared", "declared_shape", "sha256", "mode", "shape", "contrast", "error"]
    return pd.DataFrame(seen, columns=names)


def mode(png: bytes) -> str:
    """What a PNG's header says its pixels are, as Pillow calls it: "L", "RGB", "RGBA", "L;16", "P, transparent"."""
    if not png.startswith(SIGNATURE) or png[12:16] != b"IHDR" or len(png) < 33:
        return "no PNG"
    bits, colour = png[24], COLOURS.get(png[25], "unknown")
    transparent = b"tRNS" in png[33 : png.find(b"IDAT")]  # the chunks before the pixels
    return colour + (f";{bits}" if bits != 8 else "") + (", transparent" if transparent else "")


def _seen(shards: Shards, row: PictureRow, channels: int) -> dict[str, object]:
    seen: dict[str, object] = {
        "key": row.key,
        "declared": row.sha256,
        "declared_shape": f"{row.height}x{row.width}",
    }
    try:
        png = bytes(shards.view(row.shard)[row.offset : row.offset + row.size])
        seen |= {"sha256": hashlib.sha256(png).hexdigest(), "mode": mode(png)}
        pixels = images.decode(png, channels, origin="the file")
    except InkwellError as error:
        return seen | {"error": str(error)}
    return seen | {"shape": f"{pixels.shape[0]}x{pixels.shape[1]}", "contrast": int(np.ptp(pixels))}
