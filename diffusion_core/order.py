"""The global order of samples: which ids make up training step k, for any step, at once, on any number of workers.

The samples stand in groups, those of one group being of one size, and a batch takes its samples from one group. The
passes through a group are permutations drawn by counting from (seed, pass), laid end to end and cut into batches: every
id occurs once a pass. With n_g samples in group g, epoch e has the batches of g from floor(e n_g / B) on, up to
floor((e + 1) n_g / B), and which group comes when is drawn by counting from (seed, epoch). So the order has no state to
save, a cut in the middle of an epoch resumes exactly, and far steps cost no more than near ones.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from diffusion_core.errors import DataError
from diffusion_core.noise import Noise, Stream


class Order:
    """The endless row of batches of a data set whose groups have `groups` samples each, with consecutive ids.

    Raises DataError if there is no group, or one without samples.
    """

    def __init__(self, groups: Sequence[int], seed: int):
        if min(groups, default=0) < 1:
            raise DataError(f"an order of the groups {list(groups)}: the split is empty, or a group of it")
        self.groups, self.seed = tuple(groups), seed
        *self.firsts, self.count = accumulate(groups, initial=0)
        self.through = lru_cache(maxsize=2 * len(self.groups))(self._through)
        self.turns = lru_cache(maxsize=2)(self._turns)

    def ids(self, step: int, batch: int) -> Tensor:
        """The ids (batch,) of global step `step`, int64, all of one group."""
        # The whole parts taken off are below one batch a group, so the epoch is at most so many batches further on.
        furthest = (step + len(self.groups)) * batch // self.count + 2
        epoch = bisect_right(range(furthest), step, key=lambda epoch: sum(self._done(epoch, batch))) - 1
        done = self._done(epoch, batch)
        group, turn = self.turns(epoch, batch)[step - sum(done)].tolist()
        return self._cut(group, (done[group] + turn) * batch, batch)

    def _done(self, epoch: int, batch: int) -> list[int]:
        """How many batches each group has given before an epoch."""
        return [epoch * size // batch for size in self.groups]

    def _turns(self, epoch: int, batch: int) -> Tensor:
        """For each batch of an epoch (n, 2): its group, and how many of that group came before it in this epoch."""
        before, after = self._done(epoch, batch), self._done(epoch + 1, batch)
        sizes = torch.tensor(after) - torch.tensor(before)
        sorted_turns = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        numbers = torch.arange(len(sorted_turns))
        within = numbers - (sizes.cumsum(0) - sizes)[sorted_turns]
        # Ids beyond those of the samples, so that no sample's place is drawn by the same numbers.
        groups = sorted_turns[self._shuffled(self.count + numbers, epoch)]
        turns = torch.empty_like(groups)
        turns[torch.argsort(groups, stable=True)] = within
        return torch.stack((groups, turns), 1)

    def _cut(self, group: int, start: int, length: int) -> Tensor:
        """Ids of a group's endless row, from `start` on."""
        size, end = self.groups[group], start + length
        passes = range(start // size, (end - 1) // size + 1)
        return torch.cat([self.through(group, n)[max(start - n * size, 0) : end - n * size] for n in passes])

    def _through(self, group: int, number: int) -> Tensor:
        """The ids of a group in the order of one pass."""
        ids = self.firsts[group] + torch.arange(self.groups[group])
        return ids[self._shuffled(ids, number)]

    def _shuffled(self, ids: Tensor, number: int) -> Tensor:
        draws = Noise(self.seed, ids, number).bits(2, Stream.ORDER)
        return torch.argsort(draws[:, 0] << 31 | draws[:, 1] >> 1, stable=True)
