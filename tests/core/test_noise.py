"""Counting randomness: the published vectors of Philox, the laws by scipy, and rows that know nothing of each other."""

import pytest
import torch
from scipy import stats

from diffusion_core.noise import MASK, Noise, philox

KNOWN = {  # the known-answer tests of Random123 for philox4x32, 10 rounds
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN.values(), ids=KNOWN)
def test_philox_gives_the_published_words(counter, key, wanted):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [f"{word:08x}" for word in words.tolist()] == [f"{word:08x}" for word in wanted]


def test_the_counter_is_block_stream_step_id_and_the_key_is_the_seed():
    seed, step, ids, stream = 0xA40938220123ABCD, 77, torch.tensor([5, MASK]), 9
    found = Noise(torch.tensor(seed - 2**64), ids, step).bits(6, stream)
    for row, one in zip(found, ids, strict=True):
        blocks = [
            philox(
                tuple(map(torch.tensor, (block, stream, step, int(one)))),
                (torch.tensor(seed & MASK), torch.tensor(seed >> 32)),
            )
            for block in range(2)
        ]
        assert row.tolist() == torch.cat(blocks)[:6].tolist()


DRAWS = {
    "one row": lambda: Noise([3]).normal((40_000,))[0],
    "over seeds": lambda: Noise(range(40_000)).normal((1,))[:, 0],
    "over ids": lambda: Noise(3, torch.arange(40_000), 5).normal((1,))[:, 0],
    "over steps": lambda: torch.cat([Noise([3], step=step).normal((50,))[0] for step in range(800)]),
    "over streams": lambda: torch.cat([Noise([3]).normal((50,), stream)[0] for stream in range(800)]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_normals_are_normal_and_uniforms_uniform(name):
    drawn = DRAWS[name]().double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert stats.kstest(drawn**2, "chi2", (1,)).pvalue > 1e-3  # the tails, both at once
    assert abs(stats.pearsonr(drawn[1:], drawn[:-1]).statistic) < 4 / len(drawn) ** 0.5


def test_uniforms_are_uniform_and_never_an_end():
    drawn = Noise([1]).uniform((100_000,))[0]
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3
    assert drawn.min() > 0 and drawn.max() < 1
    extremes = (torch.tensor([0, MASK]).double() + 0.5) / 2**32
    assert extremes[0] > 0 and extremes[1] < 1


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_a_row_depends_on_its_own_seed_and_id_alone(draw):
    seeds, ids = torch.tensor([9, 2**40 + 1, -3, 9]), torch.tensor([4, 0, 8, 5])
    together = getattr(Noise(seeds, ids, 6), draw)((3, 5), 2)
    for row, seed, one in zip(together, seeds, ids, strict=True):
        assert torch.equal(getattr(Noise(seed, one[None], 6), draw)((3, 5), 2)[0], row)
    assert len({tuple(row.flatten().tolist()) for row in together}) == 4


def test_seeds_that_differ_only_above_32_bits_differ():
    low, high = Noise([1, 1 + 2**32]).normal((1000,))
    assert abs(stats.pearsonr(low, high).statistic) < 0.15


def test_a_shape_is_only_a_shape():
    assert torch.equal(Noise([1, 2]).normal((2, 3)).flatten(1), Noise([1, 2]).normal((6,)))
    assert Noise([1, 2]).normal((3,)).dtype == torch.float32


def test_one_seed_without_ids_is_one_row() -> None:
    assert torch.equal(Noise(7).normal((3,)), Noise([7]).normal((3,)))
