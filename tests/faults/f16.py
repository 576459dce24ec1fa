"""F16: a latent cache that is stale or damaged."""

import random
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import torch

from diffusion_core import manifest
from diffusion_core.errors import InkwellError
from pipelines.data.latents import Latents, check_codec
from tests.faults.figure import Figure, share
from tests.faults.pictures import flipped
from tests.faults.stages import Place
from tests.pipelines.latent_inputs import (
    OUT,
    fresh_codec,
    hold_against_fresh,
    some,
    write_codec,
    write_data,
)

FAULT = "poisoned latent cache"
INJECTION = (
    "pixels, VAE weights and dtype edited, bits flipped in the store and in the published files, in random order"
)
OUTCOME = "stale or damaged latents are refused where they are read, and the stage encodes anew exactly as from nothing"
EDITS = ("pixel", "weight", "dtype", "store", "published")
LATENTS = Path("artifacts/latents")
STORE = Path(".inkwell/latents/segments")


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    here, drawn, count = Place(place / "here"), random.Random(seed), 50 if full else 10
    edits = [*EDITS, *drawn.choices(EDITS, k=count - len(EDITS))]
    drawn.shuffle(edits)
    with chdir(here.folder):
        return edited(here, edits, drawn)


def edited(here: Place, edits: list[str], drawn: random.Random) -> list[Figure]:
    """Edit, and after each edit read, run the stage and compare every number with an encoding from nothing."""
    pictures, codec, dtype = some(20), fresh_codec(), "float16"
    OUT.symlink_to(LATENTS)
    write_data(pictures)
    write_codec(codec)
    here.done("cache_latents", {"dtype": dtype, "batch": 4})
    stale, refused = 0, []
    for edit in edits:
        if edit == "pixel":
            number = drawn.randrange(len(pictures))
            pixels = pictures[number].pixels.copy()
            pixels[drawn.randrange(8), drawn.randrange(8), drawn.randrange(3)] ^= 1 << drawn.randrange(8)
            pictures[number] = pictures[number]._replace(pixels=pixels)
            write_data(pictures)
        elif edit == "weight":
            with torch.no_grad():
                parameter = drawn.choice(list(codec.encoder.parameters())).view(-1)
                parameter[drawn.randrange(len(parameter))] += 0.25
            write_codec(codec)
            refused.append(refuses(lambda: check_codec(manifest.read(LATENTS), Path("artifacts/codec"))))
        elif edit == "dtype":
            dtype = "float32" if dtype == "float16" else "float16"
        else:
            folder = drawn.choice(sorted(STORE.iterdir())) if edit == "store" else LATENTS
            damaged = drawn.choice(sorted(folder.glob("*.safetensors")))
            damaged.write_bytes(flipped(damaged.read_bytes(), drawn.randrange(damaged.stat().st_size)))
            if edit == "published":
                refused.append(refuses(lambda split=damaged.stem: Latents.open(LATENTS, split)))
        here.done("cache_latents", {"dtype": dtype, "batch": 4})
        try:
            hold_against_fresh(pictures, codec, dtype, False, False)
        except AssertionError as error:
            stale += 1
            print(f"  after an edit of {edit}: {str(error)[:300]}", flush=True)
    return [
        Figure(f"stale reads after {len(edits)} edits", stale, "reads", "<= 0"),
        share("latents refused where they are read, of another VAE or damaged", refused),
    ]


def refuses(read: Callable[[], object]) -> bool:
    """Whether reading raises an error of ours."""
    try:
        read()
    except InkwellError:
        return True
    return False
