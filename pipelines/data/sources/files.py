"""The only door to fsspec: web servers and object stores, opened like this machine's disk.

Whatever a library raises becomes a sentence within a bounded time. Credentials are the libraries' own, which take them
from the environment.
"""

import contextlib
import errno
import re
import shutil
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from diffusion_core.errors import ConfigError, DataError, InkwellError, UnreachableError
from pipelines.data.sources.address import WEB, check, has_wildcard, printable, scheme, spelt_out
from pipelines.data.sources.disk import Disk
from pipelines.data.sources.store import BLOCK, Store, up_to

CONNECT = 10.0  # seconds a server has to accept a connection
SILENCE = 30.0  # seconds it may say nothing
SLOWEST = 300.0  # seconds one picture may take
ATTEMPTS = 3
PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
NEEDS = {"s3": "s3fs (pip install -e '.[s3]')", "gs": "gcsfs (pip install gcsfs)"}
PARTIAL = 206  # HTTP's answer with a range
FOR_THE_MOMENT = (408, 429)  # answers of HTTP below 500 that say nothing of the file
BUSY = (errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO))  # s3fs's names for 503 and 500
OF_THE_FILE = (OSError, PermissionError, IsADirectoryError, NotADirectoryError, UnicodeEncodeError, ValueError)
R = TypeVar("R")


def store(address: str) -> Store:
    """The store of a checked address."""
    kind = scheme(address)
    if kind == "file":
        return Disk()
    return Web(kind) if kind in WEB else Objects(kind)


def expand(patterns: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    """The files that addresses, folders and patterns stand for, each once; raises DataError for one without any.

    Of a folder those count that end in one of `endings`.
    """
    found: dict[str, None] = {}
    for address in (word for pattern in patterns for word in spelt_out(pattern)):
        check(address)  # braces can spell what none of them is
        place = store(address)
        if place.is_folder(address):
            below = (name for name in place.walk(address) if name.lower().endswith(endings))
            some = sorted(place.join(address, name) for name in below)
        elif has_wildcard(address) and not (isinstance(place, Disk) and place.exists(address)):
            some = place.matching(address)
        else:
            some = [address]
        if not some:
            raise DataError(f"{address} holds no file whose name ends in {' or '.join(endings)}")
        found |= dict.fromkeys(some)
    return list(found)


class Remote(Store):
    """What fsspec opens by network."""

    lanes = 8

    def __init__(self, kind: str):
        self.kind = kind

    @property
    @abstractmethod
    def files(self) -> Any:
        """Fsspec's own file system."""

    @contextlib.contextmanager
    def mapped(self, address: str) -> Iterator[memoryview]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "copy")
            self.copy(address, copy)
            with Disk().mapped(str(copy)) as view:
                yield view


class Objects(Remote):
    """An object store, or fsspec's own memory."""

    @property
    def files(self) -> Any:
        if self.kind != "s3":
            return _filesystem(self.kind)
        wait = {"connect_timeout": CONNECT, "read_timeout": SILENCE, "retries": {"max_attempts": 0}}
        found = _filesystem(self.kind, config_kwargs=wait, use_listings_cache=False)
        found.retries = ATTEMPTS  # s3fs's own, beside those of the library below it
        return found

    def read(self, address: str, limit: int, origin: str) -> bytes:
        with _said(origin):
            try:
                return bytes(self.files.cat_file(address, start=0, end=limit + 1))
            except OSError:
                if self.files.info(address)["size"]:  # S3 has no first bytes of an empty object
                    raise
                return b""

    def exists(self, address: str) -> bool:
        with _said(address):
            return bool(self.files.isfile(address))

    def size(self, address: str) -> int:
        with _said(address):
            return int(self.files.info(address)["size"])

    def copy(self, address: str, to: Path) -> None:
        with _said(address):
            self.files.get_file(address, str(to))

    def is_folder(self, address: str) -> bool:
        with _said(address):
            return bool(self.files.isdir(address))

    def walk(self, folder: str) -> Iterator[str]:
        """S3 is asked a page at a time; other stores give their list whole."""
        with _said(folder):
            top = self.files._strip_protocol(folder).rstrip("/")
            for path in self._pages(top) if self.kind == "s3" else self.files.find(top):
                name = path[len(top) + 1 :]
                if name and not name.endswith("/") and not any(part.startswith(".") for part in name.split("/")):
                    yield name

    def matching(self, pattern: str) -> list[str]:
        with _said(pattern):
            return sorted(f"{self.kind}://{path.lstrip('/')}" for path in self.files.glob(pattern))

    @contextlib.contextmanager
    def opened(self, address: str) -> Iterator[BinaryIO]:
        with _said(address), self.files.open(address, "rb", block_size=BLOCK) as file:
            yield file

    def _pages(self, top: str) -> Iterator[str]:
        bucket, _, prefix = top.partition("/")
        asked = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        more: dict[str, str] = {}
        while True:
            page = self.files.call_s3("list_objects_v2", **asked, **more)
            yield from (f"{bucket}/{found['Key']}" for found in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}


