"""Near-duplicates across the splits: pictures of val whose perceptual hash is close to that of one in train."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data import duplicates
from pipelines.data.claims import FORMS, SPLITS


def twins(table: pa.Table, distance: int) -> pd.DataFrame:
    """Every picture of val and the key of one in train whose hash is within `distance` bits, or nothing.

    Pictures without a well-formed hash are left out: that is another claim's matter.
    """
    formed = table.filter(pc.match_substring_regex(table["phash"], f"^{FORMS['phash']}$"))
    train, val = (formed.filter(pc.equal(formed["split"], split)) for split in SPLITS)
    places = close(_hashes(val["phash"]), _hashes(train["phash"]), distance)
    keys = train["key"].take(pa.array(places, mask=places < 0))
    return pd.DataFrame({"key": val["key"].to_pandas(), "twin": keys.to_pandas()})


def close(asked: NDArray[np.uint64], known: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """For each hash asked for, the place in `known` of one that differs by at most `distance` bits, or -1."""
    values, which = np.unique(np.concatenate([asked, known]), return_inverse=True)
    held = np.full(len(values), -1)
    held[which[len(asked) :]] = np.arange(len(known))
    found = held.copy()
    for pairs in duplicates.pairs(values, distance):
        for here, there in ((pairs.first, pairs.second), (pairs.second, pairs.first)):
            new = (held[there] >= 0) & (found[here] < 0)
            found[here[new]] = held[there[new]]
    return found[which[: len(asked)]]


def _hashes(texts: pa.ChunkedArray) -> NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex("".join(texts.to_pylist())), ">u8").astype(np.uint64)
