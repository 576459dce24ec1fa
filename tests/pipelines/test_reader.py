"""Reading prepared folders, against `tarfile`, Pillow and the webdataset package."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_core import manifest
from diffusion_core.errors import DataError, IntegrityError
from diffusion_core.noise import Noise
from pipelines.data import reader
from pipelines.data.index import INDEX
from pipelines.data.reader import Pictures, Shards, read_samples
from tests.pipelines.data_folder import make, picture, png, reseal, rows_of, write

SHARD = "train-00000.tar"
READ_BY_PEER = """
import json, sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
    print(json.dumps([sample["__key__"], sample["png"].hex()]))
"""


def shaped(seed: int, height: int, width: int, split: str = "train", **more: object) -> dict:
    return picture(png(seed, size=(height, width)), split, height=height, width=width, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 wide and 17 tall pictures to train on, 3 held out; some with a caption, some without a class."""
    rows = [shaped(n, 12, 20, label=n % 3 - 1, caption=f"wide Ünïcode {n}" if n % 2 else None) for n in range(24)]
    rows += [shaped(100 + n, 16, 16, label=n % 2) for n in range(17)]
    rows += [shaped(200 + n, 16, 16, split="val") for n in range(3)]
    return make(tmp_path_factory.mktemp("made") / "data", rows, classes=["a", "b"])


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(made, tmp_path / "data")


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the files at every use instead of once a second."""
    monkeypatch.setattr(reader, "LOOK_EVERY", -1.0)


def in_tar(folder: Path, name: str) -> dict[str, bytes]:
    with tarfile.open(folder / name) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_every_column_is_that_of_the_index(made: Path) -> None:
    rows = [row for row in rows_of(made) if row["split"] == "train"]
    pictures = Pictures.open(made, "train")
    assert len(pictures) == 41 and pictures.classes == ("a", "b")
    assert (
        pictures.groups == (24, 17) and pictures.shapes == ((3, 12, 20), (3, 16, 16)) and pictures.shape == (3, 12, 20)
    )
    assert list(pictures.keys) == [pictures.keys[n] for n in range(41)] == [row["key"] for row in rows]
    assert list(pictures.sha256s) == [row["sha256"] for row in rows]
    assert pictures.labels.dtype == torch.int64 and pictures.labels.tolist() == [row["label"] for row in rows]
    ids = torch.tensor([40, 3, 3, 0, 12])
    assert pictures.captions(ids) == [rows[n]["caption"] for n in ids.tolist()]
    assert any(pictures.captions(torch.arange(41))) and len(pictures.keys) == 41


def test_random_access_finds_what_tarfile_finds(made: Path) -> None:
    members, pictures = in_tar(made, SHARD), Pictures.open(made, "train")
    for row in reversed(range(len(pictures))):
        assert pictures.png(row) == members[f"{pictures.keys[row]}.png"]
        assert np.array_equal(pictures.pixels(row), np.asarray(Image.open(io.BytesIO(pictures.png(row)))))


def test_the_webdataset_package_reads_the_same(made: Path) -> None:
    command = [sys.executable, "-c", READ_BY_PEER, str(made / SHARD)]
    done = subprocess.run(command, env=os.environ | {"WDS_SECURE": "1"}, capture_output=True, text=True, check=True)
    read = [json.loads(line) for line in done.stdout.splitlines()]
    pictures = Pictures.open(made, "train")
    assert [key for key, _ in read] == list(pictures.keys)
    assert [bytes.fromhex(data) for _, data in read] == [pictures.png(row) for row in range(len(pictures))]


def test_a_batch_is_the_decoded_pictures(made: Path) -> None:
    pictures, ids = Pictures.open(made, "train"), torch.tensor([5, 0, 5, 23])
    batch = pictures.batch(ids, Noise(0, ids))
    oracle = np.stack([np.asarray(Image.open(io.BytesIO(pictures.png(n)))) for n in ids.tolist()])
    np.testing.assert_allclose(batch.x.numpy(), oracle.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert batch.cond["label"].tolist() == pictures.labels[ids].tolist() and batch.ids is ids
    with pytest.raises(DataError, match=r"several shapes, \[\(3, 12, 20\), \(3, 16, 16\)\]"):
        pictures.tensor(torch.tensor([23, 24]))


def test_half_of_the_pictures_are_mirrored_by_seed_step_and_id(made: Path) -> None:
    plain, flipping, ids = Pictures.open(made, "train"), Pictures.open(made, "train", flip=True), torch.arange(24)
    straight = plain.tensor(ids)
    turned = []
    for step in range(40):
        x = flipping.batch(ids, Noise(9, ids, step)).x
        mirrored = [
            torch.equal(a, torch.from_numpy(b.numpy()[..., ::-1].copy())) for a, b in zip(x, straight, strict=True)
        ]
        assert [torch.equal(a, b) for a, b in zip(x, straight, strict=True)] == [not one for one in mirrored]
        again = flipping.batch(ids[7:9], Noise(9, ids[7:9], step)).x  # whatever else is in the batch
        assert torch.equal(again, x[7:9])
        turned += mirrored
    assert abs(sum(turned) - 480) < 4 * (960 / 4) ** 0.5


def test_a_whole_split_comes_as_squares(made: Path) -> None:
    samples = read_samples(made, "train")
    assert samples.images.shape == (41, 16, 16, 3) and samples.keys == tuple(Pictures.open(made, "train").keys)
    square = Pictures.open(made, "train").pixels(30)
    assert np.array_equal(samples.images[30], square)
    wide = Image.open(io.BytesIO(Pictures.open(made, "train").png(3)))
    oracle = np.asarray(wide.crop((4, 0, 16, 12)).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(samples.images[3], oracle)


def test_an_unknown_split_is_refused_with_those_there_are(made: Path) -> None:
    with pytest.raises(DataError, match="'vale'.*did you mean 'val'"):
        Pictures.open(made, "vale")


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_one_flipped_byte_is_refused_by_file_name(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{name} has SHA-256"):
        read_samples(folder, "train")


def test_a_published_shard_cut_anywhere_is_refused(folder: Path) -> None:
    """Also where the walk over its headers has nothing to say: in the zeros after its end mark."""
    found, whole = manifest.read(folder), (folder / SHARD).read_bytes()
    with tarfile.open(folder / SHARD) as tar:
        edges = [
            place for member in tar for place in (member.offset, member.offset_data, member.offset_data + member.size)
        ]
    cuts = {len(whole) * number // 201 for number in range(201)} | {len(whole) - 1, len(whole) - 512}
    for cut in sorted(cuts | {edge + beside for edge in edges for beside in (-1, 0, 1) if edge + beside >= 0}):
        (folder / SHARD).write_bytes(whole[:cut])
        with pytest.raises(IntegrityError, match=rf"{SHARD} has {cut} bytes"):
            Shards(folder, found).view(SHARD)


def test_a_file_that_is_missing_or_not_listed_is_named(folder: Path) -> None:
    found = manifest.read(folder)
    (folder / "train-00001.tar").write_bytes(b"planted")
    with pytest.raises(IntegrityError, match=r"does not list 'train-00001.tar'.*did you mean 'train-00000.tar'"):
        Shards(folder, found).view("train-00001.tar")
    (folder / SHARD).unlink()
    with pytest.raises(IntegrityError, match=rf"{SHARD} is missing"):
        Shards(folder, found).view(SHARD)


def test_a_picture_that_does_not_decode_is_named_by_shard_and_key(tmp_path: Path) -> None:
    torn = png(1)[:-30]
    folder = make(tmp_path / "data", [picture(png(0)), picture(torn)])
    pictures = Pictures.open(folder, "train")
    key = hashlib.sha256(torn).hexdigest()[:16]
    with pytest.raises(DataError, match=rf"{SHARD}: {key} is truncated"):
        pictures.tensor(torch.arange(2))


def test_a_picture_of_another_size_than_the_index_says_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", [picture(png(0))])
    write(folder / INDEX, [row | {"height": 8} for row in rows_of(folder)])
    reseal(folder)
    with pytest.raises(DataError, match=r"is 16x16, and index.parquet says 8x16"):
        Pictures.open(folder, "train").pixels(0)


@pytest.mark.parametrize("way", ["in place", "by rename", "gone"])
def test_a_shard_replaced_in_the_middle_of_an_epoch_stops_it(folder: Path, way: str, watchful: None) -> None:
    """Also when every picture has been decoded before, so that nothing of it would be read any more."""
    pictures, ids = Pictures.open(folder, "train"), torch.arange(24)
    assert torch.equal(pictures.tensor(ids), pictures.tensor(ids))
    data = bytearray((folder / SHARD).read_bytes())
    data[-3000] ^= 1
    if way == "in place":
        (folder / SHARD).write_bytes(data)
    elif way == "by rename":
        (folder / "other").write_bytes(data)
        (folder / "other").replace(folder / SHARD)
    else:
        (folder / SHARD).unlink()
    with pytest.raises(IntegrityError, match=SHARD):
        pictures.tensor(ids)


def test_a_shard_cut_off_while_it_is_mapped_ends_nobody_by_a_signal(folder: Path) -> None:
    """Without waiting for the next look: to touch a mapped page that is gone would be the end."""
    pictures = Pictures.open(folder, "train")
    pictures.png(0)
    os.truncate(folder / SHARD, 1000)
    with pytest.raises(IntegrityError, match=f"{SHARD} has 1000 bytes"):
        pictures.png(40)


def test_the_same_bytes_put_in_place_again_are_accepted(folder: Path, watchful: None) -> None:
    pictures, ids = Pictures.open(folder, "train"), torch.arange(24)
    before = pictures.tensor(ids)
    shutil.copyfile(folder / SHARD, folder / "other")
    (folder / "other").replace(folder / SHARD)
    assert torch.equal(pictures.tensor(ids), before)


def test_files_are_looked_at_once_in_a_while_and_hashed_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, hashed, looks = manifest.read(made), [], []
    of = reader.Stamp.of
    monkeypatch.setattr(reader, "sha256", lambda view: hashed.append(len(view)) or hashlib.sha256(view))
    monkeypatch.setattr(reader.Stamp, "of", lambda path: looks.append(path.name) or of(path))
    shards = Shards(made, found, most=1)
    names = [SHARD, "val-00000.tar"]
    for name in [SHARD] * 100 + names * 3:
        assert bytes(shards.view(name)) == (made / name).read_bytes()
        assert len(shards.mapped) == 1
    assert sorted(hashed) == sorted((made / name).stat().st_size for name in names)
    assert len(looks) == 6  # a hundred times one, then by turns


def test_a_row_costs_numbers_alone(tmp_path: Path) -> None:
    """No Python object a row: those would be hundreds of bytes."""
    one, count = shaped(0, 16, 16), 40_000
    folder = make(tmp_path / "data", [one])
    write(folder / INDEX, rows_of(folder) * count)
    reseal(folder)
    tracemalloc.start()
    pictures = Pictures.open(folder, "train")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pictures) == count and used / count < 64
