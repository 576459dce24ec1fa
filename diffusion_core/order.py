"""The global order of samples: which ids make up training step k, for any step, at once, on any number of workers.

Epochs are permutations drawn by counting from (seed, epoch), laid end to end; step k takes the next `batch`
ids of that endless row. So the order has no state to save, and a cut in the middle of an epoch resumes
exactly. Every id occurs once an epoch.
"""

from functools import lru_cache

import torch
from torch import Tensor

from diffusion_core.errors import DataError
from diffusion_core.noise import Noise, Stream


class Order:
    """The endless row of ids of a data set of `count` samples."""

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise DataError("an order of no samples: the split is empty")
        self.count, self.seed = count, seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> Tensor:
        draws = Noise(self.seed, torch.arange(self.count), epoch).bits(2, Stream.ORDER)
        return torch.argsort(draws[:, 0] << 31 | draws[:, 1] >> 1, stable=True)

    def ids(self, step: int, batch: int) -> Tensor:
        """The ids (batch,) of global step `step`, int64."""
        start, end = step * batch, (step + 1) * batch
        epochs = range(start // self.count, (end - 1) // self.count + 1)
        row = torch.cat([self.epoch(epoch) for epoch in epochs])
        first = epochs[0] * self.count
        return row[start - first : end - first]
