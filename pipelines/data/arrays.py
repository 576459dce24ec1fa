"""Arrays of numbers in tars, as the webdataset package writes them: `.npy` members gathered into one tensor a batch.

Where each array lies is learnt once, from the headers alone; after that a batch is one copy of bytes out of mapped
files. The format is NumPy's own (numpy.lib.format, versions 1 to 3). Nothing is unpickled: objects are refused.
"""

import io
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from diffusion_core import manifest
from diffusion_core.errors import DataError, suggest
from pipelines.data.reader import Shards
from pipelines.data.tar import Member, members, parted

PREFIX = 12  # bytes before the text of a header, in the versions with the longer one
HEADER_BYTES = 2**16
REAL = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
DTYPES = {np.dtype(name): getattr(torch, name) for name in REAL}


class Layout(NamedTuple):
    """What a header says of the numbers after it: their type and shape, and how many bytes they are.

    `reverse` is of arrays in Fortran's order, whose axes stand the other way round in memory.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    reverse: bool
    size: int


class Places(NamedTuple):
    """Where rows lie: the number of the file, the place of the first number in it, and the number of the layout."""

    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    layout: NDArray[np.int32]


class Arrays:
    """The arrays of one suffix in the files `names`, by row, in the order of files and members."""

    def __init__(self, shards: Shards, names: Sequence[str], layouts: Sequence[Layout], places: Places) -> None:
        self.shards, self.names, self.layouts, self.places = shards, tuple(names), tuple(layouts), places

    @classmethod
    def open(cls, where: Path | Sequence[Path], suffix: str = "npy") -> Self:
        """Find the members in all tars of a folder, held against its manifest if it has one, or in tars by path.

        Raises IntegrityError for changed bytes, DataError naming a damaged tar, or a member that is no plain array of
        numbers, and if there is none at all.
        """
        if isinstance(where, Path):
            if not where.is_dir():
                raise DataError(f"{where} is no folder; a folder of tars, or a list of tars, is wanted")
            found = manifest.read(where) if (where / manifest.NAME).is_file() else None
            there = found.files if found else [path.name for path in where.iterdir()]
            shards, names = Shards(where, found), sorted(name for name in there if name.endswith(".tar"))
        else:
            shards, names = Shards(Path(), None), [str(path) for path in where]
        known: dict[bytes, tuple[int, Layout]] = {}
        offsets, numbers, counts = list[int](), list[int](), list[int]()
        for name in names:
            view, header, number, size = shards.view(name), b"", 0, -1
            for member in members(view, name):
                if member.name.partition(".")[2] != suffix and parted(member.name)[1] != suffix:
                    continue
                start = member.offset
                if member.size != size or bytes(view[start : start + len(header)]) != header:
                    header = _header(view, member, name)
                    if header not in known:
                        known[header] = len(known), _layout(header, member, name)
                    number, layout = known[header]
                    size = len(header) + layout.size
                    if member.size != size:
                        raise DataError(f"{name}: {member.name} has {member.size} bytes; its header makes them {size}")
                offsets.append(start + len(header))
                numbers.append(number)
            counts.append(len(offsets))
        if not offsets:
            raise DataError(f"{where} has no member of suffix '{suffix}' in {len(names)} tars")
        files = np.repeat(np.arange(len(names), dtype=np.int32), np.diff([0, *counts]))
        places = Places(files, np.array(offsets), np.array(numbers, np.int32))
        return cls(shards, names, [layout for _, layout in known.values()], places)

    def __len__(self) -> int:
        return len(self.places.offset)

    def tensor(self, ids: Tensor) -> Tensor:
        """Rows `ids` (B,) as one tensor (B, *shape) of their own type.

        Raises DataError for rows of several shapes or types, IntegrityError naming a file that was changed.
        """
        rows = ids.numpy()
        number = self.places.layout[rows[0]]
        layout = self.layouts[number]
        if len(self.layouts) > 1 and (other := rows[self.places.layout[rows] != number]).size:
            found = self.layouts[self.places.layout[other[0]]]
            raise DataError(
                f"a batch of arrays {layout.dtype} {layout.shape} and {found.dtype} {found.shape}; one kind is wanted"
            )
        files, size = self.places.file[rows].tolist(), layout.size
        views = {file: self.shards.view(self.names[file]) for file in set(files)}
        begins = self.places.offset[rows].tolist()
        pieces = [views[file][begin : begin + size] for file, begin in zip(files, begins, strict=True)]
        batch = torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8).view(layout.dtype)
        if layout.reverse:
            axes = range(len(layout.shape), 0, -1)
            return batch.view(-1, *layout.shape[::-1]).permute(0, *axes).contiguous()
        return batch.view(-1, *layout.shape)


def _header(view: memoryview, member: Member, origin: str) -> bytes:
    """All bytes of an array's member before its numbers."""
    start = member.offset
    prefix = bytes(view[start : start + min(member.size, PREFIX)])
    if len(prefix) < PREFIX or not prefix.startswith(npy.MAGIC_PREFIX) or prefix[6] not in (1, 2, 3):
        raise DataError(f"{origin}: {member.name} is no array in NumPy's format")
    size = int.from_bytes(prefix[8:10], "little") + 10 if prefix[6] == 1 else int.from_bytes(prefix[8:], "little") + 12
    if size > min(member.size, HEADER_BYTES):
        raise DataError(f"{origin}: {member.name} has a header of {size} bytes, and {member.size} in all")
    return bytes(view[start : start + size])


def _layout(header: bytes, member: Member, origin: str) -> Layout:
    """What a header says; raises DataError if it is broken, or of what is no plain number."""
    stream = io.BytesIO(header)
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=HEADER_BYTES)
    except Exception as error:  # on bytes made to hurt, NumPy raises whatever it stumbles over
        raise DataError(f"{origin}: {member.name} has a header that cannot be read: {error}") from error
    if dtype not in DTYPES or min(shape, default=1) < 1:
        raise DataError(
            f"{origin}: {member.name} is an array {dtype.str} {shape}; sides of 1 or more are wanted, and a type: "
            + suggest(dtype.name, map(str, DTYPES))
        )
    return Layout(DTYPES[dtype], shape, fortran, prod(shape) * dtype.itemsize)
