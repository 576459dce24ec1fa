"""`metadata.jsonl` and `metadata.csv` beside pictures, one row a picture: the convention of Hugging Face's imagefolder.

Both are read a line at a time. A file that is no such table is refused with the number of the line; what a readable
row says of its picture is judged elsewhere, one picture at a time.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from diffusion_core.errors import DataError, suggest
from pipelines.data.sources.address import printable

FILE_NAME = "file_name"
JSONL, CSV = "metadata.jsonl", "metadata.csv"
LONGEST_LINE = 1 << 20  # bytes
NOT_UTF8 = "surrogateescape"  # what is no UTF-8 is kept, and refused in the field where it stands


def records(path: Path, name: str) -> Iterator[tuple[int, dict[str, object]]]:
    """(line, record) of every row; raises DataError, naming the file `name` and the line, for what is no such table."""
    reader = _csv if name == CSV else _jsonl
    try:
        yield from reader(path, name)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error


def _jsonl(path: Path, name: str) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8-sig", errors=NOT_UTF8, newline="\n") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            where = f"{name}, line {number}"
            if len(line) == LONGEST_LINE:
                raise DataError(f"{where} is longer than {LONGEST_LINE:,} characters")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is no JSON: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{where} is {type(record).__name__}; one object a line is wanted")
            yield number, record


def _csv(path: Path, name: str) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8-sig", errors=NOT_UTF8, newline="") as file:
        table = csv.reader(_lines(file, name), strict=True)
        try:
            header = [printable(column.strip()) for column in next(table, [])]
            if FILE_NAME not in header:
                raise DataError(f"{name}, line 1 names no column '{FILE_NAME}'; {suggest(FILE_NAME, header)}")
            if len(set(header)) < len(header):
                raise DataError(f"{name}, line 1 names a column twice: {', '.join(header)}")
            for cells in table:
                if not cells:
                    continue
                if len(cells) != len(header):
                    counts = f"{len(cells)} cells, the header {len(header)}"
                    raise DataError(f"{name}, line {table.line_num} has {counts}; a comma in a text needs quotes")
                yield table.line_num, {column: cell or None for column, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise DataError(f"{name}, line {table.line_num} is no CSV: {error}") from None


def _lines(file: TextIO, name: str) -> Iterator[str]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise DataError(f"{name}, line {number} is longer than {LONGEST_LINE:,} characters")
        yield line
