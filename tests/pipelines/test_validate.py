"""Validate: clean data pass, and each planted defect stops the pipeline with the expectation it breaks."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from diffusion_core import bundle, images, manifest
from diffusion_core.errors import ConfigError, DataError, IntegrityError
from diffusion_core.vae import CodecSpec, KlVae
from diffusion_core.weights import write_tensors
from pipelines import cache_latents, prepare, validate
from pipelines.data import index
from pipelines.data.index import INDEX, LatentRow, PictureRow
from pipelines.data.sources import Digits
from pipelines.stage import Stage
from pipelines.tracking import Tracker

ROOT = Path(__file__).parents[2]
DATA, VALIDATION, CODEC = Path("artifacts/data"), Path("artifacts/validation"), Path("artifacts/codec")
Rows = list[dict[str, Any]]


def stage(name: str, out: Path) -> Stage:
    out.mkdir(parents=True, exist_ok=True)
    return Stage(name, out, out, create_autospec(Tracker, instance=True), Console(quiet=True))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clean") / "data"
    preparing = stage("prepare", out)
    about = prepare.main(prepare.Config(Digits(), channels=1), preparing)
    manifest.seal(out, "data", about, samples=preparing.samples)
    return out


@pytest.fixture
def here(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own with the clean data in place."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clean, DATA)
    return tmp_path


def reseal() -> None:
    found = manifest.read(DATA)
    samples = {name: file.samples for name, file in found.files.items() if file.samples is not None}
    manifest.seal(DATA, "data", found.about, samples=samples)


def rewrite(change: Callable[[Rows], object]) -> None:
    """Change the index as data and seal the folder anew, as a faulty preparation would have left it."""
    table = pq.read_table(DATA / INDEX)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(table.schema.empty_table().from_pylist(rows, schema=table.schema), DATA / INDEX)
    reseal()


def judge(**params: Any) -> dict[str, Any]:
    judging = stage("validate", Path("draft"))
    validate.main(validate.Config(**params), judging)
    return json.loads((judging.out / validate.RESULT).read_text())


def overwrite(row: dict[str, Any], data: bytes) -> None:
    """Put other bytes where a picture lies in its shard."""
    with (DATA / row["shard"]).open("r+b") as shard:
        shard.seek(row["offset"])
        shard.write(data)


def flat(rows: Rows) -> None:
    png = images.encode_png(np.full((32, 32, 1), 9, np.uint8))
    overwrite(rows[0], png)
    rows[0]["size"] = len(png)


DEFECTS: dict[str, tuple[Callable[[Rows], object], str]] = {
    "a key used twice": (lambda r: r[3].update(key=r[4]["key"]), "pictures.key ExpectColumnValuesToBeUnique"),
    "a key that is no key": (lambda r: r[3].update(key="cat"), "pictures.key ExpectColumnValuesToMatchRegex"),
    "content in both splits": (
        lambda r: r[0].update(sha256=r[-1]["sha256"]),
        "pictures.splits ExpectColumnValuesToBeInSet",
    ),
    "no label": (lambda r: r[5].update(label=None), "pictures.label ExpectColumnValuesToNotBeNull"),
    "a label that is no class": (lambda r: r[5].update(label=10), "pictures.label ExpectColumnValuesToBeInSet"),
    "an unknown split": (lambda r: r[5].update(split="test"), "pictures.split ExpectColumnValuesToBeInSet"),
    "a wrong size in pixels": (lambda r: r[7].update(width=31), "pictures.width ExpectColumnValuesToBeInSet"),
    "an offset in the header": (lambda r: r[7].update(offset=0), "pictures.offset ExpectColumnValuesToBeBetween"),
    "no bytes": (lambda r: r[7].update(size=0), "pictures.size ExpectColumnValuesToBeBetween"),
    "a picture past the end": (lambda r: r[7].update(offset=10**9), "pictures.space ExpectColumnValuesToBeBetween"),
    "lost rows": (lambda r: r.pop(), "counts.found/declared ExpectColumnPairValuesToBeEqual"),
    "torn pictures": (
        lambda r: [overwrite(row, b"\0" * row["size"]) for row in r[:9]],
        "decoded.error ExpectColumnValuesToBeNull",
    ),
    "another picture's bytes": (flat, "decoded.sha256/declared ExpectColumnPairValuesToBeEqual"),
    "a class almost gone": (
        lambda r: [row.update(label=4) for row in r if row["label"] == 3],
        "classes.train ExpectColumnValuesToBeBetween",
    ),
}


def test_clean_data_pass_and_leave_a_report_for_people(here: Path) -> None:
    result = judge(decode_sample=64)
    assert result["counts"] == {"expectations": len(result["outcomes"]), "failed": 0, "warnings": 0}
    assert len(result["outcomes"]) == 30
    assert all(outcome["held"] and not outcome["found"] for outcome in result["outcomes"])
    pages = {page.stem for page in (validate.DOCS / "expectations").glob("*.html")}
    assert pages == {"pictures", "decoded", "counts", "classes"}
    assert "pictures" in (validate.DOCS / "index.html").read_text()


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_stops_and_is_named(here: Path, defect: str) -> None:
    plant, expectation = DEFECTS[defect]
    rewrite(plant)
    with pytest.raises(DataError) as refused:
        judge(decode_sample=2000)
    assert expectation in str(refused.value)
    assert (validate.DOCS / "index.html").exists()


def test_the_sentence_says_how_many_and_which(here: Path) -> None:
    rewrite(lambda rows: [row.update(width=31) for row in rows[:2]])
    keys = [row["key"] for row in pq.read_table(DATA / INDEX).to_pylist()[:2]]
    with pytest.raises(
        DataError, match=rf"every width is 32, but 2 of 1797 rows differ: {keys[0]} \(31\), {keys[1]} \(31\)"
    ):
        judge(decode_sample=1)


def test_a_warning_is_recorded_and_does_not_stop(here: Path) -> None:
    result = judge(decode_sample=1, min_class_percent=9.0)  # the rarest class has 9.2 % of train, 8.5 % of val
    (failed,) = [outcome for outcome in result["outcomes"] if not outcome["held"]]
    assert (failed["severity"], failed["expectation"].split()[0]) == ("warning", "classes.val")
    assert result["counts"]["warnings"] == 1


def test_the_same_data_give_the_same_report(here: Path) -> None:
    assert judge(decode_sample=8) == judge(decode_sample=8)


@pytest.mark.parametrize(
    ("params", "message"), [({"decode_sample": 0}, "decode_sample 0"), ({"min_class_percent": 101.0}, "101")]
)
def test_a_bad_parameter_is_refused_by_name(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate.Config(**params)


def test_the_real_stage_publishes_nothing_when_it_fails(here: Path) -> None:
    rewrite(lambda rows: rows[5].update(label=10))
    Path("params.yaml").write_text("validate: {decode_sample: 8}\n")
    command = [sys.executable, "-m", "pipelines.validate"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "every label is in 0..9, but 1 of 1797 rows differ" in done.stderr
    assert "Traceback" not in done.stderr
    assert not VALIDATION.exists()
    assert (validate.DOCS / "index.html").exists()


@pytest.fixture
def coded(here: Path) -> KlVae:
    """A codec beside validated data."""
    VALIDATION.mkdir()
    manifest.seal(VALIDATION, "validation", {})
    CODEC.mkdir()
    torch.manual_seed(0)
    described = CodecSpec("kl_vae", (("channels", 1), ("latent", 4), ("widths", (8, 16, 16))))
    codec = described.build()
    bundle.save_codec(codec, described, CODEC)
    manifest.seal(CODEC, "codec", {})
    return codec


def cached(out: Path, **params: Any) -> dict[str, Any]:
    caching = stage("cache_latents", out)
    about = cache_latents.main(cache_latents.Config(**params), caching)
    manifest.seal(out, "latents", about, samples=caching.samples)
    return about


def test_each_row_holds_what_the_codec_says_of_that_picture_alone(coded: KlVae) -> None:
    about = cached(Path("latents"), batch=100, dtype="float32")
    assert about["image_shape"] == [1, 32, 32]
    assert about["latent_shape"] == [4, 8, 8]
    assert about["codec"] == manifest.read(CODEC).digest
    pictures = {row.key: row for row in index.rows(index.read(DATA / INDEX, PictureRow), PictureRow)}
    rows = index.rows(index.read(Path("latents") / INDEX, LatentRow), LatentRow)
    stored = {split: load_file(f"latents/{split}.safetensors") for split in ("train", "val")}
    assert {split: len(tensors["mean"]) for split, tensors in stored.items()} == about["counts"]
    for row in rows[::97]:
        with tarfile.open(DATA / pictures[row.key].shard) as tar:
            pixels = np.asarray(Image.open(tar.extractfile(f"{row.key}.png")), np.float32)
        alone = coded.encode(torch.from_numpy(pixels / 127.5 - 1)[None, None])
        tensors = stored[row.split]
        torch.testing.assert_close(tensors["mean"][row.row], alone.mean[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tensors["std"][row.row], alone.std[0], atol=1e-5, rtol=1e-4)
        assert tensors["label"][row.row] == pictures[row.key].label


def test_a_latent_that_its_type_cannot_hold_is_refused_by_key(coded: KlVae) -> None:
    coded.scale.fill_(1e6)
    write_tensors(CODEC / "codec.safetensors", coded.state_dict())
    manifest.seal(CODEC, "codec", {})
    first = index.rows(index.read(DATA / INDEX, PictureRow), PictureRow)[0]
    with pytest.raises(DataError, match=f"{first.key} is not finite as float16"):
        cached(Path("latents"))


def test_cache_keys_move_with_all_they_depend_on_and_with_nothing_else(coded: KlVae) -> None:
    def keys(name: str, **params: Any) -> list[str]:
        cached(Path(name), **params)
        rows = index.rows(index.read(Path(name) / INDEX, LatentRow), LatentRow)
        pictures = index.rows(index.read(DATA / INDEX, PictureRow), PictureRow)
        assert [(row.key, row.split) for row in rows] == [(row.key, row.split) for row in pictures]
        return [row.cache_key for row in rows]

    first = keys("a", batch=500)
    assert len(set(first)) == 1797
    assert keys("b", batch=500) == keys("c", batch=300) == first
    assert manifest.read(Path("a")).files == manifest.read(Path("b")).files
    assert not set(keys("d", dtype="float32")) & set(first)
    manifest.seal(CODEC, "codec", {"trained": "again"})
    assert not set(keys("e")) & set(first)


def test_latents_need_a_validated_data_set(coded: KlVae) -> None:
    (VALIDATION / manifest.NAME).unlink()
    with pytest.raises(IntegrityError, match="artifacts/validation has no manifest.json"):
        cached(Path("latents"))
