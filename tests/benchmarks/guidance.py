"""Guidance: one call of twice the batch, two calls, and what the guide picks by size."""

from collections.abc import Iterator
from functools import partial

import torch

from diffusion_core.denoiser import Denoiser
from diffusion_core.guidance import CFG
from diffusion_core.nets.dit import DiT
from diffusion_core.schedule import Linear
from diffusion_core.target import Velocity
from tests.benchmarks.timing import Figure, alternate, ratio

ROUNDS = 9
EVER = 1 << 40  # more numbers than any batch holds


def figures() -> Iterator[Figure]:
    """How much dearer than the better way the one picked is, and both beside an unguided call."""
    torch.manual_seed(0)
    net = DiT(channels=4, size=16, classes=10, width=192, depth=6, heads=6).eval()
    denoiser = Denoiser(net, Linear(), Velocity())
    for batch in (1, 4, 16, 64):
        x, cond = torch.randn(batch, 4, 16, 16), {"label": torch.zeros(batch, dtype=torch.int64)}
        ways = {
            "one call": CFG(denoiser, 3.0, together=EVER),
            "two calls": CFG(denoiser, 3.0, together=0),
            "picked": CFG(denoiser, 3.0),
            "unguided": denoiser,
            "half the steps": CFG(denoiser, 3.0, (0.0, 0.4)),
        }
        with torch.inference_mode():
            seconds = alternate({way: partial(one, x, 0.5, cond) for way, one in ways.items()}, ROUNDS, 2)
        better = [min(pair) for pair in zip(seconds["one call"], seconds["two calls"], strict=True)]
        yield Figure(
            f"guidance, batch {batch}, picked way of the better", ratio(seconds["picked"], better), "x", "<= 1.1"
        )
        yield Figure(f"guidance, batch {batch}, one call of two", ratio(seconds["one call"], seconds["two calls"]), "x")
        yield Figure(f"guidance, batch {batch}, picked of unguided", ratio(seconds["picked"], seconds["unguided"]), "x")
        outside = ratio(seconds["half the steps"], seconds["unguided"])
        yield Figure(f"guidance, batch {batch}, outside its interval of unguided", outside, "x", "<= 1.1")
