"""Stage train_vae: pictures -> the codec that turns them into latents."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_core import bundle
from diffusion_core.codec import Codec, Moments
from diffusion_core.images import encode_png, grid, to_pixels
from diffusion_core.train import Plan
from diffusion_core.vae import CodecSpec, KlCodec, VaeLoss
from pipelines.data.reader import Pictures
from pipelines.fitting import Place, initialize, resume_and_fit
from pipelines.stage import Stage, run

CHUNK = 256  # pictures encoded at once after training
PAIRS = 40  # pictures on the page of reconstructions


@dataclass(frozen=True)
class Config:
    """`codec` pixel needs no training; kl_vae is trained by `plan`, its divergence weighted by `kl`."""

    codec: CodecSpec
    plan: Plan
    kl: float = 1e-3


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Train the codec if it is trainable, normalize its latents and measure what it loses on held-out pictures."""
    folder, data = stage.input("artifacts/data", "data")
    stage.input("artifacts/validation", "validation")
    train, held_out = Pictures.open(folder, "train"), Pictures.open(folder, "val")
    codec_spec = config.codec.shaped(channels=train.shape[0])
    initialize(config.plan.seed)
    codec: Codec = codec_spec.build()
    if isinstance(codec, KlCodec):
        _train(codec, train, config, stage)
    psnr = _reconstruct(codec.eval(), held_out, stage)
    bundle.save_codec(codec, codec_spec, stage.out)
    return {"latent_shape": list(codec.latent_shape(train.shape)), "psnr": psnr, "classes": data.about["classes"]}


def _train(codec: KlCodec, train: Pictures, config: Config, stage: Stage) -> None:
    place = Place(stage.work, stage.tracker.journal, stage.identity(config))
    with stage.following("images seen", config.plan.images):
        averages = resume_and_fit(VaeLoss(codec, config.kl), train, config.plan, place, "cpu")
    codec.load_state_dict(averages["vae"])
    codec.eval().normalize(_moments(codec, train))
    mean, std = (torch.cat(part) for part in zip(*_moments(codec, train), strict=True))
    stage.tracker.metrics({"latent_std": (mean.var() + std.square().mean()).sqrt().item()}, config.plan.images)


@torch.inference_mode()
def _moments(codec: Codec, pictures: Pictures) -> list[Moments]:
    return [codec.encode(pictures.tensor(ids)) for ids in torch.arange(len(pictures)).split(CHUNK)]


@torch.inference_mode()
def _reconstruct(codec: Codec, pictures: Pictures, stage: Stage) -> float:
    """PSNR in dB of held-out pictures through the codec; a page of pairs goes to the tracker."""
    error, count = 0.0, 0
    for ids in torch.arange(len(pictures)).split(CHUNK):
        x = pictures.tensor(ids)
        again = codec.decode(codec.encode(x).mean)
        error += (again.clamp(-1, 1) - x).square().sum().item()
        count += x.numel()
    psnr = 10 * math.log10(4 / max(error / count, 1e-12))
    page = stage.out / "reconstructions.png"
    pairs = torch.stack((x[:PAIRS], again[:PAIRS]), 1).flatten(0, 1)
    page.write_bytes(encode_png(grid(to_pixels(pairs), 10)))
    stage.tracker.artifact(page, "samples")
    stage.tracker.metrics({"psnr": psnr})
    stage.say(f"reconstruction of held-out pictures: {psnr:.1f} dB")
    return psnr


if __name__ == "__main__":
    run("train_vae", Config, main, out="artifacts/codec", kind="codec")
