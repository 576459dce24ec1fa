"""What validate claims of rows, captions, classes, splits and distributions: each wrong one is named by its claim."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_core.errors import DataError, IntegrityError
from pipelines import validate
from pipelines.data.index import INDEX
from tests.pipelines.data_folder import Row, make, picture, png, reseal
from tests.pipelines.validating import CLASSES, DATA, failed, judge, pictures, rewrite


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of its own with clean data in place."""
    monkeypatch.chdir(tmp_path)
    make(DATA, pictures(), CLASSES)


def garble(path: Path, column: str, row: int, data: bytes) -> None:
    """Put bytes that are no text into a column of text."""
    table = pq.read_table(path)
    raw = table[column].cast(pa.binary()).to_pylist()
    raw[row] = data
    binary = pa.array(raw, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), binary.buffers())
    pq.write_table(table.set_column(table.column_names.index(column), column, text), path)


WRONG: list[tuple[Row, str]] = [
    ({"offset": 1536}, "decoded.sha256/declared ExpectColumnPairValuesToBeEqual"),
    ({"label": None}, "pictures.label ExpectColumnValuesToNotBeNull"),
    ({"label": 2}, "pictures.label ExpectColumnValuesToBeBetween"),
    ({"label": -2}, "pictures.label ExpectColumnValuesToBeBetween"),
    ({"label": -1}, "pictures.class ExpectColumnValuesToNotBeNull"),
    ({"key": "cat"}, "pictures.key ExpectColumnValuesToMatchRegex"),
    ({"key": "0" * 16}, "pictures.key_head/sha256_head ExpectColumnPairValuesToBeEqual"),
    ({"phash": "12"}, "pictures.phash ExpectColumnValuesToMatchRegex"),
    ({"sha256": "A" * 64}, "pictures.sha256 ExpectColumnValuesToMatchRegex"),
    ({"split": "test"}, "pictures.split ExpectColumnValuesToBeInSet"),
    ({"offset": 0}, "pictures.offset ExpectColumnValuesToBeBetween"),
    ({"size": 0}, "pictures.size ExpectColumnValuesToBeBetween"),
    ({"offset": 10**9}, "pictures.space ExpectColumnValuesToBeBetween"),
]


def test_every_wrong_row_stops_and_is_named() -> None:
    rows = rewrite(lambda rows: [row.update(wrong) for row, (wrong, _) in zip(rows[3:], WRONG, strict=False)])
    with pytest.raises(DataError) as refused:
        judge()
    found = failed()
    for row, (wrong, expectation) in zip(rows[3:], WRONG, strict=False):
        assert expectation in str(refused.value), wrong
        assert row["key"] in found[expectation], wrong


@pytest.mark.parametrize(
    ("plant", "expectation"),
    [
        (
            lambda rows: rows.clear(),
            "pictures.rows ExpectTableRowCountToBeBetween: there are pictures, but there are 0",
        ),
        (lambda rows: rows.pop(), "counts.found/declared"),
        (lambda rows: rows.insert(0, rows.pop(1)), "pictures.displaced"),
        (lambda rows: rows[3].update(sha256=rows[4]["sha256"]), "pictures.original ExpectColumnValuesToBeUnique"),
    ],
)
def test_rows_that_are_wrong_together_stop(plant: Callable[[list[Row]], object], expectation: str) -> None:
    rewrite(plant)
    with pytest.raises(DataError, match=re.escape(expectation)):
        judge()
    assert (validate.DOCS / "index.html").exists()


def test_the_sentence_says_how_many_and_which() -> None:
    rows = rewrite(lambda rows: [row.update(width=31) for row in rows[:2]])
    wanted = rf"every height x width is one of 16x16, but 2 of 60 rows differ: {rows[0]['key']} \(16x31\), "
    with pytest.raises(DataError, match=wanted + rf"{rows[1]['key']} \(16x31\)"):
        judge(decode_sample=1)


