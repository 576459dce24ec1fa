"""Sources, shards, tables and readers, against scikit-learn, `tarfile`, the webdataset package and plain arithmetic."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from diffusion_core import images, manifest
from diffusion_core.errors import DataError, IntegrityError
from diffusion_core.noise import Noise
from diffusion_core.weights import write_tensors
from pipelines.data import index
from pipelines.data.index import INDEX, PictureRow, RefusalRow
from pipelines.data.reader import Latents, Pictures, read_samples
from pipelines.data.shards import Sample, write_shards
from pipelines.data.sources import Digits, ImageFolder

READ_BY_PEER = """
import json, sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
    print(json.dumps([sample["__key__"], json.loads(sample["json"])["label"], sample["png"].hex()]))
"""


def picture(value: int) -> Sample:
    pixels = np.random.default_rng(value).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    png = images.encode_png(pixels)
    return Sample(png, hashlib.sha256(png).hexdigest(), 8, 8, value % 3, f"made/{value}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures of train in shards of three, two of val, sealed."""
    out = tmp_path_factory.mktemp("data")
    samples = sorted((picture(value) for value in range(9)), key=lambda sample: sample.sha256)
    rows = [*write_shards(out, "train", samples[:7], 3), *write_shards(out, "val", samples[7:], 3)]
    index.write(out / INDEX, PictureRow, rows)
    about = {"classes": ["a", "b", "c"], "resolution": 8, "channels": 1, "counts": {"train": 7, "val": 2}}
    manifest.seal(out, "data", about)
    return out


def in_tars(folder: Path, split: str) -> dict[str, bytes]:
    """Every member by name, as the standard library reads it."""
    members: dict[str, bytes] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    return members


def test_digits_are_those_of_sklearn() -> None:
    feed, oracle = Digits().open(), load_digits()
    items = list(feed.items)
    assert feed.total == len(items) == 1797
    assert feed.classes == tuple("0123456789")
    assert [item.label for item in items] == oracle.target.tolist()
    scans = np.stack([images.decode(item.data, 1)[..., 0] for item in items])
    assert np.array_equal(np.rint(scans / 255 * 16), oracle.images)
    assert (scans.min(), scans.max()) == (0, 255)


def test_an_image_folder_hands_out_the_files_own_bytes(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/deep/a.PNG", "cat/.hidden.png", ".git/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "readme.txt").write_text("beside the class folders")
    feed = ImageFolder(str(tmp_path)).open()
    assert feed.classes == ("cat", "dog")
    assert list(feed.items) == [("cat/deep/a.PNG", 0, b"cat/deep/a.PNG"), ("dog/b.png", 1, b"dog/b.png")]


@pytest.mark.parametrize("made", [None, ".", "cat"], ids=["missing", "no class folder", "empty class folder"])
def test_an_image_folder_without_pictures_is_refused_by_its_path(tmp_path: Path, made: str | None) -> None:
    root = tmp_path / "photos"
    if made:
        (root / made).mkdir(parents=True)
    with pytest.raises(DataError, match=str(root)):
        ImageFolder(str(root)).open()


