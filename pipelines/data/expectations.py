"""What must be true of a prepared data set: measured as tables, claimed as data, judged by Great Expectations.

Four tables are measured: every picture's row, a decoded sample, counts as found against counts as declared,
and each class's share. A `Claim` is one expectation on one of them and says in a sentence what must hold.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from diffusion_core import images
from diffusion_core.errors import InkwellError
from diffusion_core.manifest import Manifest
from pipelines.data import index
from pipelines.data.index import INDEX, QUARANTINE, PictureRow, RefusalRow
from pipelines.data.reader import Pictures
from pipelines.data.shards import BLOCK, KEY_DIGITS

EXAMPLES = 3  # rows named in a sentence

PRESENT = "ExpectColumnValuesToNotBeNull"
ABSENT = "ExpectColumnValuesToBeNull"
UNIQUE = "ExpectColumnValuesToBeUnique"
WITHIN = "ExpectColumnValuesToBeBetween"
MEMBER = "ExpectColumnValuesToBeInSet"
MATCH = "ExpectColumnValuesToMatchRegex"
EQUAL = "ExpectColumnPairValuesToBeEqual"


@dataclass(frozen=True)
class Claim:
    """One expectation: on which columns of which table, the sentence that must hold, its class and its arguments."""

    table: str
    columns: tuple[str, ...]
    text: str
    expectation: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    severity: Literal["critical", "warning"] = "critical"

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments as Great Expectations names them."""
        names = ("column",) if len(self.columns) == 1 else ("column_A", "column_B")
        about = {"description": self.text, "severity": self.severity}
        return {**dict(zip(names, self.columns, strict=True)), **self.arguments, **about}


@dataclass(frozen=True)
class Outcome:
    """What became of one claim, as plain data; `found` is empty when it held."""

    expectation: str
    severity: str
    claim: str
    held: bool
    found: str

    @property
    def sentence(self) -> str:
        """The failure in one sentence."""
        return f"{self.expectation}: {self.claim}, but {self.found}"


def claims(about: Mapping[str, Any], min_class_percent: float) -> list[Claim]:
    """Everything claimed of a data set whose manifest says `about`; class shares are in percent of their split."""
    return [*_of_pictures(about), *_of_decoded(about), *_of_totals(min_class_percent)]


def _of_pictures(about: Mapping[str, Any]) -> Iterator[Claim]:
    for column in PictureRow._fields:
        yield Claim("pictures", (column,), f"no {column} is missing", PRESENT)
    for column, digits in {"key": KEY_DIGITS, "sha256": 64}.items():
        yield Claim("pictures", (column,), f"every {column} is unique", UNIQUE)
        text = f"every {column} is {digits} hex digits"
        yield Claim("pictures", (column,), text, MATCH, {"regex": f"^[0-9a-f]{{{digits}}}$"})
    for column in ("width", "height"):
        side = about["resolution"]
        yield Claim("pictures", (column,), f"every {column} is {side}", MEMBER, {"value_set": [side]})
    labels = list(range(len(about["classes"])))
    yield Claim("pictures", ("label",), f"every label is in 0..{labels[-1]}", MEMBER, {"value_set": labels})
    splits = [split for split, count in about["counts"].items() if count]
    yield Claim("pictures", ("split",), f"every split is one of {', '.join(splits)}", MEMBER, {"value_set": splits})
    yield Claim("pictures", ("splits",), "no content is in two splits", MEMBER, {"value_set": [1]})
    yield Claim("pictures", ("offset",), "every picture lies behind a tar header", WITHIN, {"min_value": BLOCK})
    yield Claim("pictures", ("size",), "every picture has bytes", WITHIN, {"min_value": 1})
    yield Claim("pictures", ("space",), "every picture ends inside its shard", WITHIN, {"min_value": 0})


def _of_decoded(about: Mapping[str, Any]) -> Iterator[Claim]:
    yield Claim("decoded", ("error",), "every picture drawn decodes", ABSENT)
    yield Claim("decoded", ("sha256", "declared"), "every picture drawn has its hash", EQUAL)
    for column in ("width", "height"):
        side = about["resolution"]
        yield Claim("decoded", (column,), f"every picture drawn has {column} {side}", MEMBER, {"value_set": [side]})
    yield Claim("decoded", ("contrast",), "no picture drawn is of one colour", WITHIN, {"min_value": 1}, "warning")


def _of_totals(min_class_percent: float) -> Iterator[Claim]:
    yield Claim("counts", ("found", "declared"), "everything is there as often as declared", EQUAL)
    share = {"min_value": min_class_percent}
    text = f"every class has at least {min_class_percent:g} % of"
    yield Claim("classes", ("train",), f"{text} train", WITHIN, share)
    yield Claim("classes", ("val",), f"{text} val", WITHIN, share, "warning")


