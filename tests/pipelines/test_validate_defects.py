"""The ten defects that must stop the pipeline, each by the way it would come, and the clean set that passes."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from rich.console import Console

from diffusion_core import manifest
from diffusion_core.errors import DataError
from diffusion_core.spec import build
from pipelines import prepare, validate
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from tests.pipelines.data_folder import Row, make, picture, png
from tests.pipelines.validating import DATA, VALIDATION, real_stage

FOUND = Path("found")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(name: str, out: Path) -> Stage:
    out.mkdir(parents=True)
    return Stage(name, out, out, create_autospec(Tracker, instance=True), Console(quiet=True))


def prepared(**params: Any) -> None:
    """What `prepare` publishes of what was found."""
    preparing = stage("prepare", DATA)
    settings = {"source": {"kind": "image_folder", "path": str(FOUND)}, "channels": 3, "resolution": 16}
    about = prepare.main(build(prepare.Config, settings | params, "prepare"), preparing)
    manifest.seal(DATA, "data", about, samples=preparing.samples)


def validated() -> dict[str, Any]:
    return validate.main(validate.Config(), stage("validate", Path("draft")))


def refused(name: str, params: str) -> str:
    """What the real stage says when it refuses its input."""
    done = real_stage(name, params)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def photos(count: int = 50) -> None:
    """Two classes of photographs in folders, one in five of the rarer."""
    for n in range(count):
        path = FOUND / ("cat" if n % 5 else "dog") / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n, size=(20, 24)))


def captioned(**wrong: Any) -> None:
    """Photographs beside a table of captions, in one row of which something is wrong."""
    FOUND.mkdir()
    rows = [{"file_name": f"{n}.png", "text": f"Foto Nº {n}"} for n in range(30)]
    for n, row in enumerate(rows):
        (FOUND / row["file_name"]).write_bytes(png(n))
    rows[7] |= wrong
    (FOUND / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def faulty(change: Callable[[list[Row]], object]) -> list[Row]:
    """A data folder as a faulty preparation would leave it: whole by its manifest, and wrong inside."""
    rows = [picture(png(n), "val" if n % 5 == 0 else "train", label=n // 5 % 2) for n in range(50)]
    change(rows)
    make(DATA, rows, ("cat", "dog"))
    return rows


def swapped(row: Row, data: bytes) -> None:
    """Other bytes in a picture's place, under their own hash."""
    other = picture(data)
    row |= {name: other[name] for name in ("data", "sha256", "key")}


def test_the_clean_set_passes() -> None:
    photos()
    prepared()
    assert validated()["failed"] == 0


def test_a_truncated_jpeg_stops() -> None:
    photos()
    (FOUND / "cat" / "torn.jpg").write_bytes(png(99, size=(64, 64), form="JPEG")[:-900])
    settings = f"{{source: {{kind: image_folder, path: {FOUND}}}, channels: 3, resolution: 16}}"
    said = refused("prepare", settings)
    assert "1 of 51 items cannot be used; max_quarantine_percent allows 1 %: cat/torn.jpg" in said
    assert not DATA.exists()


def test_a_caption_that_is_nan_stops() -> None:
    captioned(text=float("nan"))
    with pytest.raises(DataError, match=r"1 of 30 items cannot be used.*line 8: the caption is nan \(float\)"):
        prepared()


def test_a_caption_that_became_the_word_nan_stops() -> None:
    """What a table library makes of a missing text when it is asked for words."""
    captioned(text="nan")
    prepared()
    with pytest.raises(DataError, match=r"placeholder \(nan, none, null, n/a\), but 1 of 30 rows differ: .* \(nan\)"):
        validated()


def test_an_empty_text_stops() -> None:
    with tarfile.open("found.tar", "w") as tar:
        for n in range(20):
            for suffix, data in (("png", png(n)), ("txt", b"" if n == 7 else b"a photograph")):
                entry = tarfile.TarInfo(f"{n:03d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    with pytest.raises(DataError, match=r"1 of 20 items cannot be used.*007.*the caption is empty"):
        prepared(source={"kind": "tars", "path": "found.tar"})


def test_a_label_out_of_range_stops() -> None:
    rows = faulty(lambda rows: rows[7].update(label=2))
    said = refused("validate", "{decode_sample: 8}")
    assert f"every label is in 0..1, or -1 for none, but 1 of 50 rows differ: {rows[7]['key']} (2)" in said
    assert not VALIDATION.exists()


DEFECTS: dict[str, tuple[Callable[[list[Row]], object], str]] = {
    "a wrong size": (
        lambda rows: swapped(rows[7], png(99, size=(16, 15))),
        r"every picture drawn has its height x width, but 1 of 50 rows differ: {key} \(16x15 against 16x16\)",
    ),
    "a key used twice": (
        lambda rows: rows[7].update(key=rows[8]["key"]),
        r"every key is unique, but 2 of 50 rows differ: ",
    ),
    "a grey picture": (
        lambda rows: swapped(rows[7], png(99, "L")),
        r"every picture drawn is a PNG of mode RGB, but 1 of 50 rows differ: {key} \(L\)",
    ),
    "a picture with alpha": (
        lambda rows: swapped(rows[7], png(99, "RGBA")),
        r"every picture drawn is a PNG of mode RGB, but 1 of 50 rows differ: {key} \(RGBA\)",
    ),
    "content in both splits": (
        lambda rows: swapped(rows[7], rows[5]["data"]),
        r"no content is in two splits, but 2 of 50 rows differ: {key} \(train\), {key} \(val\)",
    ),
    "a near-duplicate in the other split": (
        lambda rows: rows[5].update(phash=f"{int(rows[7]['phash'], 16) ^ 0b1001:016x}"),
        r"at most 1 % of val have a near-duplicate in train \(within 4 bits\), but 1 of 10 rows differ: .* \({key}\)",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_faulty_preparation_stops(defect: str) -> None:
    plant, sentence = DEFECTS[defect]
    key = faulty(plant)[7]["key"]
    with pytest.raises(DataError, match=sentence.replace("{key}", key)):
        validated()


def test_a_skewed_ratio_stops() -> None:
    photos(200)
    for path in sorted((FOUND / "dog").iterdir())[1:]:
        path.unlink()
    prepared(val_share=0.0)
    with pytest.raises(
        DataError, match=r"every class has at least 1 % of train, but 1 of 2 rows differ: dog \(0.621118\)"
    ):
        validated()
