"""Stage train: latents -> the teacher, a many-step denoiser trained by Ray workers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_core import bundle
from diffusion_core.bundle import Bundle, DenoiserSpec
from diffusion_core.objective import Regression
from diffusion_core.sampler import Sampling
from diffusion_core.train import Plan
from diffusion_core.weighting import Times, Weight
from pipelines import launch
from pipelines.data.reader import Latents
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
    """Train on the cluster, then put codec and averaged weights together into the teacher's bundle."""
    latents, cached = stage.input("artifacts/latents", "latents")
    codec_folder, _ = stage.input("artifacts/codec", "codec")
    channels, size, _ = cached.about["latent_shape"]
    classes = tuple(cached.about["classes"])
    net = config.denoiser.net.extended(channels=channels, size=size, classes=len(classes))
    denoiser_spec = replace(config.denoiser, net=net)
    denoiser_spec.build()  # refuse an impossible denoiser before any worker starts
    place = Place(stage.work.resolve(), stage.tracker.journal, stage.identity(config))
    job = Job(config, denoiser_spec, latents.resolve(), place, stage.out.resolve() / "denoiser.safetensors")
    with stage.following("images seen", config.plan.images):
        launch.train(loop, job, config.cluster)
    codec, codec_spec = bundle.load_codec(codec_folder)
    denoiser = bundle.load_denoiser(denoiser_spec, job.weights)
    about = {"name": "teacher", "images": config.plan.images, "ema": config.plan.ema}
    shape = tuple(cached.about["image_shape"])
    teacher = Bundle(codec, codec_spec, denoiser, denoiser_spec, config.sampling, classes, shape, about)
    bundle.save(teacher, stage.out)
    preview(teacher, config.sampling, stage, "samples.png")
    return about


def loop(job: Job, device: str) -> None:
    """One worker's share of the training; the first writes the averaged weights."""
    initialize(job.config.plan.seed)
    objective = Regression(job.denoiser.build(), job.config.times, job.config.weight, job.config.drop_cond)
    averages = resume_and_fit(objective, Latents.open(job.latents, "train"), job.config.plan, job.place, device)
    publish_weights(averages["denoiser"], job.weights)


if __name__ == "__main__":
    run("train", Config, main, out="artifacts/teacher", kind="bundle")
