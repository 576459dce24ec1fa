"""The codec against principal components of as many numbers: PSNR on held-out pictures, and the spread of its latents.

Each codec is trained by `fit`, as the stage does, and judged in float32 on every fifth picture, which it has not seen:

    digits        32 px, params.yaml's plan and network, with one level more and one channel: 16 numbers
    digits        32 px, params.yaml as it stands: 128 numbers. Told only: the digits were enlarged from 8x8 pixels, so
                  that 64 numbers hold them but for rounding, and no codec can be above the components
    photographs   scikit-learn's two, cut into 520 tiles of 32 px RGB: 256 numbers. So few pictures the components learn
                  by heart, and a network that is the same at every place does not; from 20,000 overlapping crops of
                  16 px the two came out level (26.8 dB at 64 numbers)

Components are those of the training pictures' covariance, by numpy in float64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from diffusion_core.images import to_tensor
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch
from diffusion_core.order import Order
from diffusion_core.similarity import psnr
from diffusion_core.spec import build
from diffusion_core.train import Plan, begin, fit
from diffusion_core.vae import CodecSpec, KlCodec, VaeLoss
from pipelines.train_vae import Config
from tests.benchmarks.timing import Figure
from tests.measured import ROOT

HELD_OUT = 5
SIDE = 32
PHOTO_CODEC = {"kind": "kl_vae", "latent": 4, "widths": [16, 32, 64]}
PHOTO_PLAN = Plan(images=12_800, batch=16, lr=3e-3, warm_up=3200, ema=0.99)


class Judged(NamedTuple):
    """Of a trained codec: how many numbers a latent has, PSNR in dB beside that of components, and the latents' std."""

    numbers: int
    codec: float
    components: float
    std: float


def figures() -> Iterator[Figure]:
    """By how many dB the codec is above the components, and how far the latents' standard deviation is from 1."""
    torch.set_num_threads(1)
    config = build(Config, yaml.safe_load((ROOT / "params.yaml").read_text())["train_vae"], "train_vae")
    assert config.plan is not None
    widths = dict(config.codec.keywords)["widths"]
    small = config.codec.extended(latent=1, widths=(*widths, widths[-1]))
    photo = CodecSpec.read(PHOTO_CODEC, "codec")
    yield from told("digits at 32 px", judged(small, config.plan, config.kl, *digits()), ">= 0")
    yield from told("digits at 32 px, params.yaml", judged(config.codec, config.plan, config.kl, *digits()), "")
    yield from told("photographs at 32 px", judged(photo, PHOTO_PLAN, 1e-6, *photographs()), ">= 0")


def told(name: str, found: Judged, bound: str) -> Iterator[Figure]:
    """The rows of one measurement."""
    peer = f"PCA, {found.numbers} components"
    name = f"{name}, latent of {found.numbers} numbers"
    yield Figure(f"{name}: PSNR above that of as many components", found.codec - found.components, "dB", bound, peer)
    yield Figure(f"{name}: PSNR of the codec", found.codec, "dB")
    yield Figure(f"{name}: PSNR of the components", found.components, "dB")
    yield Figure(f"{name}: latent std, distance from 1", abs(found.std - 1), "", "<= 0.05")


def judged(codec_spec: CodecSpec, plan: Plan, kl: float, train: Tensor, held: Tensor) -> Judged:
    """Train a codec on pictures (N, C, H, W) and compare it on others."""
    torch.manual_seed(plan.seed)
    codec: KlCodec = codec_spec.shaped(train.shape[1]).build()
    order, objective = Order((len(train),), plan.seed), VaeLoss(codec, kl)

    def batches(step: int) -> Batch:
        ids = order.ids(step, plan.batch)
        return Batch(train[ids], {}, ids)

    state = begin(objective, plan)
    fit(objective, batches, plan, state=state)
    state.emas["vae"].copy_to(codec)
    codec.eval().requires_grad_(False)
    codec.normalize(codec.raw(x) for x in train.split(256))
    drawn = torch.cat([codec.encode(x).draw(Noise(1, torch.arange(len(x)))) for x in train.split(256)])
    numbers = drawn[0].numel()
    again = torch.cat([codec.decode(codec.encode(x).mean) for x in held.split(256)])
    return Judged(numbers, quality(again, held), quality(components(train, held, numbers), held), drawn.std().item())


def quality(again: Tensor, x: Tensor) -> float:
    """PSNR in dB of all pictures together."""
    return psnr((again.clamp(-1, 1).double() - x).square().mean().item())


def components(train: Tensor, held: Tensor, numbers: int) -> Tensor:
    """Pictures reconstructed from the coordinates in which the training pictures vary most."""
    known = train.flatten(1).double().numpy()
    mean = known.mean(0)
    _, axes = np.linalg.eigh((known - mean).T @ (known - mean))
    axes = axes[:, -numbers:]
    again = (held.flatten(1).double().numpy() - mean) @ axes @ axes.T + mean
    return torch.from_numpy(again).reshape(held.shape)


def digits() -> tuple[Tensor, Tensor]:
    """Digits at 32 px, as the stage `prepare` makes them, to train on and held out."""
    scans = [Image.fromarray(scan) for scan in np.rint(load_digits().images * (255 / 16)).astype(np.uint8)]
    enlarged = [np.asarray(scan.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for scan in scans]
    return parted(to_tensor([one[..., None] for one in enlarged]))


def photographs() -> tuple[Tensor, Tensor]:
    """Tiles of both photographs, side by side, to train on and held out."""
    tiles = [
        photograph[top : top + SIDE, left : left + SIDE]
        for photograph in load_sample_images().images
        for top in range(0, photograph.shape[0] - SIDE + 1, SIDE)
        for left in range(0, photograph.shape[1] - SIDE + 1, SIDE)
    ]
    return parted(to_tensor(tiles))


def parted(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """All but every fifth, and every fifth."""
    held = torch.arange(len(pictures)) % HELD_OUT == 0
    return pictures[~held], pictures[held]
