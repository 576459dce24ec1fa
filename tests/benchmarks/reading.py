"""Reading shuffled batches of 256 from tars: ours beside the webdataset package, on the same files.

Latents are 4x32x32 numbers of 16 bits in `.npy` members, each with its `.cls`; pictures are PNGs of 64x64 pixels. All
files are in the page cache, so this measures Python, decoding and copies, not the disk.
"""

import io
import json
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from torch import Tensor

from diffusion_core import images, manifest
from diffusion_core.order import Order
from pipelines.data.arrays import Arrays
from pipelines.data.reader import Pictures
from tests.benchmarks.timing import Figure, alternate, ratio
from tests.pipelines.data_folder import make, picture

LATENTS, SHARD, PICTURES, BATCH = 8192, 1024, 1024, 256
ROUNDS = 7
PEER = "webdataset"


def figures() -> Iterator[Figure]:
    """How many times faster ours is, the first pass with its SHA-256 and later ones, and microseconds a row."""
    with tempfile.TemporaryDirectory(prefix="reading") as folder:
        yield from latent_figures(Path(folder) / "latents")
        yield from picture_figures(Path(folder) / "pictures")


def latent_figures(folder: Path) -> Iterator[Figure]:
    """Arrays of numbers: a gather out of mapped files beside a stream of members decoded one at a time."""
    numbers = np.random.default_rng(0).integers(-30_000, 30_000, (LATENTS, 4, 32, 32)).astype(np.int16)
    folder.mkdir()
    for start in range(0, LATENTS, SHARD):
        write(folder / f"{start // SHARD:05d}.tar", members(numbers[start : start + SHARD], start))
    manifest.seal(folder, "arrays", {})
    verified, seen = Arrays.open(folder), dict[str, int]()
    order = Order((LATENTS,), 0)
    whole = torch.from_numpy(numbers)

    def peer() -> None:
        stream = streamed(folder).decode().to_tuple("npy", "cls").map_tuple(torch.from_numpy, int).batched(BATCH)
        seen["peer"] = sum(len(batch[0]) for batch in stream)

    def read(rows: Callable[[Tensor], Tensor], name: str) -> None:
        seen[name] = sum(len(rows(order.ids(step, BATCH))) for step in range(LATENTS // BATCH))

    ways = {
        PEER: peer,
        "first": lambda: read(Arrays.open(folder).tensor, "first"),
        "verified": lambda: read(verified.tensor, "verified"),
        "in memory": lambda: read(lambda ids: whole.index_select(0, ids), "in memory"),
    }
    seconds = alternate(ways, ROUNDS)
    if set(seen.values()) != {LATENTS} or not torch.equal(verified.tensor(torch.arange(BATCH)), whole[:BATCH]):
        raise AssertionError(f"the ways did not read the same: {seen}")
    yield Figure("npy latents, verified shards", ratio(seconds[PEER], seconds["verified"]), "x faster", ">= 15", PEER)
    what = "npy latents, first pass: open, SHA-256, read all"
    yield Figure(what, ratio(seconds[PEER], seconds["first"]), "x faster", ">= 8", PEER)
    for way, taken in seconds.items():
        yield Figure(f"npy latents, {way}", 1e6 * statistics.median(taken) / LATENTS, "us a row")


def picture_figures(folder: Path) -> Iterator[Figure]:
    """PNGs, whose decoding both ways share; nothing decoded is kept."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.random((PICTURES, 3, 8, 8), np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").mul(2).sub(1)
    encoded = [images.encode_png(pixels) for pixels in images.to_pixels(smooth)]
    make(folder, [picture(data, height=64, width=64, label=0) for data in encoded], classes=["a"])
    order = Order((PICTURES,), 0)

    def peer() -> int:
        stream = streamed(folder).decode("pil").to_tuple("png").map_tuple(as_tensor).batched(BATCH)
        return sum(len(batch[0]) for batch in stream)

    def ours() -> int:
        pictures = Pictures.open(folder, "train")
        return sum(len(pictures.tensor(order.ids(step, BATCH))) for step in range(PICTURES // BATCH))

    seconds = alternate({PEER: peer, "first": ours}, ROUNDS)
    what = "64x64 PNG, first pass: open, SHA-256, decode all"
    yield Figure(what, ratio(seconds[PEER], seconds["first"]), "x faster", "", PEER)
    for way, taken in seconds.items():
        yield Figure(f"64x64 PNG, {way}", 1e6 * statistics.median(taken) / PICTURES, "us a picture")


def streamed(folder: Path) -> webdataset.WebDataset:
    """The peer's way to shuffled samples, as its documentation shows it."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    return webdataset.WebDataset(tars, shardshuffle=100, empty_check=False).shuffle(1000)


def as_tensor(picture: object) -> Tensor:
    """A decoded picture as float32 (C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def members(numbers: np.ndarray, first: int) -> Iterator[tuple[str, bytes]]:
    """A `.npy` and a `.cls` for each array."""
    for number, array in enumerate(numbers, first):
        buffer = io.BytesIO()
        np.save(buffer, array)
        yield f"{number:08d}.npy", buffer.getvalue()
        yield f"{number:08d}.cls", json.dumps(number % 10).encode()


def write(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    """A tar as the peer's writer makes it, with whole seconds."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
