"""The tables beside the samples, as Parquet: one row a picture, one a refusal, one a cached latent.

A table is a NamedTuple, and its annotations are its schema. Equal rows give equal bytes.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_core.errors import IntegrityError

INDEX = "index.parquet"
QUARANTINE = "quarantine.parquet"
ROWS_AT_ONCE = 16_384
R = TypeVar("R", bound=tuple[Any, ...])


class PictureRow(NamedTuple):
    """Where one prepared picture lies: `offset` and `size` (bytes) of its PNG inside the shard."""

    key: str
    split: str
    shard: str
    offset: int
    size: int
    sha256: str
    width: int
    height: int
    label: int
    origin: str


class RefusalRow(NamedTuple):
    """One item that was left out, why, and the SHA-256 of the bytes as found."""

    origin: str
    reason: str
    sha256: str


class LatentRow(NamedTuple):
    """Which row of a split's tensors holds the moments of which picture; `cache_key` names all they depend on."""

    key: str
    sha256: str
    split: str
    row: int
    cache_key: str


def schema(row: type[tuple[Any, ...]]) -> pa.Schema:
    """The Arrow schema that a row's annotations say."""
    types = {str: pa.string(), int: pa.int64()}
    return pa.schema([(name, types[kind]) for name, kind in get_type_hints(row).items()])


def write(path: Path, row: type[tuple[Any, ...]], rows: Iterable[tuple[Any, ...]]) -> None:
    """Write rows of one kind as they come; no row at all makes an empty table."""
    stream, wanted = iter(rows), schema(row)
    with pq.ParquetWriter(path, wanted, compression="zstd") as writer:
        while some := list(islice(stream, ROWS_AT_ONCE)):
            columns = zip(zip(*some, strict=True), wanted.types, strict=True)
            writer.write_batch(pa.record_batch([pa.array(*column) for column in columns], schema=wanted))


def read(path: Path, row: type[tuple[Any, ...]]) -> pa.Table:
    """The whole table; raises IntegrityError if the file is missing or torn, or holds other columns."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise IntegrityError(f"{path} cannot be read as Parquet ({error})") from error
    if not table.schema.equals(schema(row)):
        found, wanted = (", ".join(f"{field.name}: {field.type}" for field in s) for s in (table.schema, schema(row)))
        raise IntegrityError(f"{path} has the columns {found}; wanted: {wanted}")
    return table


def rows(table: pa.Table, row: type[R]) -> list[R]:
    """The rows of a table as values."""
    return [row(*values) for values in zip(*(column.to_pylist() for column in table.columns), strict=True)]
