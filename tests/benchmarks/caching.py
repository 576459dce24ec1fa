"""The latent cache: gathering from mapped files beside memory, what a step waits for data, and what 1 % more costs."""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from diffusion_core import manifest
from diffusion_core.adapters.unet import read_unet
from diffusion_core.noise import Noise
from diffusion_core.vae import CodecSpec
from diffusion_core.weights import write_tensors
from pipelines.data.latents import Latents, file_of
from tests.benchmarks.timing import Figure, alternate, ratio
from tests.benchmarks.training import BATCH, SIZES, our_step, peer_net, pictures
from tests.pipelines.latent_inputs import cached, some, write_codec, write_data

ROUNDS = 41
COUNT, GATHERED = 8192, 256  # latents in the cache, and in one gather
CODEC = CodecSpec.read({"kind": "ldm_vae", "channels": 3, "widths": [64, 128, 128]}, "codec")
PICTURES, MORE, SIDE = 800, 8, 64
TIMES = 5  # how often 1 % is added


def figures() -> Iterator[Figure]:
    """The three figures of the cache."""
    with tempfile.TemporaryDirectory() as folder:
        latents = written(Path(folder))
        yield from gathering(latents)
        yield from waiting(latents)
    yield from adding()


def written(folder: Path) -> Latents:
    """A cache of latents 4x32x32 in float16, opened."""
    moments = torch.randn(COUNT, 8, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    tensors = {"moments": moments, "label": torch.zeros(COUNT, dtype=torch.int64)}
    write_tensors(folder / file_of("train"), tensors)
    manifest.seal(folder, "latents", {"classes": ["all"], "counts": {"train": COUNT}, "text": None})
    return Latents.open(folder, "train")


def gathering(latents: Latents) -> Iterator[Figure]:
    """The same rows by the same call, from the mapped file and from memory."""
    mapped = latents.parts[0]["moments"]
    memory = mapped.clone()
    generator = torch.Generator().manual_seed(1)

    def gather(of: torch.Tensor) -> torch.Tensor:
        return of.index_select(0, torch.randint(0, COUNT, (GATHERED,), generator=generator))

    mapped.sum()  # every page has been seen once, as after an epoch
    seconds = alternate({"mapped": partial(gather, mapped), "memory": partial(gather, memory)}, ROUNDS, 5)
    yield Figure(
        "mapped cache, rate of a gather in memory", ratio(seconds["memory"], seconds["mapped"]), "x", ">= 0.85"
    )
    rate = GATHERED / statistics.median(seconds["mapped"])
    yield Figure("mapped cache, latents 4x32x32 in float16", rate, "a second")


def waiting(latents: Latents) -> Iterator[Figure]:
    """What a batch takes to be there, its noise drawn, of the step that then trains on it."""
    size = SIZES["16 M parameters at 32 px"]
    with tempfile.TemporaryDirectory() as folder:
        peer_net(size).save_pretrained(folder)
        _, net = read_unet(Path(folder))
    step = our_step(net, pictures(size))
    generator = torch.Generator().manual_seed(2)

    def batch() -> None:
        ids = torch.randint(0, len(latents), (BATCH,), generator=generator)
        latents.batch(ids, Noise(0, ids, 1))

    seconds = alternate({"batch": batch, "step": step}, size.rounds, 2)
    share = 100 * ratio(seconds["batch"], seconds["step"])
    yield Figure("data wait of a training step, 16 M parameters, batch 64", share, "%", "<= 1")
    yield Figure("data wait, batch of 64 latents 4x32x32", 1e3 * statistics.median(seconds["batch"]), "ms")


def adding() -> Iterator[Figure]:
    """The stage on a cache that lacks 1 % of the pictures, beside the stage on none; the median of several times."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            torch.manual_seed(0)
            codec = CODEC.build().eval()
            made = some(PICTURES + TIMES * MORE, size=(SIDE, SIDE))
            write_codec(codec, CODEC)
            costs = []
            for count in range(PICTURES, len(made) + 1, MORE):
                write_data(made[:count])
                start = time.process_time()
                told = cached(Path("latents"), batch=2)
                costs.append((told["encoded"], time.process_time() - start))
        finally:
            os.chdir(here)
    (all_, whole), *added = costs
    new, more = (statistics.median(values) for values in zip(*added, strict=True))
    yield Figure("adding 1 % of the pictures, encoded of all", 100 * new / all_, "%", "<= 1")
    yield Figure("adding 1 % of the pictures, time of encoding all", 100 * more / whole, "%", "<= 2")
