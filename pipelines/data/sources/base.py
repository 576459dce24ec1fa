"""What every source of pictures is: a catalog of parts, and the items of each part as they were found.

A part is plain data, small enough to be sent to another machine, and is read there. A source decodes and judges no
picture: what it yields is what was found; preparing decides what is usable.
"""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_core.spec import Kind


class Item(NamedTuple):
    """One picture as found: where it came from (free of the machine's own paths), its bytes, what is said of it.

    `label` is the class's name. `fault` is a kind and a sentence if the source could not even hand it over (a row
    without its file, bytes that cannot be read, a caption that is not UTF-8); `data` may then be empty.
    """

    origin: str
    data: bytes
    label: str | None = None
    caption: str | None = None
    licence: str | None = None
    source: str | None = None
    fault: tuple[str, str] | None = None


class Part(NamedTuple):
    """The share of a source that one task reads: its number, its weight in the catalog's unit, and where it is."""

    number: int
    weight: int
    where: Any


class Catalog(NamedTuple):
    """What a source holds: its parts in a fixed order, their total weight and its unit, such as "pictures" or "bytes".

    `pictures` is how many items there will be where that is known beforehand. `classes` fixes the order of the classes'
    names where the source has one; otherwise they stand in numeric or alphabetic order.
    """

    parts: Iterator[Part]
    total: int
    unit: str
    pictures: int | None = None
    classes: tuple[str, ...] = ()


class Source(Kind):
    """A place with pictures, chosen in params by its `kind`."""

    @abstractmethod
    def catalog(self, spool: Path) -> Catalog:
        """List what there is, once; a long list is kept in a file in the folder `spool`, not in memory.

        Raises DataError if there is nothing or it cannot be reached.
        """

    @abstractmethod
    def items(self, part: Part) -> Iterator[Item]:
        """The items of one part, one at a time; raises DataError if the whole part cannot be read."""
