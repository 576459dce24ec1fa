"""What a sampling loop costs a step, apart from the network: ours and the schedulers of diffusers.

Both run the same steps around a network that only halves its input; the time of as many calls of that network alone
is taken off. The last rows hold ours against one call of a real small network.
"""

import statistics
from collections.abc import Callable, Iterator

import diffusers
import torch
from torch import Tensor, nn

from diffusion_core.denoiser import Denoiser, Plain, StepNumber
from diffusion_core.discrete import LinearBetas
from diffusion_core.grid import Trailing
from diffusion_core.multistep import Multistep, UniPC
from diffusion_core.sampler import sample
from diffusion_core.solver import FirstOrder, Solver
from diffusion_core.target import EPS
from tests.benchmarks.timing import Figure, alternate

PEERS: dict[str, tuple[str, Solver, int, float]] = {
    "DDIM": ("DDIMScheduler", FirstOrder(), 50, 1 / 5),
    "DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", Multistep(), 20, 1 / 8),
    "UniPC": ("UniPCMultistepScheduler", UniPC(2), 20, 1 / 8),
}
SHAPES = ((1, 3, 32, 32), (16, 3, 32, 32), (1, 4, 64, 64), (16, 4, 64, 64))
ROUNDS = 15


class Halving(nn.Module):
    """A network that costs one multiplication; it answers as ours and as the peer's do."""

    def forward(self, x: Tensor, c: Tensor, cond: object = None) -> Tensor:
        return x * 0.5


def figures() -> Iterator[Figure]:
    """Cost a step over the network's, and its share of the peer's."""
    ours = {}
    for shape in SHAPES:
        for name, (peer, solver, steps, bound) in PEERS.items():
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            with torch.inference_mode():
                seconds = alternate(
                    {"ours": loop(solver, steps, x), "peer": peer_loop(peer, steps, x), "net": calls(steps, x)},
                    ROUNDS,
                    warm_up=3,
                )
            left = {
                who: [(a - b) / steps for a, b in zip(seconds[who], seconds["net"], strict=True)]
                for who in ("ours", "peer")
            }
            share = statistics.median(a / b for a, b in zip(left["ours"], left["peer"], strict=True))
            size = "x".join(map(str, shape))
            ours[name, shape] = statistics.median(left["ours"])
            yield Figure(f"{name} loop, {size}, of the peer's", share, "x", f"<= {bound:g}", f"diffusers {peer}")
            yield Figure(f"{name} loop, {size}", 1e6 * ours[name, shape], "us a step")
            yield Figure(f"{name} loop, {size}, peer", 1e6 * statistics.median(left["peer"]), "us a step")
    for batch in (1, 16):
        net = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=32,
        ).eval()
        x, t = torch.randn(batch, 1, 8, 8), torch.full((batch,), 10)
        with torch.inference_mode():
            one = statistics.median(alternate({"net": lambda net=net, x=x, t=t: net(x, t)}, ROUNDS, 3)["net"])
        for name in PEERS:
            share = 100 * ours[name, (batch, 3, 32, 32)] / one
            yield Figure(f"{name} loop of a 1 M-parameter network's step, batch {batch}", share, "%", "<= 1")


def loop(solver: Solver, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """Our loop, from the grid on."""
    schedule = LinearBetas()
    denoiser = Denoiser(Halving(), schedule, EPS(), scale=Plain(), label=StepNumber())

    def run() -> Tensor:
        return sample(denoiser, x, Trailing().levels(schedule, steps), solver)

    return run


def peer_loop(name: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """The peer's loop as its documentation shows it."""
    scheduler, net = getattr(diffusers, name)(), Halving()

    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(net(scheduler.scale_model_input(y, t), t), t, y).prev_sample
        return y

    return run


def calls(steps: int, x: Tensor) -> Callable[[], None]:
    """The network alone, as often."""
    net, c = Halving(), torch.zeros(len(x))

    def run() -> None:
        for _ in range(steps):
            net(x, c)

    return run
