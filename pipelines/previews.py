"""Sample grids at fixed seeds: the same noise every time, so that two grids differ by the model alone."""

import torch

from diffusion_core.bundle import Bundle
from diffusion_core.images import encode_png, grid, to_pixels
from diffusion_core.sampler import Sampling, generate
from pipelines.stage import Stage

ROWS = 4


def preview(bundle: Bundle, sampling: Sampling, stage: Stage, name: str) -> None:
    """Write a grid with one column a class into the output folder and hand it to the tracker."""
    labels = torch.arange(len(bundle.classes)).repeat(ROWS)
    seeds = torch.arange(len(labels))
    pictures = generate(bundle.denoiser, bundle.codec, sampling, bundle.latent_shape, seeds, labels)
    path = stage.out / name
    path.write_bytes(encode_png(grid(to_pixels(pictures), len(bundle.classes))))
    stage.tracker.artifact(path, "samples")
