"""Folders of pictures written with plain files, `csv` and `json`, and how the tests of sources read a source."""

import csv
import io
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.data.sources import Item, Source


def read(source: Source, spool: Path) -> list[Item]:
    """All items, each part pickled as on its way to another machine; the catalog must have told the truth."""
    catalog = source.catalog(spool)
    parts = pickle.loads(pickle.dumps(list(catalog.parts)))
    items = [list(source.items(part)) for part in parts]
    assert [part.number for part in parts] == list(range(len(parts)))
    assert catalog.total == sum(part.weight for part in parts)
    found = [item for some in items for item in some]
    if catalog.unit == "pictures":
        assert [part.weight for part in parts] == [len(some) for some in items]
        assert catalog.pictures == len(found)
    return found


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]], encoding: str = "utf-8", lineterminator: str = "\r\n") -> bytes:
    file = io.StringIO()
    table = csv.DictWriter(file, list(rows[0]), lineterminator=lineterminator)
    table.writeheader()
    table.writerows(rows)
    return file.getvalue().encode(encoding)


def faults(items: Iterable[Item]) -> dict[str, str | None]:
    return {item.origin: item.fault and item.fault[0] for item in items}
