"""A training step: ours and the peer's documented loop, on the peer's network and on ours of the same architecture.

The peer: diffusers' unconditional training loop (AdamW, EMAModel, DDPMScheduler.add_noise, clipping), eager and in
float32 as it comes. Ours: `fit` as the stages call it, with its counted noise, its average and its metrics, the
format chosen by size. Both start from the same weights. The compiled rows put torch.compile around our network.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusion_core.adapters.unet import read_unet
from diffusion_core.denoiser import Denoiser, Plain, StepNumber
from diffusion_core.discrete import LinearBetas
from diffusion_core.nets.lean import Lean
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch, Regression
from diffusion_core.precision import in_channels_last, quickest
from diffusion_core.target import EPS
from diffusion_core.train import Plan, begin, fit
from diffusion_core.weighting import Flat, UniformTimes
from tests.benchmarks.timing import Figure, alternate, ratio

BATCH = 64


class Size(NamedTuple):
    """A network of the peer's: picture side and channels, level widths, and how often it is timed."""

    side: int
    channels: int
    widths: tuple[int, ...]
    rounds: int
    bound: str


SIZES = {
    "1 M parameters at 8 px": Size(8, 1, (32, 64), 9, ">= 1.05"),
    "1 M parameters at 16 px": Size(16, 3, (32, 64), 7, ">= 1.05"),
    "16 M parameters at 32 px": Size(32, 3, (64, 128, 256), 3, ">= 2"),
}


def figures() -> Iterator[Figure]:
    """How many of our steps go into one of the peer's."""
    for name, size in SIZES.items():
        x = pictures(size)
        with tempfile.TemporaryDirectory() as folder:
            net = peer_net(size)
            net.save_pretrained(folder)
            _, ours = read_unet(Path(folder))
        variants = {"peer": peer_step(net, x), "ours": our_step(ours, x)}
        if size.side < 32:
            variants["lean"] = our_step(Lean(channels=size.channels, size=size.side), x)
        if size.side == 8:
            variants["compiled"] = our_step(deepcopy(ours), x, compiled=True)
        seconds = alternate(variants, size.rounds, 2)
        yield Figure(
            f"{name}, same network", ratio(seconds["peer"], seconds["ours"]), "x", size.bound, "diffusers, eager"
        )
        if "compiled" in seconds:
            faster = ratio(seconds["peer"], seconds["compiled"])
            yield Figure(f"{name}, same network, compiled", faster, "x", ">= 1.2", "diffusers, eager")
        if "lean" in seconds:
            faster = ratio(seconds["peer"], seconds["lean"])
            yield Figure(f"{name}, lean network", faster, "x", ">= 2", "diffusers, eager")
        yield Figure(f"{name}, peer", 1e3 * statistics.median(seconds["peer"]), "ms a step")


def pictures(size: Size) -> Tensor:
    """One batch, always the same."""
    return torch.randn(BATCH, size.channels, size.side, size.side, generator=torch.Generator().manual_seed(0))


def peer_net(size: Size, seed: int = 0) -> nn.Module:
    """The peer's U-Net with attention on all levels but the first."""
    torch.manual_seed(seed)
    inner = len(size.widths) - 1
    return diffusers.UNet2DModel(
        sample_size=size.side,
        in_channels=size.channels,
        out_channels=size.channels,
        layers_per_block=2,
        block_out_channels=size.widths,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * inner),
        up_block_types=(*["AttnUpBlock2D"] * inner, "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    )


def peer_step(net: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step of the peer's training script."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6)
    average = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def step() -> None:
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        loss = F.mse_loss(net(scheduler.add_noise(x, noise, t), t).sample, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(net.parameters())
        loss.detach().item()

    return step


def our_step(net: nn.Module, x: Tensor, *, compiled: bool = False) -> Callable[[], None]:
    """One step of `fit`, going on from the last; the format is chosen before the first."""
    denoiser = Denoiser(net, LinearBetas(), EPS(), scale=Plain(), label=StepNumber())
    objective = Regression(denoiser, UniformTimes(), Flat(), drop_cond=0.0)
    batch = Batch(x, {}, torch.arange(BATCH))
    pace = quickest(x.device, lambda: next(objective.losses(batch, 0, Noise(0, batch.ids))))
    if pace.channels_last:
        in_channels_last([denoiser])
    plan = Plan(
        images=BATCH, batch=BATCH, lr=1e-4, precision="bf16" if pace.bf16 else "fp32", log_every=BATCH, ema=0.9999
    )
    state = begin(objective, plan)
    if compiled:
        net.compile()

    def step() -> None:
        state.step = 0
        fit(objective, lambda step: batch, plan, state=state)

    return step
