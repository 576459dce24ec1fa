"""Where pictures come from: a family of sources, each a lazy stream of encoded bytes with a label and an origin.

A source decodes and judges nothing. What it yields is what was found; preparing decides what is usable.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_core import images
from diffusion_core.errors import DataError
from diffusion_core.spec import Kind


class Item(NamedTuple):
    """One picture as found: where it came from (free of the machine's own paths), its class and its encoded bytes."""

    origin: str
    label: int
    data: bytes


class Feed(NamedTuple):
    """An opened source: the classes' names, how many items it will yield, and the items."""

    classes: tuple[str, ...]
    total: int
    items: Iterator[Item]


class Source(Kind):
    """A place with pictures, chosen in params by its `kind`."""

    @abstractmethod
    def open(self) -> Feed:
        """List what there is, once; raises DataError if there is nothing."""


@dataclass(frozen=True)
class Digits(Source):
    """The 1,797 scans of handwritten digits inside scikit-learn: 8x8 pixels, 17 grey levels (Alpaydin, Kaynak 1998)."""

    def open(self) -> Feed:
        """List the scans."""
        from sklearn.datasets import load_digits  # slow to import, and only this source wants it

        found = load_digits()
        scans = np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None]
        items = (
            Item(f"sklearn.digits/{row:04d}", int(label), images.encode_png(scan))
            for row, (scan, label) in enumerate(zip(scans, found.target, strict=True))
        )
        return Feed(tuple(str(name) for name in found.target_names), len(scans), items)


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder with one folder of pictures a class; the class is the folder's name, in sorted order.

    Every file that is not hidden counts, whatever its ending, so that none is left out in silence.
    """

    path: str

    def open(self) -> Feed:
        """List the files; raises DataError if the folder is missing or holds no class folder or no file."""
        root = Path(self.path)
        if not root.is_dir():
            raise DataError(f"{root} is missing or no folder; an image folder holds one folder of pictures a class")
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = [(path, label) for label, folder in enumerate(folders) for path in _files(folder)]
        if not files:
            raise DataError(f"no pictures in {root}: {len(folders)} class folders, no file in any of them")
        items = (Item(_printable(path.relative_to(root)), label, _read(path)) for path, label in files)
        return Feed(tuple(_printable(Path(folder.name)) for folder in folders), len(files), items)


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _printable(path: Path) -> str:
    """A path as text that any table can hold: bytes of a name that are not UTF-8 are spelt out."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()
