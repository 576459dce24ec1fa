"""The order of samples: a permutation an epoch, and the same global batches on any number of workers."""

import pytest
import torch

from diffusion_core.errors import ConfigError, DataError
from diffusion_core.order import Order
from diffusion_core.parallel import World


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (10, 10), (7, 20), (1, 3), (1000, 128)])
def test_every_id_once_an_epoch_and_any_step_at_once(count, batch):
    steps = -(-3 * count // batch)
    walked = torch.cat([Order(count, 5).ids(step, batch) for step in range(steps)])[: 3 * count]
    for epoch in walked.split(count):
        assert epoch.sort().values.tolist() == list(range(count))
    assert torch.equal(walked, Order(count, 5).ids(0, 3 * count))  # the batch cuts the row, it does not change it


def test_epochs_and_seeds_differ():
    order = Order(100, 5)
    assert not torch.equal(order.ids(0, 100), order.ids(1, 100))
    assert not torch.equal(order.ids(0, 100), Order(100, 6).ids(0, 100))
    first = torch.stack([Order(4, seed).ids(0, 4) for seed in range(4000)])[:, 0]
    assert (first.bincount() - 1000).abs().max() < 4 * (4000 * 3 / 16) ** 0.5  # no place favours an id


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_share_the_same_global_batch(workers):
    order, whole = Order(50, 1), Order(50, 1)
    for step in range(9):
        shares = [World(rank, workers).rows(order.ids(step, 16)) for rank in range(workers)]
        assert {len(share) for share in shares} == {16 // workers}
        assert torch.equal(torch.cat(shares), whole.ids(step, 16))


def test_refusals():
    with pytest.raises(ConfigError, match="batch of 10 cannot be shared by 4 workers; the nearest that can is 8"):
        World(0, 4).rows(torch.arange(10))
    with pytest.raises(DataError, match="split is empty"):
        Order(0, 1)