class Web(Remote):
    """A web server: nothing can be listed, and what fails for the moment is tried again."""

    @property
    def files(self) -> Any:
        import aiohttp

        wait = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)
        return _filesystem(self.kind, client_kwargs={"timeout": wait})

    def read(self, address: str, limit: int, origin: str) -> bytes:
        def attempt() -> bytes:
            with _said(origin), self._body(address) as file:
                return up_to(_before(time.monotonic() + SLOWEST, file.read), limit + 1)

        return _again(attempt)

    def exists(self, address: str) -> bool:
        def attempt() -> bool:
            with _said(address):
                try:
                    self._body(address).close()
                except FileNotFoundError:
                    return False
                return True

        return _again(attempt)

    def size(self, address: str) -> int:
        def attempt() -> int:
            with _said(address), self._body(address) as file:
                return int(file.r.headers.get("Content-Length", 0))

        return _again(attempt)

    def copy(self, address: str, to: Path) -> None:
        def attempt() -> None:
            with _said(address), self._body(address) as file, to.open("wb") as copy:
                shutil.copyfileobj(file, copy, BLOCK)

        _again(attempt)

    def is_folder(self, address: str) -> bool:
        return False

    def walk(self, folder: str) -> Iterator[str]:
        raise DataError(f"{folder} cannot be listed over HTTP; name its files in a metadata.jsonl beside them")

    def matching(self, pattern: str) -> list[str]:
        raise DataError(f"{pattern} cannot be listed over HTTP; count its files instead, such as {{000..009}}")

    @contextlib.contextmanager
    def opened(self, address: str) -> Iterator[BinaryIO]:
        """By ranges, or as a temporary copy where the server knows none."""
        if size := self._size_by_range(address):
            with _said(address), self.files.open(address, "rb", block_size=BLOCK, size=size) as file:
                yield file
        else:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, "copy")
                self.copy(address, copy)
                with copy.open("rb") as file:
                    yield file

    def join(self, folder: str, name: str) -> str:
        return super().join(folder, quote(name))

    def seeks(self, address: str) -> bool:
        return self._size_by_range(address) > 0

    def _size_by_range(self, address: str) -> int:
        """The whole length in bytes, asked for with the first byte; 0 from a server that knows no ranges."""

        def attempt() -> int:
            with _said(address), self._body(address, headers={"Range": "bytes=0-0"}) as file:
                said = re.fullmatch(r"bytes 0-0/(\d+)", file.r.headers.get("Content-Range", ""))
                return int(said[1]) if said and file.r.status == PARTIAL else 0

        return _again(attempt)

    def _body(self, address: str, **asked: object) -> Any:
        """An answer, its body not yet read; told any size, fsspec asks for none."""
        return self.files.open(address, "rb", block_size=0, size=1, **asked)


def _filesystem(kind: str, **settings: Any) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(kind, **settings)
    except ImportError:
        raise ConfigError(f"{kind}:// needs the package {NEEDS[kind]}") from None


def _before(deadline: float, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """A read that ends at a deadline, for a server that sends a byte now and then."""

    def piece(size: int) -> bytes:
        if time.monotonic() > deadline:
            raise TimeoutError
        return read(size)

    return piece


def _again(attempt: Callable[[], R]) -> R:
    """Try a few times as long as it is the server that fails."""
    for number in range(ATTEMPTS - 1):
        try:
            return attempt()
        except UnreachableError:
            time.sleep(PAUSE * 2**number)
    return attempt()


@contextlib.contextmanager
def _said(origin: str) -> Iterator[None]:
    """Turn whatever a library raises about `origin` into a sentence of ours."""
    try:
        yield
    except InkwellError:
        raise
    except Exception as error:  # each file system of fsspec has exceptions of its own
        raise _sentence(printable(origin), error) from error


def _sentence(origin: str, error: Exception) -> InkwellError:
    status = getattr(error, "status", None)  # aiohttp's; its text would repeat the address
    if isinstance(error, FileNotFoundError):
        return DataError(f"{origin} is missing")
    if isinstance(status, int):
        momentary = status >= 500 or status in FOR_THE_MOMENT
        return (UnreachableError if momentary else DataError)(f"{origin}: the server answers HTTP {status}")
    if isinstance(error, TimeoutError):
        return UnreachableError(f"{origin}: the server does not answer in time")
    said = str(error) or type(error).__name__
    if type(error) in OF_THE_FILE and getattr(error, "errno", None) not in BUSY:
        return DataError(f"{origin} cannot be read: {said}")
    return UnreachableError(f"{origin} cannot be reached: {said}")
