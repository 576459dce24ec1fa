"""F11: flipped bytes in a shard's payload, and in the pictures of a source."""

import random
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq

from diffusion_core import images
from pipelines.data.index import INDEX
from tests.faults.f10 import reader_refuses
from tests.faults.figure import Figure, share
from tests.faults.pictures import PARAMS, altered, flipped, folder, noise, refusals, taken
from tests.faults.stages import Place

FAULT = "corrupted pictures"
INJECTION = "bytes flipped inside the pictures of a prepared shard and of a source folder"
OUTCOME = (
    "in a shard the hash finds it before anything is decoded; in a source each is quarantined, budgets stop the stage"
)


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    here, drawn = Place(place / "here"), random.Random(seed)
    pictures, bad = noise(200, seed), sorted(drawn.sample(range(200), 7))
    spoiled = [spoil(data, drawn) if number in bad else data for number, data in enumerate(pictures)]
    source = folder(place / "pictures", spoiled)
    here.done("prepare", PARAMS | {"source": source, "max_quarantine_percent": 3.5})
    wanted = {(f"{number:05d}.png", "broken") for number in bad}
    exact = [set(refusals(here)) == wanted, len(refusals(here)) == 7, taken(here) == 193]

    rows = pq.read_table(here.data / INDEX).to_pylist()
    found = []
    with mock.patch.object(images, "decode", side_effect=AssertionError("decoded before it was hashed")):
        for _ in range(200 if full else 20):
            row = drawn.choice(rows)
            shard, place_in = here.data / row["shard"], row["offset"] + drawn.randrange(row["size"])
            with altered(shard, flipped(shard.read_bytes(), place_in)):
                found.append(reader_refuses(here.data))

    stopped = []
    other = Place(place / "other")
    stopped.append(other.refused("prepare", PARAMS | {"source": source, "max_quarantine_percent": 3.4}))
    row = [spoil(data, drawn) if 90 <= number < 96 else data for number, data in enumerate(pictures)]
    together = folder(place / "together", row)
    stopped.append(other.refused("prepare", PARAMS | {"source": together, "max_consecutive": 5}))
    stopped.append(not other.data.exists())
    other.done("prepare", PARAMS | {"source": together, "max_consecutive": 6})
    exact.append(len(refusals(other)) == 6)
    return [
        share("flips in a shard found before decoding", found),
        share("exact counts in the quarantine", exact),
        share("budgets that stopped the stage with nothing published", stopped),
    ]


def spoil(png: bytes, drawn: random.Random) -> bytes:
    """A PNG with one byte of its pixels changed."""
    start = png.index(b"IDAT") + 4
    return flipped(png, drawn.randrange(start, len(png) - 16))
