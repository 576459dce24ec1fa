"""Files on this machine's disk, or mounted here."""

import contextlib
import glob
import mmap
import os
import shutil
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from diffusion_core.errors import DataError
from pipelines.data.sources.address import printable
from pipelines.data.sources.store import Store, up_to


class Disk(Store):
    """The store of local paths and of file:// URLs."""

    def __init__(self) -> None:
        self.real = lru_cache(maxsize=1024)(os.path.realpath)  # of folders, which many pictures share

    def read(self, address: str, limit: int, origin: str) -> bytes:
        with _regular(address, origin) as file:
            return up_to(file.read, limit + 1)

    def exists(self, address: str) -> bool:
        return os.path.lexists(_path(address))

    def size(self, address: str) -> int:
        with _regular(address, address) as file:
            return os.fstat(file.fileno()).st_size

    def copy(self, address: str, to: Path) -> None:
        with _regular(address, address) as file, to.open("wb") as copy:
            shutil.copyfileobj(file, copy)

    def is_folder(self, address: str) -> bool:
        return _path(address).is_dir()

    def walk(self, folder: str) -> Iterator[str]:
        """Links are named and not followed."""
        waiting = [""]
        while waiting:
            below = waiting.pop()
            with _said(printable(f"{folder}/{below}")), os.scandir(_path(folder) / below) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{below}{entry.name}/")
                    else:
                        yield f"{below}{entry.name}"

    def matching(self, pattern: str) -> list[str]:
        return sorted(glob.glob(str(_path(pattern)), recursive=True))  # noqa: PTH207 (a pattern may be absolute)

    def opened(self, address: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return _regular(address, address)

    @contextlib.contextmanager
    def mapped(self, address: str) -> Iterator[memoryview]:
        with _regular(address, address) as file:
            if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
                yield memoryview(b"")
            else:  # never closed by hand: an error on its way up may still hold a piece of it
                yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def leaves(self, folder: str, name: str) -> bool:
        with _said(printable(name)):
            root = self.real(_path(folder))
            path = f"{root}/{name}"
            linked = os.path.islink(path)  # noqa: PTH114 (a Path for every picture would cost more than the look)
            real = os.path.realpath(path) if linked else self.real(path.rpartition("/")[0])
            return real != root and not real.startswith(f"{root.rstrip('/')}/")


def _path(address: str) -> Path:
    return Path(address.removeprefix("file://"))


@contextlib.contextmanager
def _regular(address: str, origin: str) -> Iterator[BinaryIO]:
    """A regular file, opened; a pipe or a device is refused without waiting for it."""
    path = _path(address)
    with _said(printable(origin)):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise DataError(f"{printable(origin)} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
        with path.open("rb") as file:
            yield file


@contextlib.contextmanager
def _said(origin: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{origin} is missing") from None
    except (OSError, UnicodeEncodeError) as error:  # the latter for a name that no file can have
        raise DataError(f"{origin} cannot be read: {getattr(error, 'strerror', None) or error}") from error
