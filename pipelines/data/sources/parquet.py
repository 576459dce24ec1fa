"""Parquet with pictures in it: encoded bytes in a column, or Hugging Face's struct of bytes and path."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_core.errors import DataError, suggest
from pipelines.data.sources import address, fields, files, limits, listing
from pipelines.data.sources.base import Catalog, Item, Part, Source
from pipelines.data.sources.fields import said
from pipelines.data.sources.store import BLOCK, in_lanes

ROWS_AT_ONCE = 16


class Footer(NamedTuple):
    """What a file's end says: the rows of each row group, the classes' names, whether row groups can be had alone."""

    groups: list[int]
    classes: tuple[str, ...]
    seeks: bool


@dataclass(frozen=True)
class Parquet(Source):
    """Parquet files: `path` is a file, a folder or a pattern with wildcards or braces, local or a URL.

    `image` names the column of the pictures. `label`, `caption`, `licence` and `source` name columns that must be
    there; left out, the customary names are looked for. The names of a Hugging Face ClassLabel in the file's schema
    turn numbers into classes. A picture of more than `max_bytes` bytes is not taken.
    """

    path: str
    image: str = "image"
    label: str | None = None
    caption: str | None = None
    licence: str | None = None
    source: str | None = None
    max_bytes: int = limits.MAX_BYTES

    def __post_init__(self) -> None:
        address.check(self.path)
        limits.check(self.max_bytes)

    def catalog(self, spool: Path) -> Catalog:
        """A part a row group; raises DataError for a file that is no Parquet, lacks a column or names other classes."""
        found = files.expand((self.path,), (".parquet",))
        footers = in_lanes(self._footer, found, files.store(found[0]).lanes)
        kept, rows, classes = spool / "row-groups.jsonl", 0, set[tuple[str, ...]]()

        def parts() -> Iterator[tuple[int, dict[str, Any]]]:
            nonlocal rows
            for file, name, footer in zip(found, address.names(found), footers, strict=True):
                classes.add(footer.classes)
                if len(classes) > 1:
                    raise DataError(f"{name} names other classes than the files before it")
                groups, first = list(range(len(footer.groups))), 0
                for some in [[group] for group in groups] if footer.seeks else [groups]:
                    weight = sum(footer.groups[group] for group in some)
                    yield weight, {"file": file, "name": name, "groups": some, "first": first}
                    first += weight
                rows += first

        listing.keep(parts(), kept)
        if not rows:
            raise DataError(f"no pictures in {self.path}: {len(found)} files without a row")
        entries = enumerate(listing.kept(kept))
        (names,) = classes
        return Catalog(
            (Part(number, weight, where) for number, (weight, where) in entries), rows, "pictures", rows, names
        )

    def items(self, part: Part) -> Iterator[Item]:
        """The rows of one part, a few in memory at a time; raises DataError if the file is torn."""
        where = part.where
        file, name = where["file"], where["name"]
        with _parquet(file, name) as table:
            columns = self._columns(table.schema_arrow, name)
            classes = _classes(table.schema_arrow, columns.get("label"))
            row = where["first"]
            wanted = [self.image, *columns.values()]
            for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=where["groups"], columns=wanted):
                said_of = {field: _values(batch.column(column)) for field, column in columns.items()}
                for place, value in enumerate(batch.column(self.image)):
                    record = {field: values[place] for field, values in said_of.items()}
                    yield self._item(f"{name}/{row:06d}", value, record, classes)
                    row += 1

    def _footer(self, file: str) -> Footer:
        name = address.printable(file)
        place = files.store(file)
        with _parquet(file, name) as table:
            columns = self._columns(table.schema_arrow, name)
            groups = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
            return Footer(groups, _classes(table.schema_arrow, columns.get("label")), place.seeks(file))

    def _columns(self, schema: pa.Schema, name: str) -> dict[str, str]:
        """Which column says what, by the customary names; checks that all are there and hold what they should."""
        wanted = {"label": (self.label, fields.LABEL), "text": (self.caption, fields.CAPTION)}
        wanted |= {"licence": (self.licence, fields.LICENCE), "source": (self.source, fields.SOURCE)}
        for column in (self.image, *(given for given, _ in wanted.values() if given)):
            if schema.names.count(column) != 1:
                raise DataError(f"{name} has no column '{column}'; {suggest(column, schema.names)}")
        kind = schema.field(self.image).type
        if not _is_binary(kind) and not (pa.types.is_struct(kind) and _is_binary(_bytes_of(kind))):
            raise DataError(
                f"{name}: column '{self.image}' is {kind}; binary, or a struct with binary 'bytes' is wanted"
            )
        chosen = {
            field: given or next((usual for usual in customary if usual in schema.names), None)
            for field, (given, customary) in wanted.items()
        }
        return {field: column for field, column in chosen.items() if column is not None}

    def _item(self, origin: str, value: pa.Scalar, record: dict[str, Any], classes: tuple[str, ...]) -> Item:
        found = value["bytes"] if isinstance(value, pa.StructScalar) and value.is_valid else value
        buffer = found.as_buffer() if found.is_valid else pa.py_buffer(b"")
        fault = None
        if classes and isinstance(number := record["label"], int):
            record["label"] = classes[number] if 0 <= number < len(classes) else None
            if not -1 <= number < len(classes):  # -1 is Hugging Face's "none"
                fault = ("bad_label", f"{origin}: label {number}, and {len(classes)} classes have names")
        about = said(record)
        if about.fault:
            fault = (about.fault[0], f"{origin}: {about.fault[1]}")
        if not found.is_valid:
            fault = ("unreadable", f"{origin} has no bytes")
        if buffer.size > self.max_bytes:
            fault, buffer = limits.too_large(origin, self.max_bytes), pa.py_buffer(b"")
        return Item(origin, buffer.to_pybytes(), about.label, about.caption, about.licence, about.source, fault)


@contextmanager
def _parquet(file: str, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file, read in blocks, so that a long row group does not lie in memory whole."""
    with files.store(file).opened(file) as opened:
        try:
            with pq.ParquetFile(opened, buffer_size=BLOCK, page_checksum_verification=True) as table:
                yield table
        except (pa.ArrowException, OSError) as error:  # OSError: a page that does not match its checksum
            if isinstance(error, OSError) and address.scheme(file) != "file":
                raise
            raise DataError(f"{name} cannot be read as Parquet ({error})") from error


def _classes(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """The names of the label's ClassLabel, where the datasets package has written them into the schema."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        names = about["names"] if about["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _values(column: pa.Array) -> list[Any]:
    """The values of a column; text that is no UTF-8 is left for its field to refuse."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.to_pylist()
    found = column.cast(pa.large_binary()).to_pylist()
    return [value if value is None else value.decode("utf-8", "surrogateescape") for value in found]


def _is_binary(kind: pa.DataType | None) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return kind is not None and any(of(kind) for of in kinds)


def _bytes_of(kind: pa.StructType) -> pa.DataType | None:
    number = kind.get_field_index("bytes")
    return kind.field(number).type if number >= 0 else None
