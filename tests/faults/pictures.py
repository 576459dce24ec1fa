"""Folders and tars of small pictures, and what prepare made of them."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipelines.data.index import INDEX, QUARANTINE
from tests.faults.stages import Place
from tests.made import encoded

PARAMS = {"channels": 3, "resolution": 16, "shard_samples": 20, "val_share": 0.0, "max_quarantine_percent": 100.0}


def noise(count: int, seed: int) -> list[bytes]:
    """PNGs of 20 x 20 pixels of noise, all different."""
    drawn = np.random.default_rng(seed)
    return [encoded(drawn.integers(0, 256, (20, 20, 3), np.uint8), "PNG") for _ in range(count)]


def folder(path: Path, pictures: Sequence[bytes]) -> dict[str, object]:
    """Write an image folder in the order of its names; the source's params."""
    path.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(pictures):
        (path / f"{number:05d}.png").write_bytes(data)
    return {"kind": "image_folder", "path": str(path)}


def tar(members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar as the standard library writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def edges(data: bytes) -> list[int]:
    """Where each member's header, content and padding begin and end, the end of the tar left out."""
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        members = file.getmembers()
    places = {place for one in members for place in (one.offset, one.offset_data, one.offset_data + one.size)}
    last = members[-1].offset_data + members[-1].size
    return sorted(places | {-(-last // 512) * 512, -(-last // 512) * 512 + 512})


@contextmanager
def altered(path: Path, data: bytes) -> Iterator[None]:
    """A file with other bytes for as long as the context lasts."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(data: bytes, place: int) -> bytes:
    """The bytes with one of them changed."""
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


def taken(place: Place) -> int:
    """How many pictures prepare published."""
    return pq.read_metadata(place.data / INDEX).num_rows


def refusals(place: Place) -> list[tuple[str, str]]:
    """Origin and kind of every refusal that prepare published."""
    table = pq.read_table(place.data / QUARANTINE, columns=["origin", "kind"])
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def kinds(place: Place) -> Counter[str]:
    """How many refusals of each kind prepare published."""
    return Counter(kind for _, kind in refusals(place))
