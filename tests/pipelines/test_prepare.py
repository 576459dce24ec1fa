"""Prepare, against scikit-learn, Pillow and the standard library; equal content must give equal bytes."""

import hashlib
import io
import json
import os
import secrets
import subprocess
import sys
import tarfile
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
from pipelines.data.sources import Catalog, ImageFolder, Item, Part, Source
from pipelines.stage import Stage, decisive
from pipelines.tracking import Tracker
from tests.made import Expected, make_folder

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shuffled(Source):
    """An image folder listed in another order, in parts of another size."""

    path: str
    seed: int
    per_part: int

    def catalog(self, spool: Path) -> Catalog:
        catalog = ImageFolder(self.path).catalog(spool)
        found = [row for part in catalog.parts for row in part.where]
        order = np.random.default_rng(self.seed).permutation(len(found))
        starts = range(0, len(found), self.per_part)
        pieces = [[found[place] for place in order[start : start + self.per_part]] for start in starts]
        parts = (Part(number, len(piece), piece) for number, piece in enumerate(pieces))
        return Catalog(parts, len(found), "pictures", len(found))

    def items(self, part: Part) -> Iterator[Item]:
        return ImageFolder(self.path).items(part)


@dataclass(frozen=True)
class Listed(Source):
    """Items by the hundred that are made when they are asked for; part `torn`, if any, breaks off in the middle."""

    torn: int = -1
    known: bool = True

    def catalog(self, spool: Path) -> Catalog:
        parts = (Part(number, 100, number) for number in range(3))
        return Catalog(parts, 300, "pictures", 300 if self.known else None, ("even", "odd"))

    def items(self, part: Part) -> Iterator[Item]:
        for number in range(100):
            if part.number == self.torn and number == 50:
                raise DataError("the tape is torn")
            value = 100 * part.number + number
            yield Item(f"item {value:03d}", picture(value), ("even", "odd")[number % 2], caption=f"number {value}")


def prepared(out: Path, **params: Any) -> Path:
    """What the stage publishes for these params."""
    config = build(prepare.Config, {"channels": 3, "shard_samples": 400} | params, "prepare")
    out.mkdir(parents=True)
    stage = Stage("prepare", out, out, create_autospec(Tracker, instance=True), Console(quiet=True))
    about = prepare.main(config, stage)
    manifest.seal(out, "data", about, samples=stage.samples)
    return out


def refusals(folder: Path) -> dict[str, RefusalRow]:
    return {row.origin: row for row in index.rows(index.read(folder / QUARANTINE, RefusalRow), RefusalRow)}


def pictures_in(folder: Path) -> list[PictureRow]:
    return index.rows(index.read(folder / INDEX, PictureRow), PictureRow)


def png_of(folder: Path, row: PictureRow) -> bytes:
    return (folder / row.shard).read_bytes()[row.offset : row.offset + row.size]