def test_captions_are_text_that_says_something() -> None:
    def change(rows: list[Row]) -> None:
        for row, caption in zip(rows, (None, "", "NaN", "x" * 1001), strict=False):
            row["caption"] = caption

    keys = [row["key"] for row in rewrite(change, captions=59)]
    garble(DATA / INDEX, "caption", 4, b"\xff\xfe")
    reseal(DATA)
    with pytest.raises(DataError):
        judge()
    assert failed() == {
        f"pictures.{claim}": f"{count} of 60 rows differ: {', '.join(f'{keys[row]} ({value})' for row, value in found)}"
        for claim, count, found in (
            ("garbled ExpectColumnValuesToBeNull", 1, [(4, "caption")]),
            ("caption ExpectColumnValuesToNotBeNull", 1, [(0, "none")]),
            ("caption ExpectColumnValuesToNotMatchRegex", 2, [(1, ""), (2, "NaN")]),
            ("caption_length ExpectColumnValuesToBeBetween", 2, [(1, "0"), (3, "1001")]),
        )
    }
    with pytest.raises(DataError, match="every text is UTF-8"):
        judge(warnings=["captions"], min_caption_percent=98.0)
    assert "pictures.caption ExpectColumnValuesToNotBeNull" not in failed()


def test_pictures_kept_twice_are_right_under_numbered_keys() -> None:
    shutil.rmtree(DATA)
    rows = [picture(png(n), "train") for n in range(4)]
    again = [row | {"key": row["key"] + suffix} for row, suffix in ((rows[0], "-1"), (rows[0], "-2"), (rows[3], "-1"))]
    make(DATA, [*rows, *again])
    assert judge()["counts"]["failed"] == 0


def hashes(rows: list[Row], *, bits: int) -> None:
    """Of every picture of val, the hash of one in train with some bits turned."""
    train = [row for row in rows if row["split"] == "train"]
    for row, other in zip((row for row in rows if row["split"] == "val"), train, strict=False):
        row["phash"] = f"{int(other['phash'], 16) ^ (1 << bits) - 1:016x}"


def test_near_duplicates_across_the_splits_are_counted() -> None:
    rewrite(lambda rows: hashes(rows, bits=2))
    with pytest.raises(DataError, match=r"at most 1 % of val .* in train \(within 4 bits\), but 12 of 12 rows differ"):
        judge()
    assert judge(near_leak={"distance": 1})["counts"]["failed"] == 0
    assert judge(near_leak={"max_percent": 100.0})["counts"]["failed"] == 0
    assert judge(near_leak=None)["counts"]["failed"] == 0


def test_a_rule_among_the_warnings_is_told_and_does_not_stop() -> None:
    rewrite(lambda rows: hashes(rows, bits=2))
    result = judge(warnings=["near_leak"])
    assert result["counts"] == {"expectations": len(result["outcomes"]), "failed": 0, "warnings": 1}
    assert [key.split(".")[0] for key in failed()] == ["val"]


def test_balance_is_asked_of_every_class_and_split() -> None:
    """Both classes have 24 pictures of train and 6 of val; with one less it is 48.9 % and 45.5 %."""
    rows = pictures()
    for split in ("train", "val"):
        rows.remove(next(row for row in rows if (row["split"], row["label"]) == (split, 1)))
    shutil.rmtree(DATA)
    make(DATA, rows, CLASSES)
    with pytest.raises(DataError, match=r"at least 49 % of train, but 1 of 2 rows differ: dog \(48.9362\)"):
        judge(min_class_percent=49.0, warnings=["val_balance"])
    with pytest.raises(DataError, match=r"at least 49 % of val, but 1 of 2 rows differ: dog \(45.4545\)"):
        judge(min_class_percent=49.0, warnings=["class_balance"])
    assert judge(min_class_percent=49.0, warnings=["class_balance", "val_balance"])["counts"]["warnings"] == 2


def test_a_reference_bounds_how_far_distributions_move() -> None:
    shutil.copytree(DATA, "earlier")
    assert judge(reference="earlier")["counts"]["failed"] == 0
    assert judge(reference=f"earlier/{INDEX}")["counts"]["failed"] == 0
    rewrite(lambda rows: [row.update(caption="a much longer caption than before") for row in rows[:30]])
    with pytest.raises(DataError, match=r"the reference's than its bound, but 1 of 5 rows differ: caption_length"):
        judge(reference="earlier")
    assert judge(reference="earlier", drift={"caption_length": 0.5})["counts"]["failed"] == 0
    with pytest.raises(IntegrityError, match="nowhere"):
        judge(reference="nowhere")
