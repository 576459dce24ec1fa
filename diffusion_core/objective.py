"""Objectives: which modules are trained, and a loss for each. Regression, distillation and codecs alike."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_core.denoiser import NULL, Condition, Denoiser
from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise, Stream
from diffusion_core.pair import Pair, mix
from diffusion_core.weighting import Times, Weight


class Batch(NamedTuple):
    """This rank's rows of one global batch: samples (B, C, H, W), conditions and the samples' ids (B,)."""

    x: Tensor
    cond: Condition
    ids: Tensor


class Objective(ABC):
    """What `fit` drives. It steps one module at a time, with all the others frozen.

    `modules` are trained, one optimizer each. `carried` are not, but must survive a restart (target networks).
    """

    modules: Mapping[str, nn.Module]
    carried: Mapping[str, nn.Module] = {}

    @abstractmethod
    def losses(self, batch: Batch, step: int, noise: Noise) -> Iterator[tuple[str, Tensor]]:
        """Each module to step and its scalar loss, in order; `noise` is bound to (seed, step, ids)."""

    def after_step(self, step: int) -> None:
        """Called when every module has been stepped, to move targets and annealing on."""
        del step


class Regression(Objective):
    """The whole of DDPM, EDM and flow-matching training: make the network say its reading of the hidden pair.

    The condition is dropped for a share `drop_cond` of the samples, so that guidance has an unconditional
    branch (Ho and Salimans 2022, algorithm 1).
    """

    def __init__(self, denoiser: Denoiser, times: Times, weight: Weight, drop_cond: float = 0.1):
        if not 0 <= drop_cond < 1:
            raise ConfigError(f"drop_cond {drop_cond}: a share in [0, 1) is wanted")
        self.denoiser, self.times, self.weight, self.drop_cond = denoiser, times, weight, drop_cond
        self.modules = {"denoiser": denoiser}

    def losses(self, batch: Batch, step: int, noise: Noise) -> Iterator[tuple[str, Tensor]]:
        t = self.times(noise.uniform((), Stream.TIME)) * self.denoiser.first
        pair = Pair(batch.x, noise.normal(batch.x.shape[1:], Stream.NOISE).to(batch.x))
        level, said = self.denoiser.schedule(t), self.denoiser.target(self.denoiser.schedule, t)
        cond = drop_condition(batch.cond, noise, self.drop_cond)
        seen = self.denoiser(mix(pair, level), t, cond)
        error = (mix(seen, said) - mix(pair, said)).square().flatten(1).mean(1)
        yield "denoiser", (self.weight(level, said).to(error) * error).mean()


def drop_condition(cond: Condition, noise: Noise, share: float) -> Condition:
    """The conditions with about `share` of the labels replaced by "no class"."""
    dropped = noise.uniform((), Stream.DROPOUT) < share
    return {**cond, "label": torch.where(dropped, NULL, cond["label"])}