def test_a_shard_is_plain_tar_with_nothing_of_the_moment_in_it(folder: Path) -> None:
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        *(f"train-0000{n}.tar" for n in range(3)),
        "val-00000.tar",
    ]
    with tarfile.open(folder / "train-00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o444)}
    members = in_tars(folder, "train") | in_tars(folder, "val")
    assert len(members) == 18
    for value in range(9):
        wanted = picture(value)
        assert members[f"{wanted.sha256[:16]}.png"] == wanted.png
        about = {"label": value % 3, "sha256": wanted.sha256, "origin": f"made/{value}"}
        assert json.loads(members[f"{wanted.sha256[:16]}.json"]) == about


def test_webdataset_reads_our_shards(folder: Path) -> None:
    shards = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    command = [sys.executable, "-c", READ_BY_PEER, *shards]
    done = subprocess.run(command, env=os.environ | {"WDS_SECURE": "1"}, capture_output=True, text=True, check=True)
    read = [json.loads(line) for line in done.stdout.splitlines()]
    pictures = Pictures.open(folder, "train")
    assert [key for key, _, _ in read] == list(pictures.keys)
    assert [label for _, label, _ in read] == pictures.labels.tolist()
    assert [bytes.fromhex(png) for _, _, png in read] == [pictures.png(row) for row in range(7)]


def test_random_access_finds_what_tarfile_finds(folder: Path) -> None:
    for split, count in {"train": 7, "val": 2}.items():
        members, pictures = in_tars(folder, split), Pictures.open(folder, split)
        assert len(pictures) == count
        for row in reversed(range(count)):
            assert pictures.png(row) == members[f"{pictures.keys[row]}.png"]


def test_samples_and_batches_are_the_decoded_pictures(folder: Path) -> None:
    samples, pictures = read_samples(folder, "train"), Pictures.open(folder, "train")
    assert samples.images.shape == (7, 8, 8, 1)
    assert samples.keys == tuple(sorted(samples.keys))
    ids = torch.tensor([5, 0, 5])
    batch = pictures.batch(ids, Noise(0, ids))
    oracle = samples.images[ids.numpy()].transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(batch.x.numpy(), oracle, atol=1e-6)
    assert batch.cond["label"].tolist() == samples.labels[ids.numpy()].tolist()
    assert batch.ids is ids


@pytest.mark.parametrize("name", ["train-00001.tar", INDEX])
def test_one_flipped_byte_is_refused_by_file_name(folder: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        read_samples(copy, "train")


def test_an_unknown_split_is_refused_with_those_there_are(folder: Path) -> None:
    with pytest.raises(DataError, match="'vale'.*did you mean 'val'"):
        Pictures.open(folder, "vale")


def test_tables_hold_rows_across_batches_in_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ROWS_AT_ONCE", 3)
    rows = [RefusalRow(f"item {n}", "torn", "0" * 64) for n in range(8)]
    for name in ("a", "b"):
        index.write(tmp_path / name, RefusalRow, iter(rows))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert pq.read_table(tmp_path / "a").to_pylist() == [row._asdict() for row in rows]
    assert index.rows(index.read(tmp_path / "a", RefusalRow), RefusalRow) == rows


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"origin": ["x"], "reason": [3], "sha256": [""]}), tmp_path / "other.parquet")
    with pytest.raises(IntegrityError, match=r"other.parquet.*reason: int64.*wanted.*reason: string"):
        index.read(tmp_path / "other.parquet", RefusalRow)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(IntegrityError, match="torn.parquet"):
        index.read(tmp_path / "torn.parquet", RefusalRow)


def test_latents_are_drawn_from_their_moments(tmp_path: Path) -> None:
    mean, std = torch.tensor([-3.0, 5.0]), torch.tensor([0.5, 2.0])
    spread = [value.reshape(2, 1, 1, 1).expand(2, 4, 8, 8).half() for value in (mean, std)]
    write_tensors(tmp_path / "train.safetensors", {"mean": spread[0], "std": spread[1], "label": torch.tensor([7, 4])})
    manifest.seal(tmp_path, "latents", {"classes": [str(n) for n in range(10)]})
    latents = Latents.open(tmp_path, "train")
    ids = torch.tensor([1, 0] * 64)
    batch = latents.batch(ids, Noise(torch.arange(128), ids))
    assert latents.shape == (4, 8, 8)
    assert batch.x.dtype == torch.float32
    assert batch.cond["label"][:2].tolist() == [4, 7]
    for id_ in (0, 1):
        drawn = batch.x[ids == id_]
        error = std[id_] / drawn.numel() ** 0.5
        assert abs(drawn.mean() - mean[id_]) < 5 * error
        assert abs(drawn.std() - std[id_]) < 5 * error
    assert not torch.equal(batch.x[0], batch.x[2])
    (tmp_path / "train.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match="train.safetensors"):
        Latents.open(tmp_path, "train")
