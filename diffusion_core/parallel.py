"""Data parallelism in one idea: every rank computes its rows of the global batch, gradients are averaged.

A `World` of one needs no process group, so the same loop runs alone, under torchrun or under Ray Train.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion_core.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process's place among its equals."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """The world of the running process group, or a world of one."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this rank writes what only one should."""
        return self.rank == 0

    def rows(self, ids: Tensor) -> Tensor:
        """This rank's equal share of the global batch; raises ConfigError if it cannot be shared equally."""
        if len(ids) % self.size:
            near = max(self.size, round(len(ids) / self.size) * self.size)
            raise ConfigError(
                f"a batch of {len(ids)} cannot be shared by {self.size} workers; the nearest that can is {near}"
            )
        return ids.chunk(self.size)[self.rank]

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the ranks, in one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def average(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()
