"""How far a data set moved from an earlier one: one number for each column's distribution, zero for equal ones."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data.claims import Drift
from pipelines.data.measures import histogram


def drifted(now: pa.Table, before: pa.Table, names: tuple[Sequence[str], Sequence[str]], bounds: Drift) -> pd.DataFrame:
    """How far each distribution is from the reference's, beside its bound; `names` are the classes' now and before."""
    known = ["", *sorted({*names[0], *names[1]})]  # the first is for no label
    labels = []
    for table, own in zip((now, before), names, strict=True):
        held = dict(zip(["", *own], histogram(table["label"], len(own)), strict=True))
        labels.append(np.array([held.get(name, 0) for name in known]))
    found = {"label": stability_index(*labels)}
    for name in ("width", "height", "size"):
        found[name] = distance(*(_numbers(table[name]) for table in (now, before)))
    found["caption_length"] = distance(*(_numbers(pc.utf8_length(table["caption"])) for table in (now, before)))
    rows = [(name, value, getattr(bounds, name)) for name, value in found.items()]
    return pd.DataFrame(rows, columns=["distribution", "found", "bound"])


def stability_index(now: NDArray[np.int64], before: NDArray[np.int64]) -> float:
    """The population stability index of two rows of counts a category, sum (p - q) ln(p / q), in nats.

    It is Jeffreys' divergence (1946), and is symmetric. An empty category counts as half a sample, so that it stays
    finite.
    """
    p, q = (np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum() for counts in (now, before))
    return float(((p - q) * np.log(p / q)).sum())


def distance(now: NDArray[np.float64], before: NDArray[np.float64]) -> float:
    """The two-sample Kolmogorov-Smirnov distance: the largest gap between the empirical distribution functions.

    It is in [0, 1]; 1 where only one side has samples, 0 where neither has.
    """
    if not len(now) or not len(before):
        return float(len(now) != len(before))
    everywhere = np.concatenate([now, before])
    below = [np.searchsorted(np.sort(sample), everywhere, "right") / len(sample) for sample in (now, before)]
    return float(np.abs(below[0] - below[1]).max())


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return column.drop_null().to_numpy().astype(np.float64)
