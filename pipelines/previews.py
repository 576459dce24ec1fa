"""Sample grids at fixed seeds: the same noise every time, so that two grids differ by the model alone."""

import torch

from diffusion_core.bundle import Bundle
from diffusion_core.denoiser import Condition
from diffusion_core.images import encode_png, grid, to_pixels
from diffusion_core.noise import Noise
from diffusion_core.sampler import Sampling, generate
from pipelines.data.latents import Latents
from pipelines.stage import Stage

COLUMNS, ROWS = 8, 4


def preview(bundle: Bundle, sampling: Sampling, stage: Stage, name: str, latents: Latents) -> None:
    """Write a grid into the output folder and hand it to the tracker.

    It has one column a class; for a model that reads text, or knows no classes, picture i is asked for what training
    picture i was encoded with.
    """
    if bundle.text is None and bundle.classes:
        columns = len(bundle.classes)
        asked = bundle.condition(torch.arange(columns).repeat(ROWS))
    else:
        columns = COLUMNS
        asked = _said_of(latents, min(COLUMNS * ROWS, latents.groups[0]))
    seeds = torch.arange(len(asked["label"]))
    pictures = generate(bundle.denoiser, bundle.codec, sampling, bundle.latent_shape, seeds, asked)
    path = stage.out / name
    path.write_bytes(encode_png(grid(to_pixels(pictures), columns)))
    stage.tracker.artifact(path, "samples")


def _said_of(latents: Latents, count: int) -> Condition:
    """What the first training pictures are asked for with."""
    ids = torch.arange(count)
    return latents.batch(ids, Noise(0, ids)).cond