def measure(folder: Path, found: Manifest, decode_sample: int, seed: int) -> dict[str, pd.DataFrame]:
    """The four tables of a data folder; up to `decode_sample` pictures of each split are decoded, drawn by `seed`.

    The first column of each table names its rows.
    """
    table = index.read(folder / INDEX, PictureRow)
    whole = [row for row in index.rows(table, PictureRow) if None not in row]  # a hole is found in `pictures`
    pictures = table.to_pandas()
    ends = pictures["shard"].map({name: file.size for name, file in found.files.items()})
    pictures["splits"] = pictures.groupby("sha256")["split"].transform("nunique")
    pictures["space"] = ends - pictures["offset"] - pictures["size"]
    return {
        "pictures": pictures,
        "decoded": _decoded(folder, found, whole, decode_sample, seed),
        "counts": _counts(folder, found, pictures),
        "classes": _classes(found.about["classes"], pictures),
    }


def _decoded(folder: Path, found: Manifest, rows: Sequence[PictureRow], sample: int, seed: int) -> pd.DataFrame:
    seen: list[dict[str, object]] = []
    for split in sorted({row.split for row in rows}):
        pictures = Pictures(folder, found, [row for row in rows if row.split == split])
        drawn = random.Random(f"{seed} {split}").sample(range(len(pictures)), min(sample, len(pictures)))
        seen += [_seen(pictures, row) for row in sorted(drawn)]
    return pd.DataFrame(seen, columns=["key", "declared", "sha256", "width", "height", "contrast", "error"])


def _seen(pictures: Pictures, row: int) -> dict[str, object]:
    place = pictures.rows[row]
    seen: dict[str, object] = {"key": place.key, "declared": place.sha256}
    try:
        png = pictures.png(row)
        seen["sha256"] = hashlib.sha256(png).hexdigest()
        pixels = images.decode(png, pictures.shape[0], origin="the file")
    except InkwellError as error:
        return seen | {"error": str(error)}
    return seen | {"width": pixels.shape[1], "height": pixels.shape[0], "contrast": int(np.ptp(pixels))}


def _counts(folder: Path, found: Manifest, pictures: pd.DataFrame) -> pd.DataFrame:
    declared = dict(found.about["counts"]) | {n: f.samples for n, f in found.files.items() if f.samples is not None}
    declared["quarantine"] = found.about["quarantined"]
    counted = {**pictures["split"].value_counts(), **pictures["shard"].value_counts()}
    counted["quarantine"] = index.read(folder / QUARANTINE, RefusalRow).num_rows
    names = sorted(declared | counted)
    rows = [{"name": name, "found": counted.get(name, 0), "declared": declared.get(name, 0)} for name in names]
    return pd.DataFrame(rows)


def _classes(classes: Sequence[str], pictures: pd.DataFrame) -> pd.DataFrame:
    table = pd.DataFrame({"class": list(classes)})
    for split in ("train", "val"):
        labels = pictures.loc[pictures["split"] == split, "label"]
        counts = labels.value_counts().reindex(range(len(classes)), fill_value=0)
        table[split] = (100.0 * counts / len(labels)).to_numpy() if len(labels) else None
    return table


def check(tables: Mapping[str, pd.DataFrame], wanted: Sequence[Claim], docs: Path) -> list[Outcome]:
    """Judge every claim, in order, and write the Data Docs (static HTML) afresh to the folder `docs`."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # the package reads it while it is imported
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("data")
    judged: dict[int, Outcome] = {}
    for name, table in tables.items():
        suite = context.suites.add(gx.ExpectationSuite(name))
        claimed = {
            suite.add_expectation(getattr(gx.expectations, claim.expectation)(**claim.keywords)).id: place
            for place, claim in enumerate(wanted)
            if claim.table == name
        }
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe(name)
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        judgement = definition.run(batch_parameters={"dataframe": table}, result_format="SUMMARY")
        for one in judgement.results:  # in an order of their own
            place = claimed[one.expectation_config.id]
            judged[place] = _outcome(wanted[place], one, table)
    shutil.rmtree(docs, ignore_errors=True)
    context.add_data_docs_site("data", _site(docs))
    context.build_data_docs()
    return [judged[place] for place in range(len(wanted))]


def _outcome(claim: Claim, judged: Any, table: pd.DataFrame) -> Outcome:
    name = f"{claim.table}.{'/'.join(claim.columns)} {claim.expectation}"
    found = "" if judged.success else _found(judged.result, table)
    return Outcome(name, claim.severity, claim.text, bool(judged.success), found)


def _found(result: Mapping[str, Any], table: pd.DataFrame) -> str:
    """What failed: how many rows, and the first of them by name (the table's first column) and value."""
    if not result:
        return "it could not be judged"
    rows = result["partial_unexpected_index_list"][:EXAMPLES]
    values = result["partial_unexpected_list"][:EXAMPLES]
    examples = [f"{table.iloc[row, 0]} ({_spelt(value)})" for row, value in zip(rows, values, strict=True)]
    return f"{result['unexpected_count']} of {result['element_count']} rows differ: {', '.join(examples)}"


def _spelt(value: object) -> str:
    return " against ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _site(folder: Path) -> dict[str, object]:
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder.resolve())}
    pages = {"class_name": "DefaultSiteIndexBuilder"}
    return {"class_name": "SiteBuilder", "site_index_builder": pages, "store_backend": store}
