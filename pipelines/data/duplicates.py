"""Which of many pictures are left out because another one stands for them: equal bytes, or nearly equal hashes.

Pictures are taken in the order of their content: one is left out if an earlier one that is kept is near. So neither the
source's order nor the number of workers matters.
"""

from collections.abc import Iterator
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BITS = 64
MOST = 16  # bits; beyond that unrelated pictures are near each other
SORTING = 20  # a table's cost in comparisons of pairs, for each hash in it


class Pairs(NamedTuple):
    """Places of hashes that differ by at most so many bits, the earlier of each pair in `first`."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distance: NDArray[np.int64]


def equal(sha256: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """For each of some sorted digests the place of the first that is equal, or -1 for that first one itself."""
    places = np.arange(len(sha256))
    new = np.ones(len(sha256), bool)
    new[1:] = sha256[1:] != sha256[:-1]
    return np.where(new, -1, np.maximum.accumulate(np.where(new, places, 0)))


def near(hashes: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """For each hash the place of the kept one because of which it is left out, or -1 if it is kept itself.

    In the order given, a hash is left out if a kept one before it differs by at most `distance` bits; of several the
    nearest that decided counts, then the first. Memory grows with the hashes, not with the pairs between them.
    """
    values, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    first, which = first[order], rank[which]
    decided = _greedy(values[order], distance)
    stands_for = np.where(decided[which] < 0, first[which], first[decided[which]])
    return np.where(stands_for == np.arange(len(hashes)), -1, stands_for)


def distances(hashes: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.int64]:
    """In how many bits hashes differ from others, one by one."""
    return np.bitwise_count(hashes ^ others).astype(np.int64)


def pairs(values: NDArray[np.uint64], distance: int) -> Iterator[Pairs]:
    """All pairs of different hashes at most `distance` bits apart, each once or oftener.

    Cut the bits into distance + k blocks: two such hashes agree in k of them or more (the pigeonhole principle). So
    only hashes that agree in some k blocks are compared, with the k for which that is least work.
    """
    agree = _agreeing(len(values), distance)
    edges = np.linspace(0, BITS, distance + agree + 1).astype(int).tolist()
    blocks = [((1 << high) - 1) ^ ((1 << low) - 1) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    for chosen in combinations(blocks, agree):
        keys = values & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        here, step = np.flatnonzero(keys[1:] == keys[:-1]), 1
        while len(here):
            first, second = order[here], order[here + step]
            apart = distances(values[first], values[second])
            close = apart <= distance
            yield Pairs(first[close], second[close], apart[close])
            step += 1
            here = here[here + step < len(keys)]
            here = here[keys[here + step] == keys[here]]


def _greedy(values: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """As `near`, for hashes that are all different.

    In rounds: a hash with no undecided one near and before it is kept, and all that are near it are left out.
    """
    decided = np.full(len(values), -1)
    never = np.iinfo(np.int64).max
    open_ = np.arange(len(values) if distance else 0)
    while len(open_):
        some = values[open_]
        waits = np.zeros(len(some), bool)
        for found in pairs(some, distance):
            waits[found.second] = True
        if not waits.any():
            break
        best = np.full(len(some), never)
        for found in pairs(some, distance):
            kept = ~waits[found.first]
            np.minimum.at(best, found.second[kept], (found.distance[kept] << 48) + found.first[kept])
        out = best < never
        decided[open_[out]] = open_[best[out] & ((1 << 48) - 1)]
        open_ = open_[waits & ~out]
    return decided


def _agreeing(count: int, distance: int) -> int:
    """How many blocks should agree: the more, the fewer pairs and the more tables."""

    def work(agree: int) -> float:
        blocks = distance + agree
        return comb(blocks, agree) * (SORTING + count / 2 ** (BITS * agree / blocks + 1))

    return min(range(1, 5), key=work)
