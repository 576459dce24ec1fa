"""Our shards as the `webdataset` package reads them: what everybody else's tools will see of them."""

import hashlib
import random
import tarfile
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from webdataset import DataPipeline, SimpleShardList, tarfile_to_samples

from diffusion_core.manifest import Manifest
from pipelines.data.claims import SPLITS


def exchanged(folder: Path, found: Manifest, table: pa.Table, sample: int, seed: int) -> pd.DataFrame:
    """Up to `sample` pictures of one shard of each split, drawn by `seed`, as the package reads them and as declared.

    Nothing is decoded, as the package would run code out of some members.
    """
    seen = []
    for split in SPLITS:
        names = sorted(name for name, file in found.files.items() if file.samples and name.startswith(f"{split}-"))
        if names:
            seen += _compared(folder / random.Random(f"{seed} {split}").choice(names), table, sample)
    return pd.DataFrame(seen, columns=["key", "read", "declared"])


def _compared(shard: Path, table: pa.Table, sample: int) -> list[tuple[str, str, str]]:
    """(key, hash as read, hash as declared) of each sample, in the shard's order; empty where one is missing."""
    rows = table.filter(pc.equal(table["shard"], shard.name).fill_null(False)).sort_by("offset")
    keys, declared = (rows[name].to_pylist()[:sample] for name in ("key", "sha256"))
    read: list[tuple[str, str]] = []
    try:
        samples = DataPipeline(SimpleShardList([str(shard)]), tarfile_to_samples())
        read += ((one["__key__"], hashlib.sha256(one.get("png", b"")).hexdigest()) for one in islice(samples, sample))
    except (ValueError, tarfile.TarError, OSError) as error:
        read.append((f"{shard.name}: {error}", ""))
    found = dict(read)
    wanted = [(key, found.get(key, ""), digest or "") for key, digest in zip(keys, declared, strict=True)]
    return wanted + [(key, digest, "") for key, digest in read if key not in set(keys)]
