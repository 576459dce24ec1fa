"""What the webdataset package reads of our shards, beside what the index says."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffusion_core import manifest
from pipelines.data.exchange import exchanged
from pipelines.data.index import INDEX
from tests.pipelines.data_folder import make, picture, png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "data", [picture(png(n), ("train", "val")[n > 5]) for n in range(8)])


def test_every_picture_is_read_as_it_is(folder: Path) -> None:
    table = pq.read_table(folder / INDEX)
    seen = exchanged(folder, manifest.read(folder), table, 100, 0)
    assert seen["key"].tolist() == table["key"].to_pylist()
    assert seen["read"].tolist() == seen["declared"].tolist() == table["sha256"].to_pylist()
    assert len(exchanged(folder, manifest.read(folder), table, 2, 0)) == 4


def test_what_only_one_side_knows_is_told(folder: Path) -> None:
    table, found = pq.read_table(folder / INDEX), manifest.read(folder)
    lost = exchanged(folder, found, table.slice(1), 100, 0)
    (row,) = lost[lost["read"] != lost["declared"]].itertuples()
    assert (row.key, row.read, row.declared) == (table["key"][0].as_py(), table["sha256"][0].as_py(), "")
    shard = folder / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])  # the package itself may end in silence
    torn = exchanged(folder, found, table, 100, 0)
    assert (torn["read"] != torn["declared"]).sum() >= 5
