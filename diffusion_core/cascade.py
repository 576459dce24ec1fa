"""Cascades: a small picture is drawn, then a larger one given it, each by a denoiser of its own.

The larger one's denoiser sees the small picture noised to a level s it is told, in training and in sampling
(Ho et al. 2022, "Cascaded Diffusion Models", arXiv 2106.15282, section 4.2): what the noise hides of a small
picture's faults cannot mislead it. At s = 0 the small picture is believed to the last bit.

    z = αₛ·low + σₛ·w,   high ~ p(high | z, s)

Its network sees both as channels (nets/concatenated.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.denoiser import Condition, QuarterLogNoise, UnitVariance
from diffusion_core.noise import Noise, Stream
from diffusion_core.pair import Pair, mix
from diffusion_core.schedule import Schedule

Draw = Callable[[Noise, Condition], Tensor]  # a sampler: its noise and a condition -> pictures (B, C, H, W)


def augment(low: Tensor, schedule: Schedule, s: Tensor | float, noise: Noise) -> Condition:
    """What a super-resolution network is told of small pictures (B, C, h, w): themselves, noised to s, and how far.

    s (B,) or one for all are times of `schedule`; training draws them at random. Gives {"low": (B, C, h, w),
    "low_level": (B,)}, scaled and labelled as the noisy picture itself is by default (Karras et al. 2022, table 1).
    """
    t = torch.as_tensor(s, dtype=torch.float64, device=low.device).expand(len(low))
    level = schedule(t)
    scale, label = UnitVariance()(level), QuarterLogNoise()(level, t)
    fresh = noise.normal(low.shape[1:], Stream.AUGMENT).to(low)
    noised = mix(Pair(low, fresh), level._replace(a=scale * level.a, b=scale * level.b))
    return {"low": noised, "low_level": label.to(low.dtype)}


@dataclass(frozen=True)
class Finer:
    """One enlargement: the sampler of the larger pictures, and the level to which the smaller ones are noised."""

    draw: Draw
    schedule: Schedule
    s: float


def cascade(
    base: Draw, finer: Sequence[Finer], seeds: Sequence[int] | Tensor, cond: Condition, ids: Tensor | None = None
) -> Tensor:
    """The pictures of the last of a chain of samplers; `seeds` and `ids` as in `Noise`.

    Each stage draws from noise of its own step number, so none repeats what another drew.
    """
    pictures = base(Noise(seeds, ids), cond)
    for number, stage in enumerate(finer, 1):
        noise = Noise(seeds, ids, step=number)
        pictures = stage.draw(noise, {**cond, **augment(pictures, stage.schedule, stage.s, noise)})
    return pictures
