"""Stage train_vae: pictures -> the codec that turns them into latents, trained here or imported from a local folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from diffusion_core import bundle
from diffusion_core.adapters.vae import read_vae
from diffusion_core.codec import Codec
from diffusion_core.critic import Adversarial
from diffusion_core.errors import ConfigError
from diffusion_core.perceptual import Perceptual
from diffusion_core.spec import spec
from diffusion_core.train import Plan
from diffusion_core.vae import CodecSpec, KlCodec, VaeLoss
from diffusion_core.weights import load_weights
from pipelines import launch
from pipelines.data.reader import Pictures
from pipelines.fitting import Place, initialize, publish_weights, resume_and_fit
from pipelines.launch import Cluster
from pipelines.reconstruction import latent_std, measure, moments
from pipelines.stage import Stage, run


@dataclass(frozen=True)
class Pretrained:
    """An `AutoencoderKL` in diffusers' format in the local folder `path`, its weights of SHA-256 `sha256` if given.

    Its latents are shifted and scaled as the `folder` says, or as `measure`d on our pictures.
    """

    path: str
    sha256: str | None = None
    normalize: Literal["folder", "measure"] = "folder"

    def read(self) -> tuple[CodecSpec, KlCodec]:
        """The codec and its spec; raises ConfigError and IntegrityError as `read_vae` does."""
        return read_vae(Path(self.path), self.sha256)


class Source(CodecSpec):
    """Where the codec comes from: its spec, if it is to be built here, or a pretrained one."""

    known: ClassVar[Mapping[str, type]] = {**CodecSpec.known, "pretrained": Pretrained}

    @property
    def trainable(self) -> bool:
        """Whether the codec is to be trained here."""
        return self.kind not in ("pixel", "pretrained")

    @property
    def normalizable(self) -> bool:
        """Whether shift and scale are to be measured on our pictures."""
        return self.trainable or dict(self.keywords).get("normalize") == "measure"


@dataclass(frozen=True)
class Config:
    """`codec` kl_vae or ldm_vae is trained by `plan`; pixel and pretrained need no training and no plan.

    The loss is the error of `reconstruction`, `kl` times the divergence and, if given, a `perceptual` and an
    `adversarial` term; with `flip` half of the pictures it sees are mirrored. Latents are normalized by at most
    `normalize_images` pictures, chosen evenly.
    """

    codec: Source
    plan: Plan | None = None
    kl: float = 1e-3
    reconstruction: Literal["mse", "l1"] = "mse"
    perceptual: Perceptual | None = None
    adversarial: Adversarial | None = None
    flip: bool = False
    normalize_images: int = 50_000
    cluster: Cluster = field(default_factory=lambda: Cluster(workers=0))

    def __post_init__(self) -> None:
        if self.plan is None and self.codec.trainable:
            raise ConfigError(f"codec {self.codec.kind} is to be trained, and there is no plan; one is wanted")
        if self.adversarial is not None and not self.codec.trainable:
            raise ConfigError(f"codec {self.codec.kind} is not trained here; an adversarial term has no use")
        if self.normalize_images < 1:
            raise ConfigError(f"normalize_images {self.normalize_images}: at least 1 is wanted")


@dataclass(frozen=True)
class Job:
    """What a worker is sent; all paths are absolute, on storage that every worker sees."""

    config: Config
    plan: Plan
    codec: CodecSpec
    pictures: Path
    place: Place
    weights: Path


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Train or import the codec, normalize its latents and measure what it loses on held-out pictures."""
    folder, data = stage.validated_data()
    train, held_out = Pictures.open(folder, "train"), Pictures.open(folder, "val")
    codec_spec, codec = _made(config, train.shape[0])
    for channels, height, width in {*train.shapes, *held_out.shapes}:
        codec.latent_shape((channels, height, width))
        _check_terms(config, height, width)
    if config.plan is not None and config.codec.trainable:
        place = Place(stage.work.resolve(), stage.tracker.journal, stage.identity(config))
        job = Job(config, config.plan, codec_spec, folder.resolve(), place, place.work / "vae.safetensors")
        with stage.following("images seen", config.plan.images):
            launch.train(loop, job, config.cluster)
        load_weights(codec, job.weights)
    # The workers may have an accelerator where this process, which only measures, has none.
    device = torch.device(config.cluster.device if torch.cuda.is_available() else "cpu")
    codec.to(device).eval().requires_grad_(False)
    about: dict[str, Any] = {"classes": data.about["classes"], "latent_shape": list(codec.latent_shape(train.shape))}
    if isinstance(codec, KlCodec):
        if config.codec.normalizable:
            codec.normalize(moments(codec.raw, train, device, config.normalize_images))
        about |= {name: getattr(codec, name).flatten().tolist() for name in ("shift", "scale")}
        about["latent_std"] = {
            split: latent_std(codec, pictures, device, config.normalize_images)
            for split, pictures in (("train", train), ("val", held_out))
        }
        stage.tracker.metrics({f"latent_std/{split}": std for split, std in about["latent_std"].items()})
    distance = None if config.perceptual is None else config.perceptual.build().to(device)
    about |= measure(codec, held_out, distance, device, stage)
    bundle.save_codec(codec, codec_spec, stage.out)
    return about


def loop(job: Job, device: str) -> None:
    """One worker's share of the training; the first writes the averaged weights."""
    initialize(job.plan.seed)
    config, codec = job.config, job.codec.build().to(device)
    objective = VaeLoss(
        codec,
        config.kl,
        reconstruction=config.reconstruction,
        perceptual=config.perceptual,
        adversarial=config.adversarial,
        batch=job.plan.batch,
    )
    pictures = Pictures.open(job.pictures, "train", flip=config.flip)
    averages = resume_and_fit(objective, pictures, job.plan, job.place, device)
    publish_weights(averages["vae"], job.weights)


def _made(config: Config, channels: int) -> tuple[CodecSpec, Codec]:
    if config.codec.kind == "pretrained":
        pretrained: Pretrained = config.codec.build()
        return pretrained.read()
    codec_spec = CodecSpec(config.codec.kind, config.codec.keywords).shaped(channels=channels)
    return codec_spec, codec_spec.build()


def _check_terms(config: Config, height: int, width: int) -> None:
    for name, term in (("perceptual", config.perceptual), ("adversarial", config.adversarial)):
        if term is not None and min(height, width) < term.smallest:
            raise ConfigError(
                f"pictures of {height}x{width} are too small for {name} {spec(term)}; it wants sides of "
                f"{term.smallest} or more"
            )


if __name__ == "__main__":
    run("train_vae", Config, main, out="artifacts/codec", kind="codec")
