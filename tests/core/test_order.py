"""The order of samples: a permutation an epoch, one size a batch, the same global batches on any number of workers."""

from collections import Counter
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.errors import ConfigError, DataError
from diffusion_core.order import Order
from diffusion_core.parallel import World

GROUPS = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (10, 10), (7, 20), (1, 3), (1000, 128)])
def test_every_id_once_an_epoch_and_any_step_at_once(count, batch):
    steps = -(-3 * count // batch)
    walked = torch.cat([Order((count,), 5).ids(step, batch) for step in range(steps)])[: 3 * count]
    for epoch in walked.split(count):
        assert epoch.sort().values.tolist() == list(range(count))
    assert torch.equal(walked, Order((count,), 5).ids(0, 3 * count))  # the batch cuts the row, it does not change it


def test_epochs_and_seeds_differ():
    order = Order((100,), 5)
    assert not torch.equal(order.ids(0, 100), order.ids(1, 100))
    assert not torch.equal(order.ids(0, 100), Order((100,), 6).ids(0, 100))
    first = torch.stack([Order((4,), seed).ids(0, 4) for seed in range(4000)])[:, 0]
    assert (first.bincount() - 1000).abs().max() < 4 * (4000 * 3 / 16) ** 0.5  # no place favours an id


def test_the_order_of_published_runs_stays():
    """A run that was cut before this version must go on with the same batches."""
    assert Order((12,), 7).ids(0, 12).tolist() == [8, 7, 9, 2, 4, 5, 6, 3, 0, 1, 11, 10]
    assert Order((12,), 7).ids(1, 12).tolist() == [2, 5, 7, 10, 0, 8, 3, 11, 1, 6, 4, 9]


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, batch=st.integers(1, 24), epochs=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_a_ledger_of_several_groups(groups, batch, epochs, seed):
    """Walk whole epochs step by step and write down what came; a group is owed a batch whenever one is full."""
    order, firsts = Order(groups, seed), list(accumulate(groups, initial=0))
    came = [list[int]() for _ in groups]
    step = 0
    for epoch in range(1, epochs + 1):
        owed = Counter()
        for group, size in enumerate(groups):
            while len(came[group]) + (owed[group] + 1) * batch <= epoch * size:
                owed[group] += 1
        given_out = Counter()
        for _ in range(owed.total()):
            ids = order.ids(step, batch).tolist()
            owner = next(group for group in owed if firsts[group] <= ids[0] < firsts[group + 1])
            came[owner] += [id_ - firsts[owner] for id_ in ids]
            given_out[owner] += 1
            step += 1
        assert given_out == +owed
    for size, ids in zip(groups, came, strict=True):
        for start in range(0, len(ids), size):
            once = ids[start : start + size]
            assert sorted(once) == list(range(size)) if len(once) == size else len(set(once)) == len(once)
            assert set(once) <= set(range(size))


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, batch=st.integers(1, 24), steps=st.lists(st.integers(0, 10**9), min_size=2, max_size=6))
def test_a_step_does_not_depend_on_what_was_asked_before(groups, batch, steps):
    used = Order(groups, 3)
    for step in steps:
        assert torch.equal(used.ids(step, batch), Order(groups, 3).ids(step, batch))


def test_groups_are_mixed_through_an_epoch():
    order, batch = Order((640, 640), 1), 16
    turns = torch.stack([order.ids(step, batch)[0] // 640 for step in range(80)])
    assert int(turns.sum()) == 40
    runs = int((turns.diff() != 0).sum()) + 1
    assert abs(runs - 41) < 4 * (40 * 39 / 79) ** 0.5  # as many runs as chance makes (Wald and Wolfowitz 1940)
    later = torch.stack([order.ids(step, batch)[0] // 640 for step in range(80, 160)])
    assert not torch.equal(turns, later)


@pytest.mark.parametrize("groups", [(50,), (30, 7, 64)], ids=str)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_share_the_same_global_batch(workers, groups):
    order, whole = Order(groups, 1), Order(groups, 1)
    for step in range(9):
        shares = [World(rank, workers).rows(order.ids(step, 16)) for rank in range(workers)]
        assert {len(share) for share in shares} == {16 // workers}
        assert torch.equal(torch.cat(shares), whole.ids(step, 16))


def test_refusals():
    with pytest.raises(ConfigError, match="batch of 10 cannot be shared by 4 workers; the nearest that can is 8"):
        World(0, 4).rows(torch.arange(10))
    for groups in ((), (0,), (3, 0)):
        with pytest.raises(DataError, match="split is empty"):
            Order(groups, 1)
