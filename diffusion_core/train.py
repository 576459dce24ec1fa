"""The training loop: pure torch, two hooks, no knowledge of Ray or MLflow.

Time is counted in images. Batches are asked for by step number, so a run resumes by starting at another step.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_core.ema import Ema
from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch, Objective
from diffusion_core.parallel import World
from diffusion_core.precision import Pace, in_channels_last, quickest

Batches = Callable[[int], Batch]


@dataclass(frozen=True)
class Plan:
    """How long, how fast and how carefully to train; lengths are in images."""

    images: int
    batch: int
    lr: float = 1e-3
    warm_up: int = 10_000
    decay: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    log_every: int = 12_800
    checkpoint_every: int = 128_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.images < self.batch:
            raise ConfigError(f"images {self.images}, batch {self.batch}: batch >= 1 and images >= batch are wanted")
        if not (self.lr > 0 and self.clip > 0 and 0 <= self.ema < 1):
            raise ConfigError(
                f"lr {self.lr}, clip {self.clip}, ema {self.ema}: lr > 0, clip > 0, 0 <= ema < 1 are wanted"
            )

    @property
    def steps(self) -> int:
        return self.images // self.batch

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then constant or half a cosine down to zero."""
        warm = min(1.0, (step + 1) * self.batch / max(self.warm_up, 1))
        fall = (1 + math.cos(math.pi * step / self.steps)) / 2 if self.decay == "cosine" else 1.0
        return self.lr * warm * fall


@dataclass
class TrainState:
    """Everything that training changes: weights live in the objective, the rest here. `step` is the next to do."""

    optimizers: dict[str, torch.optim.AdamW]
    emas: dict[str, Ema]
    step: int = 0


def begin(objective: Objective, plan: Plan) -> TrainState:
    """The state before the first step."""
    return TrainState(
        {
            name: torch.optim.AdamW(module.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
            for name, module in objective.modules.items()
        },
        {name: Ema(module, plan.ema) for name, module in objective.modules.items()},
    )


def fit(
    objective: Objective,
    batches: Batches,
    plan: Plan,
    *,
    state: TrainState | None = None,
    world: World | None = None,
    on_metrics: Callable[[Mapping[str, float], int], None] = lambda metrics, images: None,
    on_checkpoint: Callable[[TrainState], None] = lambda state: None,
) -> TrainState:
    """Train from `state` to the end of the plan and return the last state.

    `batches(step)` gives this rank's rows of the global batch. Both hooks are called on every rank:
    `on_metrics` with means over the ranks and the images seen, `on_checkpoint` with the state between two steps.
    """
    state, world = state or begin(objective, plan), world or World.current()
    device = next(next(iter(objective.modules.values())).parameters()).device
    pace = None if plan.precision == "auto" else Pace(plan.precision == "bf16")
    since, begun = _Means(world), time.monotonic()
    log_steps, keep_steps = (max(1, every // plan.batch) for every in (plan.log_every, plan.checkpoint_every))
    while state.step < plan.steps:
        step = state.step
        batch = batches(step)
        noise = Noise(plan.seed, batch.ids, step)
        if pace is None:
            pace = quickest(device, partial(_first_loss, objective, batch, step, noise))
            if pace.channels_last:
                in_channels_last(objective.modules.values())
        with torch.autocast(device.type, torch.bfloat16, enabled=pace.bf16):
            for name, loss in objective.losses(batch, step, noise):
                norm = _update(objective.modules[name], state.optimizers[name], loss, plan, step, world)
                state.emas[name].update(objective.modules[name])
                since.add({f"loss/{name}": loss.detach(), f"gradient_norm/{name}": norm})
        objective.after_step(step)
        state.step += 1
        since.steps += 1
        if state.step % log_steps == 0 or state.step == plan.steps:
            seconds = time.monotonic() - begun
            speed = since.steps * plan.batch / seconds
            on_metrics({**since.take(), "lr": plan.lr_at(step), "images_per_second": speed}, state.step * plan.batch)
            begun = time.monotonic()
        if state.step % keep_steps == 0 and state.step < plan.steps:
            on_checkpoint(state)
    return state


def _first_loss(objective: Objective, batch: Batch, step: int, noise: Noise) -> object:
    return next(iter(objective.losses(batch, step, noise)))


def _update(
    module: nn.Module, optimizer: torch.optim.AdamW, loss: Tensor, plan: Plan, step: int, world: World
) -> Tensor:
    """One optimizer step on the ranks' mean gradient; returns the gradient's norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = plan.lr_at(step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    world.average_gradients(module.parameters())
    norm = nn.utils.clip_grad_norm_(module.parameters(), plan.clip)
    optimizer.step()
    return norm.detach()


class _Means:
    """Means of metrics over the steps since the last report and over the ranks."""

    def __init__(self, world: World):
        self.world, self.sums, self.steps = world, dict[str, Tensor](), 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value

    def take(self) -> dict[str, float]:
        means = self.world.average(torch.stack(list(self.sums.values())) / self.steps)
        taken = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.steps = {}, 0
        return taken
