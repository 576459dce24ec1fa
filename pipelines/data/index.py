"""The tables beside the samples, as Parquet: one row a picture, one a refusal, one a cached latent or caption.

A table is a NamedTuple, and its annotations are its schema. Equal rows give equal bytes. Tables are written and read
in pieces, or as columns; a list of rows is for small ones.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_core.errors import IntegrityError

INDEX = "index.parquet"
QUARANTINE = "quarantine.parquet"
ROWS_AT_ONCE = 16_384
NO_LABEL = -1
R = TypeVar("R", bound=tuple[Any, ...])


class PictureRow(NamedTuple):
    """Where one prepared picture lies, what it is and where it came from.

    `offset` and `size` (bytes) are of its PNG inside the shard, `sha256` (hex) is that PNG's, `width` and `height` are
    in pixels, `label` is a class's number or -1, `phash` 64 bits in hex. Rows stand by split, then by height and width,
    then by content, so that the pictures of one split and size are consecutive.
    """

    key: str
    split: str
    shard: str
    offset: int
    size: int
    sha256: str
    width: int
    height: int
    label: int
    caption: str | None
    phash: str
    licence: str | None
    source: str | None
    origin: str


class RefusalRow(NamedTuple):
    """One item that was left out: the kind of reason, the reason, and the SHA-256 (hex) of the bytes as found."""

    origin: str
    kind: str
    reason: str
    sha256: str


class LatentRow(NamedTuple):
    """Which row of which file holds the moments of which picture; `cache_key` names all they depend on."""

    key: str
    sha256: str
    split: str
    file: str
    row: int
    cache_key: str


class CaptionRow(NamedTuple):
    """Which row of the captions' tensors holds which text; `cache_key` names all that its tokens depend on."""

    row: int
    caption: str
    cache_key: str


def schema(row: type[tuple[Any, ...]]) -> pa.Schema:
    """The Arrow schema that a row's annotations say."""
    types = {str: pa.string(), int: pa.int64(), str | None: pa.string()}
    return pa.schema([(name, types[kind]) for name, kind in get_type_hints(row).items()])


def write(path: Path, row: type[tuple[Any, ...]], rows: Iterable[tuple[Any, ...]]) -> None:
    """Write rows of one kind as they come; no row at all makes an empty table."""
    stream, wanted = iter(rows), schema(row)
    with pq.ParquetWriter(path, wanted, compression="zstd") as writer:
        while some := list(islice(stream, ROWS_AT_ONCE)):
            columns = zip(zip(*some, strict=True), wanted.types, strict=True)
            writer.write_batch(pa.record_batch([pa.array(*column) for column in columns], schema=wanted))


def read(path: Path, row: type[tuple[Any, ...]], columns: Iterable[str] | None = None) -> pa.Table:
    """The table, or some of its columns; raises IntegrityError if the file is missing, torn or of other columns."""
    with _opened(path, row) as file:
        try:
            return file.read(None if columns is None else list(columns))
        except (OSError, pa.ArrowInvalid) as error:
            raise IntegrityError(f"{path} cannot be read as Parquet ({error})") from error


def stream(path: Path, row: type[R]) -> Iterator[R]:
    """The rows one after another, with a piece of the table in memory at a time; raises as `read` does."""
    with _opened(path, row) as file:
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from rows(batch, row)
        except (OSError, pa.ArrowInvalid) as error:
            raise IntegrityError(f"{path} cannot be read as Parquet ({error})") from error


def rows(table: pa.Table | pa.RecordBatch, row: type[R]) -> list[R]:
    """The rows of a table as values."""
    return [row(*values) for values in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def _opened(path: Path, row: type[tuple[Any, ...]]) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise IntegrityError(f"{path} cannot be read as Parquet ({error})") from error
    if not file.schema_arrow.equals(schema(row)):
        said = (", ".join(f"{field.name}: {field.type}" for field in s) for s in (file.schema_arrow, schema(row)))
        found, wanted = said
        file.close()
        raise IntegrityError(f"{path} has the columns {found}; wanted: {wanted}")
    return file
