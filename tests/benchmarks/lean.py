"""The lean network against the peer's of as many weights: validation loss after equal images, in the same loop.

Real pictures: scikit-learn's 8 px digits, a fifth of them held out. Both networks are trained by `fit` with the same
batches, times and noise, and judged on the held-out digits at fixed times and noise.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from diffusion_core.adapters.unet import read_unet
from diffusion_core.denoiser import Denoiser, Label, Plain, QuarterLogNoise, StepNumber
from diffusion_core.discrete import LinearBetas
from diffusion_core.nets.lean import Lean
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch, Regression
from diffusion_core.order import Order
from diffusion_core.target import EPS
from diffusion_core.train import Plan, begin, fit
from diffusion_core.weighting import Flat, UniformTimes
from tests.benchmarks.timing import Figure
from tests.benchmarks.training import SIZES, peer_net

BATCH, STEPS, SEEDS = 64, 800, (0,)
HELD_OUT = 5  # every fifth


def figures() -> Iterator[Figure]:
    """The lean network's loss over the peer's, for each seed; at most one is wanted."""
    torch.set_num_threads(1)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    held = torch.arange(len(images)) % HELD_OUT == 0
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            peer_net(SIZES["1 M parameters at 8 px"], seed).save_pretrained(folder)
            _, peer = read_unet(Path(folder))
        torch.manual_seed(seed)
        lean = Lean(channels=1, size=8)
        told = ((lean, QuarterLogNoise()), (peer, StepNumber()))  # each what its embedding is made for
        losses = [trained(net, label, images[~held], images[held], seed) for net, label in told]
        name = f"lean network, 1 M parameters at 8 px, validation loss of the peer's, seed {seed}"
        yield Figure(name, losses[0] / losses[1], "x", "<= 1", "diffusers UNet2DModel")
        yield Figure(f"lean network's validation loss, seed {seed}", losses[0], "")
        yield Figure(f"peer network's validation loss, seed {seed}", losses[1], "")


def trained(net: nn.Module, label: Label, images: Tensor, held: Tensor, seed: int) -> float:
    """The mean squared error of the noise said about held-out pictures, after training."""
    denoiser = Denoiser(net, LinearBetas(), EPS(), scale=Plain(), label=label)
    objective = Regression(denoiser, UniformTimes(), Flat(), drop_cond=0.0)
    plan = Plan(images=STEPS * BATCH, batch=BATCH, lr=3e-3, warm_up=100 * BATCH, seed=seed)
    order = Order((len(images),), seed)

    def batches(step: int) -> Batch:
        ids = order.ids(step, BATCH)
        return Batch(images[ids], {}, ids)

    fit(objective, batches, plan, state=begin(objective, plan))
    judged = Batch(held.repeat(8, 1, 1, 1), {}, torch.arange(8 * len(held)))
    with torch.no_grad():
        ((_, loss),) = objective.losses(judged, 0, Noise(12345, judged.ids))
    return loss.item()
