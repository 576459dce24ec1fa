"""A folder of pictures, wherever it lies: with a folder a class, with a table of metadata, or with neither."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffusion_core.errors import DataError
from pipelines.data.sources import address, files, limits, listing, metadata
from pipelines.data.sources.address import printable
from pipelines.data.sources.base import Catalog, Item, Part, Source
from pipelines.data.sources.fields import Said, said
from pipelines.data.sources.store import Store, in_lanes

PER_PART = 512
SPLITS = frozenset(("train", "test", "val", "valid", "validation"))


class Found(NamedTuple):
    """One picture of the list: its name from the folder and what is said of it."""

    name: str
    said: Said = Said()


@dataclass(frozen=True)
class ImageFolder(Source):
    """Pictures below `path`, a local folder or a URL; one of more than `max_bytes` bytes is not read whole.

    With `metadata.jsonl` or `metadata.csv` in the folder (`file_name`, and `text`, `label`, `licence`, `source` where
    known) the pictures are those it names. Without, every file that is not hidden counts, whatever its ending: the
    class is the name of the first folder, and files beside the class folders are no pictures; without folders there is
    no class.
    """

    path: str
    max_bytes: int = limits.MAX_BYTES

    def __post_init__(self) -> None:
        address.check(self.path)
        limits.check(self.max_bytes)

    def catalog(self, spool: Path) -> Catalog:
        """Raises DataError for a folder that is missing or empty, has two tables, a broken one, or one further down."""
        place, kept = files.store(self.path), spool / "pictures.jsonl"
        tables = [name for name in (metadata.JSONL, metadata.CSV) if place.exists(place.join(self.path, name))]
        if len(tables) == 2:
            raise DataError(f"{self.path} holds {' and '.join(tables)}; one of them is wanted")
        if tables:
            count = listing.keep(self._named(place, tables[0], spool), kept)
        else:
            count = listing.keep(self._walked(place, spool), kept)
        if not count:
            raise DataError(
                f"no pictures in {self.path}: {f'{tables[0]} has no row' if tables else 'it holds no file'}"
            )
        parts = (
            Part(number, len(rows), rows) for number, rows in enumerate(listing.chunks(listing.kept(kept), PER_PART))
        )
        return Catalog(parts, count, "pictures", count)

    def items(self, part: Part) -> Iterator[Item]:
        """Raises UnreachableError for a server that does not answer; a picture it refuses is a fault of that one."""
        place = files.store(self.path)
        found = (Found(name, Said(*values)) for name, values in part.where)
        yield from in_lanes(partial(self._item, place), found, place.lanes)

    def _item(self, place: Store, found: Found) -> Item:
        origin = printable(found.name)
        label, caption, licence, source, fault = found.said
        item = Item(origin, b"", label, caption, licence, source, fault and (fault[0], fault[1]))
        if fault:
            return item
        try:
            if place.leaves(self.path, found.name):
                raise DataError(f"{origin} is a link that leads out of the folder")
            data = place.read(place.join(self.path, found.name), self.max_bytes, origin)
        except DataError as error:
            return item._replace(fault=("unreadable", str(error)))
        if len(data) > self.max_bytes:
            return item._replace(fault=limits.too_large(origin, self.max_bytes))
        return item._replace(data=data)

    def _walked(self, place: Store, spool: Path) -> Iterator[Found]:
        """All files in order, each with its class."""
        names, depths = spool / "names.jsonl", Counter[bool]()
        heads, deep = set[str](), set[str]()  # the first folders, and those with folders in them

        def watched() -> Iterator[str]:
            for name in listing.in_order(place.walk(self.path), spool):
                folder, nested, last = name.rpartition("/")
                if nested and last in (metadata.JSONL, metadata.CSV):
                    raise DataError(
                        f"{self.path} holds {printable(name)}; name the folder '{printable(folder)}' itself"
                    )
                depths[bool(nested)] += 1
                if nested and len(heads) <= len(SPLITS):
                    head, _, below = name.partition("/")
                    heads.add(head)
                    deep.update([head] if "/" in below else [])
                yield name

        listing.keep(watched(), names)
        if heads and heads == deep and heads <= SPLITS:
            one = place.join(self.path, min(heads))
            splits = f"{', '.join(sorted(heads))}, which are splits and not classes"
            raise DataError(f"{self.path} holds {splits}; name one of them, such as {one}: prepare splits by content")
        in_classes = depths[True] > 0
        for name in listing.kept(names):
            head, nested, _ = name.partition("/")
            if bool(nested) == in_classes:
                yield Found(name, Said(label=printable(head) if nested else None))
        names.unlink()

    def _named(self, place: Store, table: str, spool: Path) -> Iterator[Found]:
        """All rows of the metadata, in their order."""
        spool.mkdir(parents=True, exist_ok=True)
        copy = spool / table
        place.copy(place.join(self.path, table), copy)
        for line, record in metadata.records(copy, table):
            where = f"{table}, line {line}"
            about = said(record)
            if about.fault:
                about = about._replace(fault=(about.fault[0], f"{where}: {about.fault[1]}"))
            try:
                yield Found(_inside(record.get(metadata.FILE_NAME)), about)
            except DataError as error:
                yield Found(where, about._replace(fault=("unreadable", f"{where}: {error}")))
        copy.unlink()


def _inside(name: object) -> str:
    """A file's name from the folder; raises DataError for one that is none or leads out of it."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{metadata.FILE_NAME} is {name!a}; a file's name from the folder is wanted")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise DataError(f"{metadata.FILE_NAME} {name!a} leads out of the folder")
    return path.as_posix()
