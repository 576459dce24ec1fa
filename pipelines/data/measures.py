"""What is measured of a prepared data set, as tables whose first column names their rows: the matter of the claims.

All is computed on whole columns, so that a million rows take seconds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffusion_core.errors import IntegrityError
from diffusion_core.manifest import Manifest
from pipelines.data import index
from pipelines.data.claims import SPLITS
from pipelines.data.index import INDEX, NO_LABEL, QUARANTINE, PictureRow, RefusalRow
from pipelines.data.shards import KEY_DIGITS

ORDER = ("split", "height", "width", "sha256")


def columns(folder: Path) -> pd.DataFrame:
    """The columns of both tables of a data folder and their types as found and as declared, spelt out."""
    rows = []
    for name, row in ((INDEX, PictureRow), (QUARANTINE, RefusalRow)):
        found, declared = _types(_schema(folder / name)), _types(index.schema(row))
        rows += [
            (f"{name}: {column}", found.get(column, "nothing"), declared.get(column, "nothing"))
            for column in [*declared, *(column for column in found if column not in declared)]
        ]
    return pd.DataFrame(rows, columns=["column", "found", "declared"])


def legible(table: pa.Table) -> tuple[pa.Table, dict[int, str]]:
    """The table with every text readable, and the columns whose bytes were no UTF-8 by the row where that was."""
    garbled: dict[int, str] = {}
    for place, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if not pa.types.is_string(column.type):
            continue
        chunks, start = [], 0
        for chunk in column.chunks:
            if broken := _not_utf8(chunk, start):
                garbled |= {row: ", ".join(filter(None, [garbled.get(row), name])) for row in broken}
                raw = chunk.cast(pa.binary()).to_pylist()
                chunk = pa.array(
                    [None if text is None else text.decode("utf-8", "replace") for text in raw], pa.string()
                )
            chunks.append(chunk)
            start += len(chunk)
        table = table.set_column(place, name, pa.chunked_array(chunks, pa.string()))
    return table, garbled


def pictures(table: pa.Table, garbled: Mapping[int, str], found: Manifest) -> pd.DataFrame:
    """Every picture's row, with what follows from it beside the others."""
    copied = pc.match_substring(table["key"], "-")
    seen_in = table.group_by("sha256").aggregate([("split", "count_distinct")])
    leaked = pc.is_in(table["sha256"], seen_in.filter(pc.field("split_count_distinct") > 1)["sha256"].combine_chunks())
    here = np.arange(table.num_rows)
    order = pc.sort_indices(table, [(name, "ascending") for name in ORDER]).to_numpy()
    ends = pa.array([file.size for file in found.files.values()], pa.int64())
    shard = pc.index_in(table["shard"], pa.array(list(found.files), pa.string()))
    derived = {
        "space": pc.subtract(ends.take(shard.combine_chunks()), pc.add(table["offset"], table["size"])),
        "shape": pc.binary_join_element_wise(_spelt(table["height"]), _spelt(table["width"]), "x"),
        "class": pc.if_else(pc.equal(table["label"], NO_LABEL), None, table["label"]),
        "caption_length": pc.utf8_length(table["caption"]),
        "key_head": pc.utf8_slice_codeunits(table["key"], 0, KEY_DIGITS),
        "sha256_head": pc.utf8_slice_codeunits(table["sha256"], 0, KEY_DIGITS),
        "original": pc.if_else(copied, None, table["sha256"]),
        "leaked": pc.if_else(leaked, table["split"], None),
        "displaced": pa.array(here, mask=order == here),
    }
    for name, column in derived.items():
        table = table.append_column(name, column)
    frame = table.to_pandas()
    frame["garbled"] = pd.Series(garbled, dtype=object).reindex(frame.index)
    return frame


def counts(folder: Path, found: Manifest, table: pa.Table) -> pd.DataFrame:
    """Whatever the manifest counts, as found and as declared."""
    about = found.about
    declared = dict(about["counts"]) | {n: f.samples for n, f in found.files.items() if f.samples is not None}
    declared |= {"captions": about["captions"], "quarantined": about["quarantined"]} | about["left_out"]
    for split, numbers in about["class_counts"].items():
        declared |= {f"{split}/{name}": n for name, n in zip(about["classes"], numbers, strict=True)}
    refused = _tally(index.read(folder / QUARANTINE, RefusalRow, ["kind"])["kind"])
    counted = _tally(table["split"]) | _tally(table["shard"]) | {"captions": pc.count(table["caption"]).as_py()}
    counted |= {kind: refused.pop(kind, 0) for kind in about["left_out"]} | {"quarantined": sum(refused.values())}
    labelled = table.group_by(["split", "label"]).aggregate([("label", "count")]).to_pylist()
    names = dict(enumerate(about["classes"]))
    counted |= {f"{n['split']}/{names[n['label']]}": n["label_count"] for n in labelled if n["label"] in names}
    rows = [(name, counted.get(name, 0), declared.get(name, 0)) for name in sorted(declared | counted)]
    return pd.DataFrame(rows, columns=["name", "found", "declared"])


def classes(names: Sequence[str], table: pa.Table) -> pd.DataFrame:
    """Each class's share of each split, in per cent; nothing for a split without pictures."""
    shares = pd.DataFrame({"class": list(names)})
    for split in SPLITS:
        labels = table.filter(pc.field("split") == split)["label"]
        shares[split] = 100 * histogram(labels, len(names))[1:] / len(labels) if len(labels) else None
    return shares


def histogram(labels: pa.ChunkedArray, classes: int) -> NDArray[np.int64]:
    """How many pictures have no label, the first class, the second, ...; what is no class is not counted."""
    values = labels.drop_null().to_numpy()
    known = values[(values >= NO_LABEL) & (values < classes)]
    return np.bincount(known - NO_LABEL, minlength=classes + 1)


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise IntegrityError(f"{path} cannot be read as Parquet ({error})") from error


def _types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


def _not_utf8(texts: pa.Array, start: int) -> list[int]:
    """The rows, counted from `start`, whose bytes are no UTF-8: found by halving, since Arrow judges whole arrays."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        if len(texts) == 1:
            return [start]
        half = len(texts) // 2
        return _not_utf8(texts.slice(0, half), start) + _not_utf8(texts.slice(half), start + half)
    return []


def _spelt(numbers: pa.ChunkedArray) -> pa.ChunkedArray:
    return numbers.cast(pa.string())


def _tally(texts: pa.ChunkedArray) -> dict[str, int]:
    """How often each text is there."""
    return {one["values"]: one["counts"] for one in texts.drop_null().value_counts().to_pylist()}
