"""Prepare: its speed beside plain Pillow, on two workers, its memory, and how well it finds duplicates."""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import create_autospec

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from diffusion_core import images
from diffusion_core.images import Fit
from diffusion_core.spec import build
from pipelines import launch, prepare
from pipelines.data import duplicates, preparing
from pipelines.data.phash import Hasher
from pipelines.data.preparing import Budget, Recipe, Task
from pipelines.data.sources import Catalog, ImageFolder, Item, Part, Source
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from tests.benchmarks.timing import Figure, alternate, ratio
from tests.made import picture
from tests.measured import ROOT, peak_memory

ROUNDS = 7
PICTURES = 1000
PER_PART = 1000
FEW, MANY = 10_000, 200_000
DISTINCT, PLANTED = 3000, 300
WIDE = Image.Resampling.BICUBIC


def figures() -> Iterator[Figure]:
    """Speed, speed-up, memory, duplicates."""
    with tempfile.TemporaryDirectory() as folder:
        yield from speed(Path(folder))
        yield from speed_up(Path(folder))
    yield memory()
    yield from found()


def speed(folder: Path) -> Iterator[Figure]:
    """The whole stage beside Pillow's open, convert, resize, save of the same bytes, as CPU time; with reading, too."""
    for side, to, bound in ((64, 64, ">= 0.8"), (64, 32, ""), (256, 64, "")):
        place = folder / f"{side}-{to}"
        _files(place, side, PICTURES if side == 64 else PICTURES // 4)
        held = {"kind": "held", "path": str(place)}
        ways = {"prepare": partial(_prepare, held, to), "Pillow": partial(_pillow, _held(str(place)), to)}
        seconds = alternate(ways, ROUNDS)
        name = f"prepare, PNG of {side} px to {to} px, speed of Pillow's"
        yield Figure(name, ratio(seconds["Pillow"], seconds["prepare"]), "x", bound, "Pillow")
    place = folder / "64-64"
    files = {"kind": "image_folder", "path": str(place)}
    ways = {"prepare": partial(_prepare, files, 64), "Pillow": lambda: _pillow(_read(place), 64)}
    seconds = alternate(ways, ROUNDS)
    name = "prepare, PNG of 64 px to 64 px from a folder, speed of Pillow's"
    yield Figure(name, ratio(seconds["Pillow"], seconds["prepare"]), "x", "", "Pillow")


def speed_up(folder: Path) -> Iterator[Figure]:
    """Two workers beside this process, by wall clock, from the time on when each has prepared a part."""
    place = folder / "parallel"
    _files(place, 128, 256)
    source = Repeated(str(place), 48)
    recipe = Recipe(source, 3, Fit(((64, 64),)), images.WHITE, 1, images.MAX_PIXELS, (), None, Budget(None, 1.0, 9))
    rounds = [_rate(recipe, folder, 2) / _rate(recipe, folder, 0) for _ in range(3)]
    yield Figure("prepare, two workers, speed-up", statistics.median(rounds), "x", ">= 1.6")


def memory() -> Figure:
    """Peak memory of the stage in a process of its own, with many tiny pictures and with few."""
    program = "from tests.benchmarks import preparing; preparing.peak(int(__import__('sys').argv[1]))"
    peaks = []
    for count in (FEW, MANY):
        command = [sys.executable, "-c", program, str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 2**20)
    name = f"prepare, peak memory with {MANY:,} pictures above that with {FEW:,}"
    return Figure(name, peaks[1] - peaks[0], "MB", "<= 150")


def peak(count: int) -> None:
    """Prepare so many tiny pictures and print the peak of this process's memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        _run({"source": {"kind": "generated", "count": count}, "resolution": 8, "near_duplicates": 2}, Path(folder))
    print(peak_memory())


def found() -> Iterator[Figure]:
    """Copies planted among distinct pictures: how many are found, and how many distinct ones are taken for copies."""
    originals = [Image.open(io.BytesIO(picture(0, number)[2])).convert("RGB") for number in range(DISTINCT)]
    alone = _hashes(originals)
    planted = {way: _hashes(list(map(change, originals[:PLANTED]))) for way, change in CHANGES.items()}
    for distance in (6, 10):
        wrong = (duplicates.near(alone, distance) >= 0).mean()
        yield Figure(f"near-duplicates within {distance} bits, distinct pictures left out", 100 * float(wrong), "%")
        for way, hashes in planted.items():
            near = duplicates.distances(hashes, alone[:PLANTED]) <= distance
            yield Figure(f"near-duplicates within {distance} bits, {way}, found", 100 * float(near.mean()), "%")


@dataclass(frozen=True)
class Generated(Source):
    """Tiny pictures of noise, made when they are asked for."""

    count: int

    def catalog(self, spool: Path) -> Catalog:
        starts = range(0, self.count, PER_PART)
        parts = (Part(number, min(PER_PART, self.count - start), start) for number, start in enumerate(starts))
        return Catalog(parts, self.count, "pictures", self.count)

    def items(self, part: Part) -> Iterator[Item]:
        rng = np.random.default_rng(part.number)
        for number in range(part.weight):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            caption = f"noise, the picture with the number {number}"
            yield Item(f"noise/{part.where + number:08d}.png", images.encode_png(pixels), str(number % 10), caption)


@dataclass(frozen=True)
class Held(Source):
    """The files of a folder as bytes that have been read before."""

    path: str

    def catalog(self, spool: Path) -> Catalog:
        count = len(_held(self.path))
        parts = (Part(n, min(512, count - n * 512), n * 512) for n in range(-(-count // 512)))
        return Catalog(parts, count, "pictures", count)

    def items(self, part: Part) -> Iterator[Item]:
        for number in range(part.where, part.where + part.weight):
            yield Item(f"{number:05d}.png", _held(self.path)[number])


@dataclass(frozen=True)
class Repeated(Source):
    """The same folder, as one part, a number of times."""

    path: str
    times: int

    def catalog(self, spool: Path) -> Catalog:
        (part,) = ImageFolder(self.path).catalog(spool).parts
        return Catalog((part._replace(number=n) for n in range(self.times)), self.times * part.weight, "pictures")

    def items(self, part: Part) -> Iterator[Item]:
        return ImageFolder(self.path).items(part)


def _jpeg(original: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    original.save(buffer, "JPEG", quality=75)
    return Image.open(buffer).convert("RGB")


def _cropped(original: Image.Image) -> Image.Image:
    """Three per cent of each side."""
    width, height = original.size
    edge = (round(width * 0.015), round(height * 0.015))
    return original.crop((*edge, width - edge[0], height - edge[1]))


CHANGES = {
    "equal copies": lambda original: original,
    "copies at 70 % of the size": lambda original: original.resize([round(0.7 * side) for side in original.size], WIDE),
    "copies as JPEG of quality 75": _jpeg,
    "copies less 3 % of each side": _cropped,
}


def _hashes(pictures: list[Image.Image]) -> NDArray[np.uint64]:
    """As prepare would find them, at 64 px."""
    hasher = Hasher()
    for one in pictures:
        hasher.add(images.transcode(images.encode_png(np.asarray(one)), 3, Fit(((64, 64),))).grey)
    return hasher.hashes()


def _files(folder: Path, side: int, count: int) -> None:
    """Pictures of some detail: noise of a quarter of the size, made smooth."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side), WIDE).save(folder / f"{number:05d}.png")


@cache
def _held(folder: str) -> list[bytes]:
    return list(_read(Path(folder)))


def _read(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in sorted(folder.iterdir()))


def _prepare(source: dict[str, str], side: int) -> None:
    with tempfile.TemporaryDirectory() as out:
        _run({"source": source, "resolution": side}, Path(out))


def _run(params: dict[str, object], out: Path) -> None:
    config = build(prepare.Config, {"channels": 3} | params, "prepare")
    prepare.main(config, Stage("prepare", out, out, create_autospec(Tracker, instance=True), Console(quiet=True)))


def _pillow(pictures: Iterable[bytes], side: int) -> None:
    for data in pictures:
        with Image.open(io.BytesIO(data)) as opened:
            small = opened.convert("RGB").resize((side, side), WIDE)
        small.save(io.BytesIO(), "PNG")


class Timed(NamedTuple):
    """Who prepared a part, from when to when."""

    process: int
    start: float
    end: float


def timed(task: Task) -> Timed:
    """Prepare a part and forget it."""
    start = time.time()
    preparing.prepare(task).file.unlink()
    return Timed(os.getpid(), start, time.time())


def _rate(recipe: Recipe, folder: Path, workers: int) -> float:
    """Parts a second while all workers are at work."""
    with tempfile.TemporaryDirectory(dir=folder) as spool:
        parts = recipe.source.catalog(Path(spool)).parts
        tasks = (Task(part, recipe, Path(spool) / str(part.number)) for part in parts)
        done = list(launch.map(timed, tasks, workers))
    ends = [[one.end for one in done if one.process == process] for process in {one.process for one in done}]
    begun, over = max(map(min, ends)), min(map(max, ends))
    inside = sum(max(0.0, min(one.end, over) - max(one.start, begun)) / (one.end - one.start) for one in done)
    return inside / (over - begun)
