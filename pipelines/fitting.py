"""Driving `fit` from a stage: resume from the work folder, write the journal, keep checkpoints.

Used by every training stage, in this process or in a Ray worker, so it knows neither Ray nor MLflow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion_core import checkpoint
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch, Objective
from diffusion_core.order import Order
from diffusion_core.parallel import World
from diffusion_core.train import Batches, Plan, begin, fit
from diffusion_core.weights import write_tensors
from pipelines.data.latents import Latents
from pipelines.data.reader import Pictures
from pipelines.tracking import Journal


@dataclass(frozen=True)
class Place:
    """Where one training run keeps itself: absolute paths, and the digest of everything it depends on."""

    work: Path
    journal: Path
    identity: str

    def below(self, name: str) -> "Place":
        """The same run, one part of it in a folder of its own."""
        return Place(self.work / name, self.journal, self.identity)


def resume_and_fit(
    objective: Objective, data: Latents | Pictures, plan: Plan, place: Place, device: str, *, after: int = 0
) -> dict[str, Mapping[str, Tensor]]:
    """Train to the end of the plan from wherever the work folder stands; returns the averaged weights by module.

    Metrics go to the journal by images seen, counted on from `after`.
    """
    world = World.current()
    for module in (*objective.modules.values(), *objective.carried.values()):
        module.to(device)
    state = begin(objective, plan)
    checkpoint.restore(place.work, objective, state, place.identity)
    journal = Journal(place.journal)

    def keep() -> None:
        if world.leads:
            checkpoint.save(place.work, objective, state, place.identity)
        world.wait()

    def tell(metrics: Mapping[str, float], images: int) -> None:
        if world.leads:
            journal.metrics(metrics, after + images)

    done_before = state.step == plan.steps
    rows = batches(data, plan, world, device)
    fit(objective, rows, plan, state=state, world=world, on_metrics=tell, on_checkpoint=lambda _: keep())
    if not done_before:
        keep()
    return {name: ema.average for name, ema in state.emas.items()}


def batches(data: Latents | Pictures, plan: Plan, world: World, device: str) -> Batches:
    """This rank's rows of global batch k, for any k: ids by the global order, all else drawn by (seed, step, id)."""
    order = Order(data.groups, plan.seed)

    def batch(step: int) -> Batch:
        ids = world.rows(order.ids(step, plan.batch))
        x, cond, ids = data.batch(ids, Noise(plan.seed, ids, step))
        return Batch(x.to(device), {key: value.to(device) for key, value in cond.items()}, ids.to(device))

    return batch


def publish_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write the result of a run, on one worker only; all return when it is there."""
    world = World.current()
    if world.leads:
        write_tensors(path, weights)
    world.wait()


def initialize(seed: int) -> None:
    """Seed the initial weights of modules built after this call, the only use of torch's own generator."""
    torch.manual_seed(seed)
