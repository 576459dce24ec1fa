"""One data folder as validate sees it: every table that is measured of it, and what is claimed of each."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa

from diffusion_core import manifest
from diffusion_core.manifest import Manifest
from pipelines.data import claims, drift, index, measures, near, sampled
from pipelines.data.claims import Claim, Limits
from pipelines.data.exchange import exchanged
from pipelines.data.index import INDEX, PictureRow


class Survey(NamedTuple):
    """The tables by name, and the claims about them in the order in which they are told."""

    tables: dict[str, pd.DataFrame]
    claims: list[Claim]

    @property
    def figures(self) -> dict[str, float]:
        """What is worth following from one data set to the next."""
        found = {}
        if len(twins := self.tables.get("val", ())):
            found["near_leak_percent"] = 100 * float(twins["twin"].notna().mean())
        if "drift" in self.tables:
            found |= {f"drift.{row.distribution}": row.found for row in self.tables["drift"].itertuples()}
        return found


def survey(folder: Path, found: Manifest, limits: Limits, *, sample: int, seed: int, reference: Path | None) -> Survey:
    """Measure a verified folder; of an index with other columns than wanted only the columns.

    Up to `sample` pictures of each split, drawn by `seed`, are decoded; `reference` is an earlier data folder or its
    index. Raises IntegrityError for a table that cannot be read.
    """
    columns = measures.columns(folder)
    if not columns["found"].equals(columns["declared"]):
        return Survey({"columns": columns}, claims.of_columns())
    table, garbled = measures.legible(index.read(folder / INDEX, PictureRow))
    names = found.about["classes"]
    tables = {
        "columns": columns,
        "pictures": measures.pictures(table, garbled, found),
        "decoded": sampled.decoded(folder, table, found.about["channels"], sample, seed),
        "exchange": exchanged(folder, found, table, sample, seed),
        "counts": measures.counts(folder, found, table),
    }
    if names:
        tables["classes"] = measures.classes(names, table)
    if limits.near_leak:
        tables["val"] = near.twins(table, limits.near_leak.distance)
    if reference:
        before, then = _earlier(reference, names)
        tables["drift"] = drift.drifted(table, before, (names, then), limits.drift)
    return Survey(tables, claims.of_columns() + claims.of_data(found.about, limits, compared=reference is not None))


def _earlier(path: Path, names: list[str]) -> tuple[pa.Table, list[str]]:
    """An earlier index, and the names of its classes: `names` where there is no manifest to say."""
    if path.is_dir():
        return _earlier(path / INDEX, manifest.read(path, "data").about["classes"])
    return measures.legible(index.read(path, PictureRow))[0], names
