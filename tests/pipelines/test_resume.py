"""A cut and a resume, on other workers too: the same global batches and draws, every sample once a pass."""

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_core.noise import Noise, Stream
from diffusion_core.parallel import World
from diffusion_core.train import Plan
from pipelines.data.reader import Pictures
from pipelines.fitting import batches
from tests.pipelines.data_folder import make, picture, png

PLAN = Plan(images=4 * 30, batch=4, seed=2**40 + 5)  # three epochs: 18 batches of the wide, 12 of the tall
SIZES = ((12, 20),) * 24 + ((16, 16),) * 17


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 24 wide and 17 tall pictures."""
    rows = [picture(png(n, size=(h, w)), height=h, width=w) for n, (h, w) in enumerate(SIZES)]
    return make(tmp_path_factory.mktemp("made") / "data", rows)


class Step(NamedTuple):
    """One global step: ids, pictures, times, noise and whose condition is dropped."""

    ids: Tensor
    x: Tensor
    time: Tensor
    eps: Tensor
    drop: Tensor


def walk(folder: Path, size: int, steps: range) -> Iterator[Step]:
    """The global steps as `size` workers see them, the folder opened anew."""
    pictures = Pictures.open(folder, "train", flip=True)
    workers = [batches(pictures, PLAN, World(rank, size), "cpu") for rank in range(size)]
    for step in steps:
        shares = []
        for worker in workers:
            batch = worker(step)
            noise = Noise(PLAN.seed, batch.ids, step)
            draws = (noise.uniform((), Stream.TIME), noise.normal(batch.x.shape[1:]), noise.uniform((), Stream.DROPOUT))
            shares.append(Step(batch.ids, batch.x, *draws))
        yield Step(*map(torch.cat, zip(*shares, strict=True)))


@pytest.fixture(scope="module")
def undisturbed(made: Path) -> list[Step]:
    return list(walk(made, 1, range(PLAN.steps)))


def test_every_sample_comes_once_a_pass(undisturbed: list[Step], made: Path) -> None:
    came = torch.cat([step.ids for step in undisturbed]).tolist()
    wide, tall = [n for n in came if n < 24], [n for n in came if n >= 24]
    for ids, count, first in ((wide, 24, 0), (tall, 17, 24)):
        assert len(ids) == 3 * count // 4 * 4
        for start in range(0, len(ids) - count + 1, count):
            assert sorted(ids[start : start + count]) == list(range(first, first + count))
        rest = ids[len(ids) // count * count :]
        assert len(set(rest)) == len(rest)


WORKERS = st.sampled_from([1, 2, 4])


@settings(deadline=None, max_examples=50)
@given(first=WORKERS, then=WORKERS, cut=st.integers(0, PLAN.steps), length=st.integers(1, 5))
def test_a_cut_and_a_resume_on_other_workers_change_nothing(
    undisturbed: list[Step], made: Path, first: int, then: int, cut: int, length: int
) -> None:
    begin, end = max(0, cut - length), min(cut + length, PLAN.steps)
    found = [*walk(made, first, range(begin, cut)), *walk(made, then, range(cut, end))]
    assert len(found) == end - begin
    for one, other in zip(found, undisturbed[begin:end], strict=True):
        assert all(map(torch.equal, one, other))


def one_rank(folder: Path, meet: Path, rank: int, said: Path) -> None:
    """One real process of two: what it is handed from step 11 on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    rows = batches(Pictures.open(folder, "train", flip=True), PLAN, World.current(), "cpu")
    seen = [rows(step) for step in range(11, PLAN.steps)]
    dist.barrier()
    dist.destroy_process_group()
    said.write_text(json.dumps([(batch.ids.tolist(), digest(batch.x)) for batch in seen]))


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def test_real_processes_share_the_global_batches(undisturbed: list[Step], made: Path, tmp_path: Path) -> None:
    forks, said = multiprocessing.get_context("fork"), [tmp_path / "0", tmp_path / "1"]
    ranks = [forks.Process(target=one_rank, args=(made, tmp_path / "meet", rank, said[rank])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    for step, *shares in zip(undisturbed[11:], *(json.loads(path.read_text()) for path in said), strict=True):
        halves = zip(step.ids.chunk(2), step.x.chunk(2), strict=True)
        assert shares == [[ids.tolist(), digest(x)] for ids, x in halves]
