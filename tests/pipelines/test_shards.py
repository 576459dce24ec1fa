"""Shards, against `tarfile` and the webdataset package: plain tar, with nothing of the moment in it."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from diffusion_core import images
from pipelines.data.index import PictureRow
from pipelines.data.shards import shard_name, write_shard

READ_BY_PEER = """
import json, sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
    print(json.dumps([sample["__key__"], json.loads(sample["json"]), sample["png"].hex()]))
"""


def picture(value: int, side: int = 8) -> tuple[PictureRow, bytes]:
    pixels = np.random.default_rng(value).integers(0, 256, (side, side, 1), dtype=np.uint8)
    png = images.encode_png(pixels)
    sha256 = hashlib.sha256(png).hexdigest()
    caption = (None, "naïve 🖼", 'quoted " \n')[value % 3]
    said = (value % 3 - 1, caption, "0" * 16, None, None, f"made/{value}")
    return PictureRow(sha256[:16], "train", "", 0, len(png), sha256, side, side, *said), png


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PictureRow], list[bytes]]:
    """Seven pictures of different lengths."""
    path = tmp_path_factory.mktemp("shards") / "train-00000.tar"
    pictures = [picture(value, 8 + 5 * value) for value in range(7)]
    return path, list(write_shard(path, pictures)), [png for _, png in pictures]


def test_rows_tell_where_each_png_lies(shard: tuple[Path, list[PictureRow], list[bytes]]) -> None:
    path, rows, pngs = shard
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
    assert list(members) == [name for row in rows for name in (f"{row.key}.json", f"{row.key}.png")]
    for row, png in zip(rows, pngs, strict=True):
        member = members[f"{row.key}.png"]
        assert (row.shard, row.offset, row.size) == (path.name, member.offset_data, member.size)
        assert path.read_bytes()[row.offset : row.offset + row.size] == png


def test_a_shard_is_what_tarfile_would_write(shard: tuple[Path, list[PictureRow], list[bytes]], tmp_path: Path) -> None:
    path, _, _ = shard
    with tarfile.open(path) as tar, tarfile.open(tmp_path / "again", "w", format=tarfile.USTAR_FORMAT) as again:
        for member in tar:
            plain = tarfile.TarInfo(member.name)
            plain.size, plain.mode = member.size, 0o444
            again.addfile(plain, tar.extractfile(member))
    wanted = (tmp_path / "again").read_bytes()
    end = path.stat().st_size
    assert path.read_bytes() == wanted[:end]
    assert wanted[end - 1024 :].count(0) == len(wanted) - end + 1024  # two blocks of zeros end both


def test_the_metadata_says_what_is_known(shard: tuple[Path, list[PictureRow], list[bytes]]) -> None:
    path, rows, _ = shard
    with tarfile.open(path) as tar:
        said = [json.loads(tar.extractfile(f"{row.key}.json").read()) for row in rows]
    first = {"label": None, "origin": "made/0", "sha256": rows[0].sha256}
    second = {"label": 0, "origin": "made/1", "sha256": rows[1].sha256, "caption": "naïve 🖼"}
    assert said[:2] == [first, second]


def test_webdataset_reads_our_shards(shard: tuple[Path, list[PictureRow], list[bytes]]) -> None:
    path, rows, pngs = shard
    command = [sys.executable, "-c", READ_BY_PEER, str(path)]
    done = subprocess.run(command, env=os.environ | {"WDS_SECURE": "1"}, capture_output=True, text=True, check=True)
    read = [json.loads(line) for line in done.stdout.splitlines()]
    assert [key for key, _, _ in read] == [row.key for row in rows]
    assert [said.get("caption") for _, said, _ in read] == [row.caption for row in rows]
    assert [bytes.fromhex(png) for _, _, png in read] == pngs


def test_names_tell_the_size_where_there_are_several() -> None:
    assert shard_name("val", None, 3) == "val-00003.tar"
    assert shard_name("train", (48, 80), 123456) == "train-48x80-123456.tar"
