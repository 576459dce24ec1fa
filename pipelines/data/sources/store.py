"""What a place with files can be asked, whatever and wherever it is; a file is named by its full address."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, TypeVar

BLOCK = 1 << 20
T = TypeVar("T")
R = TypeVar("R")


class Store(ABC):
    """Where files are; `lanes` is how many are best read at a time.

    Every method raises DataError where a file is at fault and UnreachableError where a server is.
    """

    lanes = 1

    @abstractmethod
    def read(self, address: str, limit: int, origin: str) -> bytes:
        """A file's bytes, of a longer one the first `limit` + 1; errors call it `origin`."""

    @abstractmethod
    def exists(self, address: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def size(self, address: str) -> int:
        """A file's length in bytes; 0 where the server does not say."""

    @abstractmethod
    def copy(self, address: str, to: Path) -> None:
        """Copy a file onto this machine's disk."""

    @abstractmethod
    def is_folder(self, address: str) -> bool:
        """Whether files may lie below this address."""

    @abstractmethod
    def walk(self, folder: str) -> Iterator[str]:
        """The names, from there and with `/`, of all files below a folder that are not hidden, in any order."""

    @abstractmethod
    def matching(self, pattern: str) -> list[str]:
        """The addresses that a pattern with wildcards stands for, sorted."""

    @abstractmethod
    def opened(self, address: str) -> AbstractContextManager[BinaryIO]:
        """A file that can be read from any place."""

    @abstractmethod
    def mapped(self, address: str) -> AbstractContextManager[memoryview]:
        """A file as memory, by way of a temporary copy (TMPDIR says where) if it is not on this machine's disk."""

    def join(self, folder: str, name: str) -> str:
        """The address of a file by its name from a folder."""
        return f"{folder.rstrip('/')}/{name}"

    def leaves(self, folder: str, name: str) -> bool:
        """Whether a name from a folder leads out of it by a link."""
        return False

    def seeks(self, address: str) -> bool:
        """Whether a piece of a file can be had without the whole."""
        return True


def up_to(read: Callable[[int], bytes], limit: int) -> bytes:
    """The first `limit` bytes of a stream that gives them in pieces."""
    pieces, left = [], limit
    while left and (piece := read(min(left, BLOCK))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def in_lanes(fn: Callable[[T], R], items: Iterable[T], lanes: int) -> Iterator[R]:
    """fn of every item, in order, as many at a time as there are lanes; raises what fn raised."""
    if lanes == 1:
        yield from map(fn, items)
        return
    flying: deque[Future[R]] = deque()
    with ThreadPoolExecutor(lanes) as pool:
        try:
            for item in items:
                flying.append(pool.submit(fn, item))
                if len(flying) == lanes:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for waiting in flying:
                waiting.cancel()
