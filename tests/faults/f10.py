"""F10: a shard that was cut off."""

import random
from pathlib import Path

import torch

from diffusion_core.errors import DataError, IntegrityError
from pipelines.data.reader import Pictures
from pipelines.data.sources import Tars
from tests.faults.figure import Figure, share
from tests.faults.pictures import PARAMS, altered, edges, folder, noise, tar
from tests.faults.stages import Place

FAULT = "truncated shard"
INJECTION = "a prepared shard, and a tar of somebody else's, cut at random places and at every edge of a member"
OUTCOME = "the reader refuses it by its manifest, the source by its headers; the stages end with code 2"


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    here, drawn, count = Place(place / "prepared"), random.Random(seed), 200 if full else 20
    here.done("prepare", PARAMS | {"source": folder(place / "pictures", noise(50, seed))})
    shard = sorted(here.data.glob("*.tar"))[0]
    whole = shard.read_bytes()
    read = []
    for cut in [*edges(whole), *drawn.sample(range(len(whole)), count)]:
        with altered(shard, whole[:cut]):
            read.append(reader_refuses(here.data))
    with altered(shard, whole[: drawn.randrange(len(whole))]):
        stages = [here.refused("validate", {})]
    foreign = tar([(f"{number:04d}.png", data) for number, data in enumerate(noise(40, seed + 1))])
    path, walked = place / "foreign.tar", []
    path.write_bytes(foreign)
    end = edges(foreign)[-2] + 1024  # beyond its end mark a tar is only filled up
    for cut in [*edges(foreign), *drawn.sample(range(end), count)]:
        with altered(path, foreign[:cut]):
            walked.append(source_refuses(path, place / "spool"))
    other = Place(place / "foreign")
    path.write_bytes(foreign[: drawn.randrange(end)])
    stages.append(other.refused("prepare", PARAMS | {"source": {"kind": "tars", "path": str(path)}}))
    return [
        share("cuts of a prepared shard found by the reader", read),
        share("cuts of a foreign tar found by the source", walked),
        share("stages that refused", stages),
    ]


def reader_refuses(data: Path) -> bool:
    try:
        pictures = Pictures.open(data, "train")
        pictures.tensor(torch.arange(len(pictures)))
    except IntegrityError:
        return True
    return False


def source_refuses(path: Path, spool: Path) -> bool:
    """Whether it is refused before any picture of it is handed out."""
    spool.mkdir(exist_ok=True)
    source = Tars(str(path))
    for part in source.catalog(spool).parts:
        try:
            next(source.items(part), None)
        except DataError:
            return True
    return False
