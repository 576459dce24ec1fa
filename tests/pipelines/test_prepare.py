"""Prepare, against scikit-learn, Pillow and the standard library; equal content must give equal bytes."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

from diffusion_core import manifest
from diffusion_core.errors import ConfigError, DataError
from diffusion_core.spec import build
from pipelines import prepare
from pipelines.data import index
from pipelines.data.index import INDEX, QUARANTINE, PictureRow, RefusalRow
from pipelines.data.reader import Pictures, read_samples
from pipelines.data.sources import Feed, ImageFolder, Item, Source
from pipelines.stage import Stage
from pipelines.tracking import Tracker

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Backwards(Source):
    """An image folder listed from its end."""

    path: str

    def open(self) -> Feed:
        feed = ImageFolder(self.path).open()
        return feed._replace(items=reversed(list(feed.items)))


def prepared(out: Path, **params: Any) -> Path:
    """What the stage publishes for these params."""
    config = build(prepare.Config, {"channels": 1, "shard_samples": 400} | params, "prepare")
    out.mkdir(parents=True)
    stage = Stage("prepare", out, out, create_autospec(Tracker, instance=True), Console(quiet=True))
    about = prepare.main(config, stage)
    manifest.seal(out, "data", about, samples=stage.samples)
    return out


def refusals(folder: Path) -> dict[str, str]:
    rows = index.rows(index.read(folder / QUARANTINE, RefusalRow), RefusalRow)
    return {row.origin: row.reason for row in rows}


def pictures_in(folder: Path) -> list[PictureRow]:
    return index.rows(index.read(folder / INDEX, PictureRow), PictureRow)


def encoded(value: int, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten pictures each, in all three formats."""
    root = tmp_path / "photos"
    for value in range(20):
        form = ("PNG", "JPEG", "WEBP")[value % 3]
        path = root / ("cat", "dog")[value // 10] / f"{value:02d}.{form.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(value, form))
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("digits") / "data", source={"kind": "digits"})


def test_every_scan_is_there_once_as_pillow_resizes_it(digits: Path) -> None:
    oracle = load_digits()
    found = {row.key: row for row in pictures_in(digits)}
    assert sorted(row.origin for row in found.values()) == [f"sklearn.digits/{n:04d}" for n in range(1797)]
    for split in ("train", "val"):
        samples = read_samples(digits, split)
        for key, pixels, label in zip(samples.keys, samples.images, samples.labels, strict=True):
            number = int(found[key].origin.rsplit("/")[-1])
            scan = Image.fromarray(np.rint(oracle.images[number] * 255 / 16).astype(np.uint8))
            assert np.array_equal(pixels[..., 0], np.asarray(scan.resize((32, 32), Image.Resampling.BICUBIC)))
            assert label == oracle.target[number]


def test_the_manifest_counts_what_was_written(digits: Path) -> None:
    found, rows = manifest.verify(digits, "data"), pictures_in(digits)
    assert found.about["counts"] == {split: sum(row.split == split for row in rows) for split in ("train", "val")}
    assert sum(map(sum, found.about["class_counts"].values())) == 1797
    assert found.about["class_counts"]["val"][3] == sum((row.split, row.label) == ("val", 3) for row in rows)
    shards = {name: file.samples for name, file in found.files.items() if file.samples}
    assert shards == {name: sum(row.shard == name for row in rows) for name in {row.shard for row in rows}}
    assert max(shards.values()) == 400
    assert found.about["quarantined"] == 0 == len(refusals(digits))


def test_the_split_is_a_fair_function_of_content_alone(digits: Path, tmp_path: Path) -> None:
    share = sum(row.split == "val" for row in pictures_in(digits)) / 1797
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 1797) ** 0.5
    for row in pictures_in(digits):
        number = int.from_bytes(bytes.fromhex(row.sha256)[:4], "big")
        assert row.split == ("val" if number / 2**32 < 0.2 else "train")


def test_neither_a_rerun_nor_the_order_of_the_source_changes_a_byte(photos: Path, tmp_path: Path) -> None:
    (photos / "dog" / "again.png").write_bytes((photos / "cat" / "00.png").read_bytes())
    (photos / "dog" / "torn.jpeg").write_bytes(encoded(1, "JPEG")[:-900])
    folders = [
        prepared(tmp_path / str(n), source={"kind": kind, "path": str(photos)}, channels=3, max_quarantine_percent=10.0)
        for n, kind in enumerate(("image_folder", "image_folder", "backwards"))
    ]
    first, again, backwards = (manifest.read(folder).files for folder in folders)
    assert first == again == backwards
    assert refusals(folders[0])["dog/again.png"].endswith("(cat: cat/00.png)")


def test_a_bad_picture_goes_to_quarantine_with_its_reason(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "torn.png").write_bytes(encoded(99)[:2000])
    (photos / "cat" / "notes.txt").write_text("not a picture")
    (photos / "dog" / "twin.png").write_bytes((photos / "dog" / "12.png").read_bytes())
    source = {"kind": "image_folder", "path": str(photos)}
    folder = prepared(tmp_path / "out", source=source, max_quarantine_percent=15.0)
    reasons = refusals(folder)
    assert sorted(reasons) == ["cat/notes.txt", "cat/torn.png", "dog/twin.png"]
    assert "truncated" in reasons["cat/torn.png"]
    assert "no picture" in reasons["cat/notes.txt"]
    kept = next(row for row in pictures_in(folder) if row.origin == "dog/12.png")
    assert reasons["dog/twin.png"].startswith(f"duplicate of {kept.key}")
    assert manifest.read(folder).about["quarantined"] == 3
    assert sum(len(Pictures.open(folder, split)) for split in ("train", "val")) == 20
    with pytest.raises(DataError, match=r"3 of 23 .* max_quarantine_percent allows 10 %.*cat/torn.png"):
        prepared(tmp_path / "strict", source=source, max_quarantine_percent=10.0)


def test_items_are_taken_one_at_a_time_and_no_further_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def items() -> Iterator[Item]:
        for number in range(300):
            taken.append(number)
            yield Item(f"item {number}", 0, b"no picture")

    monkeypatch.setattr(ImageFolder, "open", lambda self: Feed(("only",), 300, items()))
    with pytest.raises(DataError, match="4 of 300"):
        prepared(tmp_path / "out", source={"kind": "image_folder", "path": "x"}, max_quarantine_percent=1.0)
    assert taken == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"resolution": 0}, "resolution 0"),
        ({"val_share": 1.0}, "val_share 1.0"),
        ({"channels": 2}, "channels is 2; allowed: 1, 3"),
        ({"source": {"kind": "digit"}}, "prepare.source.kind.*did you mean 'digits'"),
        ({"shard_sample": 3}, "prepare.shard_sample is unknown.*did you mean 'shard_samples'"),
        ({"max_quarantine_percent": -1}, "max_quarantine_percent -1"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(prepare.Config, {"source": {"kind": "digits"}, "channels": 1} | params, "prepare")


def test_an_empty_folder_ends_the_real_stage_in_one_sentence_and_publishes_nothing(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    params = "prepare: {source: {kind: image_folder, path: photos}, channels: 3}\n"
    (tmp_path / "params.yaml").write_text(params)
    command = [sys.executable, "-m", "pipelines.prepare"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no pictures in photos" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "artifacts").exists()
    assert not list((tmp_path / ".inkwell" / "drafts").iterdir())