def picture(value: int, size: tuple[int, int] = (48, 40), form: str = "PNG") -> bytes:
    """A smooth picture, so that its hash is its own."""
    pixels = np.random.default_rng(value).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten pictures each, in all three formats."""
    root = tmp_path / "photos"
    for value in range(20):
        form = ("PNG", "JPEG", "WEBP")[value % 3]
        path = root / ("cat", "dog")[value // 10] / f"{value:02d}.{form.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(value, form=form))
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("digits") / "data", source={"kind": "digits"}, channels=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected]:
    """Three hundred plain pictures and every hostile file."""
    path = tmp_path_factory.mktemp("made") / "folder"
    return path, make_folder(path, 300, hostile=100)


def test_every_scan_is_there_once_as_pillow_resizes_it(digits: Path) -> None:
    oracle, rows = load_digits(), pictures_in(digits)
    assert sorted(row.origin for row in rows) == [f"sklearn.digits/{n:04d}" for n in range(1797)]
    for row in rows[::7]:
        number = int(row.origin.rsplit("/")[-1])
        scan = Image.fromarray(np.rint(oracle.images[number] * 255 / 16).astype(np.uint8))
        wanted = scan.resize((32, 32), Image.Resampling.BICUBIC)
        png = png_of(digits, row)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(wanted))
        assert row.label == oracle.target[number]
        assert row.sha256 == hashlib.sha256(png).hexdigest() and row.key == row.sha256[:16]


def test_the_manifest_counts_what_was_written(digits: Path) -> None:
    found, rows = manifest.verify(digits, "data"), pictures_in(digits)
    about = found.about
    assert about["counts"] == {split: sum(row.split == split for row in rows) for split in ("train", "val")}
    assert sum(map(sum, about["class_counts"].values())) == 1797
    assert about["class_counts"]["val"][3] == sum((row.split, row.label) == ("val", 3) for row in rows)
    assert about["shapes"] == [[32, 32]] and about["channels"] == 1 and about["captions"] == 0
    assert about["classes"] == [str(digit) for digit in range(10)]
    shards = {name: file.samples for name, file in found.files.items() if file.samples}
    assert shards == {name: sum(row.shard == name for row in rows) for name in {row.shard for row in rows}}
    assert max(shards.values()) == 400
    assert about["quarantined"] == 0 == len(refusals(digits))
    assert not (digits / "spool").exists()


def test_rows_stand_by_split_size_and_content(digits: Path) -> None:
    rows = pictures_in(digits)
    assert rows == sorted(rows, key=lambda row: (row.split, row.height, row.width, row.sha256))
    for row in rows:
        number = int.from_bytes(bytes.fromhex(row.sha256)[:4], "big")
        assert row.split == ("val" if number / 2**32 < 0.2 else "train")
    share = sum(row.split == "val" for row in rows) / 1797
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 1797) ** 0.5


@pytest.fixture(scope="module")
def reference(made: tuple[Path, Expected], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made folder with every decision to take: buckets, copies, near copies, an opt-out list."""
    out = tmp_path_factory.mktemp("reference")
    path, expected = made
    plain = sorted(path.glob("*/0000*.png"))
    for number, original in enumerate(plain[:6]):
        (path / "sky" / f"copy-{number}.png").write_bytes(original.read_bytes())
        smaller = Image.open(original)
        smaller.resize((smaller.width * 9 // 10, smaller.height * 9 // 10)).save(path / "leaf" / f"near-{number}.png")
    with (path / "metadata.jsonl").open("a") as table:
        for name in sorted([*path.glob("sky/copy-*"), *path.glob("leaf/near-*")]):
            about = {"file_name": name.relative_to(path).as_posix(), "label": name.parent.name}
            table.write(json.dumps(about) + "\n")
    names = [original.relative_to(path).as_posix() for original in plain[6:9]]
    digest = hashlib.sha256(plain[9].read_bytes()).hexdigest()
    (out / "opt_out.txt").write_text("\n".join([names[0], names[1].rsplit("/")[-1], "# " + names[2], digest]))
    return prepared(out / "data", source={"kind": "image_folder", "path": str(path)}, **choices(out / "opt_out.txt"))


def choices(opt_out: Path) -> dict[str, Any]:
    return {
        "buckets": [[32, 32], [24, 40], [40, 24]],
        "near_duplicates": 6,
        "min_side": 8,
        "opt_out": str(opt_out),
        "max_quarantine_percent": 15.0,
        "shard_samples": 50,
    }


def test_each_hostile_file_meets_its_outcome(made: tuple[Path, Expected], reference: Path) -> None:
    expected = made[1].hostile
    assert sum(kind is not None for kind in expected.values()) >= 30
    found, kept = refusals(reference), {row.origin for row in pictures_in(reference)}
    outcome = {origin: None if origin in kept else found[origin].kind for origin in expected}
    # What is fine may be a near copy of another fine one: both decisions say that it was a picture.
    assert {origin: None if kind == "near_duplicate" else kind for origin, kind in outcome.items()} == expected
    about = manifest.read(reference, "data").about
    assert about["quarantined"] == sum(kind is not None for kind in expected.values())
    assert sum(about["counts"].values()) + sum(about["left_out"].values()) == 300 + 12 + sum(
        kind is None for kind in expected.values()
    )


def test_decisions_are_told_with_what_was_kept(made: tuple[Path, Expected], reference: Path) -> None:
    found, kept = refusals(reference), {row.key: row for row in pictures_in(reference)}
    assert {row.kind for row in found.values()} >= {"duplicate", "near_duplicate", "opt_out"}
    for row in found.values():
        if row.kind in ("duplicate", "near_duplicate"):
            words = row.reason.split()
            assert any(word in kept and f"{kept[word].origin})" in row.reason for word in words)
            assert row.sha256 == hashlib.sha256((made[0] / row.origin).read_bytes()).hexdigest()
    assert sum(row.kind == "opt_out" for row in found.values()) == 3
    copies = [name for number in range(6) for name in (f"sky/copy-{number}.png", f"leaf/near-{number}.png")]
    assert sum(name in found for name in copies) >= 8  # of an original and its copies, one is kept


def test_captions_and_labels_are_carried(made: tuple[Path, Expected], reference: Path) -> None:
    said = [json.loads(line) for line in (made[0] / "metadata.jsonl").read_text().splitlines()]
    wanted = {row["file_name"]: row for row in said}
    classes = manifest.read(reference, "data").about["classes"]
    assert classes == sorted(classes) and len(classes) == 5
    rows = pictures_in(reference)
    for row in rows:
        assert row.caption == wanted[row.origin].get("text") and classes[row.label] == wanted[row.origin]["label"]
    assert manifest.read(reference, "data").about["captions"] == sum(row.caption is not None for row in rows)


def test_each_picture_is_in_the_bucket_of_its_shape(made: tuple[Path, Expected], reference: Path) -> None:
    assert manifest.read(reference, "data").about["shapes"] == [[24, 40], [32, 32], [40, 24]]
    for row in pictures_in(reference):
        with Image.open(made[0] / row.origin) as original, Image.open(io.BytesIO(png_of(reference, row))) as picture:
            assert picture.size == (row.width, row.height) and picture.mode == "RGB"
            assert row.shard.startswith(f"{row.split}-{row.height}x{row.width}-")
            if "turned" in row.origin:
                continue
            ratio = original.height / original.width
            far = {shape: abs(np.log(ratio * shape[1] / shape[0])) for shape in ((24, 40), (32, 32), (40, 24))}
            assert far[row.height, row.width] == min(far.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_neither_order_nor_size_of_parts_changes_a_byte(
    made: tuple[Path, Expected], reference: Path, tmp_path: Path, seed: int
) -> None:
    source = {"kind": "shuffled", "path": str(made[0]), "seed": seed, "per_part": 37 * seed}
    found = prepared(tmp_path / "out", source=source, **choices(reference.parent / "opt_out.txt"))
    assert manifest.read(found).files == manifest.read(reference).files


def test_neither_does_the_number_of_workers(
    made: tuple[Path, Expected], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "token"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", secrets.token_hex(32)))
    source = {"kind": "image_folder", "path": str(made[0])}
    more = choices(reference.parent / "opt_out.txt")
    found = prepared(tmp_path / "out", source=source, workers=2, **more)
    assert manifest.read(found).files == manifest.read(reference).files
    assert manifest.read(found).about == manifest.read(reference).about


def test_where_and_by_how_many_is_nothing_of_a_result() -> None:
    def config(path: str, **more: Any) -> prepare.Config:
        return build(
            prepare.Config, {"source": {"kind": "image_folder", "path": path}, "channels": 3} | more, "prepare"
        )

    assert decisive(config("/a/photos", workers=4)) == decisive(config("/b/photos"))
    assert decisive(config("/a/photos", resolution=64)) != decisive(config("/a/photos"))


def test_hostile_files_do_not_fill_the_memory(made: tuple[Path, Expected], tmp_path: Path) -> None:
    """In a process of its own, after the plain pictures have been decoded once."""
    program = f"""
from pathlib import Path
from diffusion_core import images
from tests.measured import peak_memory
def decode(paths):
    for path in paths:
        try:
            images.transcode(path.read_bytes(), 3, images.Fit(((32, 32),)), min_side=8)
        except images.PictureError:
            pass
    return peak_memory()
files = sorted(path for path in Path({str(made[0])!r}).glob("*/*") if path.is_file())
before = decode(path for path in files if "hostile" not in path.name)
print(decode(path for path in files if "hostile" in path.name) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 64 * 2**20


def test_a_bad_picture_goes_to_quarantine_with_its_reason(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "torn.png").write_bytes(picture(99)[:2000])
    (photos / "cat" / "notes.txt").write_text("not a picture")
    (photos / "dog" / "twin.png").write_bytes((photos / "dog" / "12.png").read_bytes())
    source = {"kind": "image_folder", "path": str(photos)}
    folder = prepared(tmp_path / "out", source=source, max_quarantine_percent=10.0)
    found = refusals(folder)
    assert {origin: row.kind for origin, row in found.items()} == {
        "cat/notes.txt": "not_a_picture",
        "cat/torn.png": "broken",
        "dog/twin.png": "duplicate",
    }
    assert "truncated" in found["cat/torn.png"].reason
    assert found["cat/notes.txt"].sha256 == hashlib.sha256(b"not a picture").hexdigest()
    kept = next(row for row in pictures_in(folder) if row.origin == "dog/12.png")
    assert found["dog/twin.png"].reason == f"duplicate of {kept.key} (dog: dog/12.png)"
    about = manifest.read(folder).about
    assert about["quarantined"] == 2 and about["left_out"]["duplicate"] == 1
    assert "cat/torn.png" in (folder / "quarantine.md").read_text()
    with pytest.raises(DataError, match=r"2 of 23 .* max_quarantine_percent allows 5 %.*cat/notes.txt.*cat/torn.png"):
        prepared(tmp_path / "strict", source=source, max_quarantine_percent=5.0)


def test_kept_duplicates_have_keys_of_their_own_in_order_of_origin(photos: Path, tmp_path: Path) -> None:
    for name in ("dog/a.png", "cat/z.png"):
        (photos / name).write_bytes((photos / "dog" / "12.png").read_bytes())
    source = {"kind": "image_folder", "path": str(photos)}
    folder = prepared(tmp_path / "out", source=source, duplicates="keep")
    twins = [row for row in pictures_in(folder) if row.origin in ("cat/z.png", "dog/12.png", "dog/a.png")]
    head = twins[0].sha256[:16]
    assert [(row.origin, row.key) for row in twins] == [
        ("cat/z.png", head),
        ("dog/12.png", f"{head}-1"),
        ("dog/a.png", f"{head}-2"),
    ]
    assert [row.label for row in twins] == [0, 1, 1] and len(pictures_in(folder)) == 22
    with tarfile.open(folder / twins[0].shard) as tar:
        assert {f"{row.key}.png" for row in twins} < set(tar.getnames())


def test_classes_stand_in_numeric_order_if_they_are_numbers(photos: Path, tmp_path: Path) -> None:
    (photos / "cat").rename(photos / "10")
    (photos / "dog").rename(photos / "9")
    folder = prepared(tmp_path / "out", source={"kind": "image_folder", "path": str(photos)})
    assert manifest.read(folder).about["classes"] == ["9", "10"]
    assert {(row.origin.split("/")[0], row.label) for row in pictures_in(folder)} == {("9", 0), ("10", 1)}


def test_pictures_without_a_class_have_none(photos: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos.glob("*/*"):
        path.rename(flat / path.name)
    folder = prepared(tmp_path / "out", source={"kind": "image_folder", "path": str(flat)})
    about = manifest.read(folder).about
    assert about["classes"] == [] and about["class_counts"] == {"train": [], "val": []}
    assert {row.label for row in pictures_in(folder)} == {-1}


def test_a_part_that_breaks_off_stops_the_stage_unless_allowed(tmp_path: Path) -> None:
    message = "100 of 300 pictures are in parts that cannot be read to their end.*allows 30 %.*the tape is torn"
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "strict", source={"kind": "listed", "torn": 1}, max_quarantine_percent=30.0)
    folder = prepared(tmp_path / "out", source={"kind": "listed", "torn": 1}, max_quarantine_percent=40.0)
    assert len(pictures_in(folder)) == 250
    (row,) = refusals(folder).values()
    assert row.kind == "unreadable" and "the tape is torn" in row.reason


def test_a_label_that_is_no_class_of_the_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(self: Listed, part: Part) -> Iterator[Item]:
        yield Item("a", picture(1), "odd")
        yield Item("b", picture(2), "both")
        yield Item("c", picture(3), "odd\udc80")

    monkeypatch.setattr(Listed, "items", odd)
    folder = prepared(tmp_path / "out", source={"kind": "listed"}, max_quarantine_percent=50.0)
    found = refusals(folder)
    assert {origin: row.kind for origin, row in found.items()} == {"b": "bad_label", "c": "bad_label", "a": "duplicate"}
    assert "'both'" in found["b"].reason


def test_names_that_are_no_text_are_spelt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they come from a disk whose names are no UTF-8."""
    notes = {"licence": "CC\udc80", "source": "x\udc81"}
    found = [Item("a/\udc80.png", picture(1), **notes), Item("b/\udc80.png", picture(2)), Item("c\udcff", b"torn")]
    monkeypatch.setattr(Listed, "items", lambda self, part: iter(found if part.number == 0 else ()))
    (tmp_path / "opt_out").write_text("b/\\udc80.png")
    limits = {"max_quarantine_percent": 50.0, "opt_out": str(tmp_path / "opt_out")}
    folder = prepared(tmp_path / "out", source={"kind": "listed"}, **limits)
    (row,) = pictures_in(folder)
    assert (row.origin, row.licence, row.source) == ("a/\\udc80.png", "CC\\udc80", "x\\udc81")
    assert {origin: row.kind for origin, row in refusals(folder).items()} == {
        "b/\\udc80.png": "opt_out",
        "c\\udcff": "not_a_picture",
    }


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_quarantine_percent": 1.0}, "4 of 300"),
        ({"max_quarantine_percent": 100.0, "max_consecutive": 3}, "4 items in a row"),
    ],
)
def test_items_are_taken_one_at_a_time_and_no_further_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], message: str
) -> None:
    taken: list[int] = []

    def items(self: Listed, part: Part) -> Iterator[Item]:
        for number in range(100):
            taken.append(number)
            yield Item(f"item {number}", b"no picture")

    monkeypatch.setattr(Listed, "items", items)
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "out", source={"kind": "listed"}, **limits)
    assert taken == [0, 1, 2, 3]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"resolution": 0}, "resolution 0"),
        ({"val_share": 1.0}, "val_share 1.0"),
        ({"channels": 2}, "channels is 2; allowed: 1, 3"),
        ({"source": {"kind": "digit"}}, "prepare.source.kind.*did you mean 'digits'"),
        ({"shard_sample": 3}, "prepare.shard_sample is unknown.*did you mean 'shard_samples'"),
        ({"max_quarantine_percent": -1}, "max_quarantine_percent -1"),
        ({"max_consecutive": -1}, "max_consecutive -1"),
        ({"crop": "centre"}, "crop is 'centre'.*did you mean 'center'"),
        ({"buckets": [[32, 0]]}, "buckets .*at least 1"),
        ({"buckets": [[32, 32], [64, 64]]}, r"\[32, 32\] and \[64, 64\] have one aspect ratio"),
        ({"background": [0, 0, 256]}, "background .*256"),
        ({"near_duplicates": 17}, "near_duplicates 17"),
        ({"near_duplicates": 0, "duplicates": "keep"}, "contradict"),
        ({"opt_out": "ftp://x/y"}, "ftp"),
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
