"""Stage train: latents -> the teacher, a many-step denoiser trained by Ray workers.

Where captions were cached the network reads their tokens, and the encoder that made them goes into the bundle.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffusion_core import bundle
from diffusion_core.bundle import Bundle, DenoiserSpec
from diffusion_core.errors import ConfigError, suggest
from diffusion_core.nets import NetSpec
from diffusion_core.objective import Regression
from diffusion_core.sampler import Sampling
from diffusion_core.train import Plan
from diffusion_core.weighting import Times, Weight
from pipelines import launch
from pipelines.data.latents import Latents, check_codec
from pipelines.fitting import Place, initialize, publish_weights, resume_and_fit
from pipelines.launch import Cluster
from pipelines.previews import preview
from pipelines.stage import Stage, run


@dataclass(frozen=True)
class Config:
    """`denoiser` is what is trained, `times`, `weight` and `drop_cond` its loss, `sampling` the teacher's defaults."""

    denoiser: DenoiserSpec
    times: Times
    weight: Weight
    plan: Plan
    sampling: Sampling
    cluster: Cluster
    drop_cond: float = 0.1


@dataclass(frozen=True)
class Job:
    """What a worker is sent; all paths are absolute, on storage that every worker sees."""

    config: Config
    denoiser: DenoiserSpec
    latents: Path
    place: Place
    weights: Path


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Train on the cluster, then put codec, averaged weights and text encoder together into the teacher's bundle."""
    latents, cached = stage.input("artifacts/latents", "latents")
    codec_folder, _ = stage.input("artifacts/codec", "codec")
    check_codec(cached, codec_folder)
    data = Latents.open(latents, "train")
    classes = tuple(cached.about["classes"])
    denoiser_spec = replace(config.denoiser, net=fitted(config.denoiser.net, data, len(classes)))
    check_shapes(denoiser_spec, data)  # refuse an impossible denoiser before any worker starts
    place = Place(stage.work.resolve(), stage.tracker.journal, stage.identity(config))
    job = Job(config, denoiser_spec, latents.resolve(), place, stage.out.resolve() / "denoiser.safetensors")
    with stage.following("images seen", config.plan.images):
        launch.train(loop, job, config.cluster)
    codec, codec_spec = bundle.load_codec(codec_folder)
    denoiser = bundle.load_denoiser(denoiser_spec, job.weights)
    about = {"name": "teacher", "images": config.plan.images, "ema": config.plan.ema}
    teacher = Bundle(
        codec,
        codec_spec,
        denoiser,
        denoiser_spec,
        config.sampling,
        classes,
        drawn_shape(cached.about["image_shape"], data),
        about,
        bundle.load_text(latents / bundle.TEXT) if data.text_shape else None,
        bundle.text_spec(latents / bundle.TEXT) if data.text_shape else None,
    )
    bundle.save(teacher, stage.out)
    preview(teacher, config.sampling, stage, "samples.png", data)
    return about


def fitted(net: NetSpec, data: Latents, classes: int) -> NetSpec:
    """The network with the sizes that only the data know; raises ConfigError if it cannot read the captions.

    For latents of several shapes its size is the longest of their shorter sides.
    """
    channels, size = data.shape[0], max(min(height, width) for _, height, width in data.shapes)
    net = net.extended(channels=channels, size=size, classes=classes)
    if data.text_shape is None:
        return net
    if not _reads_text(net.kind):
        readers = filter(_reads_text, NetSpec.known)
        raise ConfigError(
            f"train.denoiser.net: kind '{net.kind}' reads no text, and the latents have captions; "
            f"{suggest(net.kind, readers)}, or cache_latents.text: null"
        )
    return net.extended(text=data.text_shape[1])


def drawn_shape(image_shape: Sequence[int], data: Latents) -> tuple[int, int, int]:
    """The shape (C, H, W) of what the bundle draws: that of the pictures or, of several, the one nearest a square.

    `image_shape` is that of the first latents' pictures.
    """
    _, height, width = min(data.shapes, key=lambda shape: abs(shape[1] - shape[2]))
    squares = image_shape[1] // data.shape[1]  # side of the square that one place of a latent stands for
    return image_shape[0], height * squares, width * squares


def _reads_text(kind: str) -> bool:
    return "text" in inspect.signature(NetSpec.known[kind]).parameters


@torch.no_grad()
def check_shapes(denoiser_spec: DenoiserSpec, data: Latents) -> None:
    """Build the denoiser and, of latents that are not all one square, show it one of each shape.

    Raises ConfigError naming the shape that it cannot take.
    """
    denoiser = denoiser_spec.build()
    if len(data.shapes) == 1 and data.shape[1] == data.shape[2]:
        return
    for shape in data.shapes:
        try:
            denoiser.net(torch.zeros(1, *shape), torch.zeros(1), None)
        except ConfigError as error:
            raise ConfigError(
                f"train.denoiser.net: kind '{denoiser_spec.net.kind}' cannot take all latents: {error}; 'unet' and "
                "'lean' take several shapes, or prepare pictures of one"
            ) from error


def loop(job: Job, device: str) -> None:
    """One worker's share of the training; the first writes the averaged weights."""
    initialize(job.config.plan.seed)
    objective = Regression(job.denoiser.build(), job.config.times, job.config.weight, job.config.drop_cond)
    averages = resume_and_fit(objective, Latents.open(job.latents, "train"), job.config.plan, job.place, device)
    publish_weights(averages["denoiser"], job.weights)


if __name__ == "__main__":
    run("train", Config, main, out="artifacts/teacher", kind="bundle")
