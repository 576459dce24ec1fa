"""Parquet written with pyarrow, read back against the same tables, and hostile files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_core.errors import ConfigError, DataError
from pipelines.data.sources import Item, Parquet
from tests.pipelines.source_folders import read

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["ant", "bee", "cat"]


def of_hugging_face(label: dict[str, Any]) -> dict[str, str]:
    """Schema metadata as the datasets package writes it."""
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}


def faults(items: list[Item]) -> list[str | None]:
    return [item.fault and item.fault[0] for item in items]


def test_a_plain_table_is_handed_out_row_by_row(tmp_path: Path) -> None:
    rows = [b"picture %d" % number for number in range(50)]
    captions = [f"number {number} \N{SNOWMAN}\nhere" if number else None for number in range(50)]
    columns = {"image": rows, "text": captions, "label": [n % 3 for n in range(50)], "license": ["CC0"] * 50}
    pq.write_table(
        pa.table(columns | {"url": ["u"] * 50, "width": [1] * 50}), tmp_path / "a.parquet", row_group_size=20
    )
    source = Parquet(str(tmp_path / "a.parquet"))
    items = read(source, tmp_path / "spool")
    assert [item.data for item in items] == rows
    assert [item.caption for item in items] == captions
    assert [item.label for item in items] == [str(number % 3) for number in range(50)]
    assert {(item.licence, item.source) for item in items} == {("CC0", "u")}
    assert [item.origin for item in items] == [f"a.parquet/{number:06d}" for number in range(50)]
    assert [part.weight for part in source.catalog(tmp_path / "spool").parts] == [20, 20, 10]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(2), HF_IMAGE], ids=str)
def test_every_way_to_hold_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    values = [{"bytes": data, "path": "x.png"} if kind == HF_IMAGE else data for data in (b"aa", b"bb")]
    pq.write_table(pa.table({"image": pa.array([*values, None], kind)}), tmp_path / "a.parquet")
    items = read(Parquet(str(tmp_path / "a.parquet")), tmp_path / "spool")
    assert [item.data for item in items] == [b"aa", b"bb", b""]
    assert faults(items) == [None, None, "unreadable"]


def test_a_hugging_face_set_brings_the_names_of_its_classes(tmp_path: Path) -> None:
    label = {"_type": "ClassLabel", "names": NAMES}
    schema = pa.schema([("image", HF_IMAGE), ("label", pa.int64())], metadata=of_hugging_face(label))
    image = [{"bytes": b"x", "path": None}] * 6
    table = pa.table({"image": image, "label": [2, 0, -1, None, 3, -2]}, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    source = Parquet(str(tmp_path / "a.parquet"))
    items = read(source, tmp_path / "spool")
    assert source.catalog(tmp_path / "spool").classes == tuple(NAMES)
    assert [item.label for item in items] == ["cat", "ant", None, None, None, None]
    assert faults(items) == [None] * 4 + ["bad_label"] * 2


@pytest.mark.parametrize(
    "about",
    [
        of_hugging_face({"_type": "Value", "dtype": "int64"}),
        {"huggingface": "no JSON"},
        {"huggingface": "[]"},
        {"huggingface": json.dumps({"info": {"features": None}})},
        of_hugging_face({"_type": "ClassLabel", "names": "abc"}),
        {"pandas": "{}"},
        None,
    ],
)
def test_other_metadata_names_no_class(tmp_path: Path, about: dict[str, str] | None) -> None:
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], metadata=about)
    pq.write_table(pa.table({"image": [b"x"], "label": [2]}, schema=schema), tmp_path / "a.parquet")
    source = Parquet(str(tmp_path / "a.parquet"))
    assert source.catalog(tmp_path / "spool").classes == ()
    assert read(source, tmp_path / "spool")[0].label == "2"


def test_columns_are_taken_by_name(tmp_path: Path) -> None:
    columns = {"jpg": [b"x"], "species": ["ant"], "prompt": ["a red ant"], "rights": ["MIT"], "from": ["f"]}
    pq.write_table(pa.table(columns | {"label": [7], "text": ["not asked for"]}), tmp_path / "a.parquet")
    source = Parquet(str(tmp_path / "a.parquet"), "jpg", "species", "prompt", "rights", "from")
    assert read(source, tmp_path / "spool") == [Item("a.parquet/000000", b"x", "ant", "a red ant", "MIT", "f")]


def test_text_in_a_dictionary_is_text(tmp_path: Path) -> None:
    table = pa.table({"image": [b"x", b"y"], "label": pa.array(["ant", "bee"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [item.label for item in read(Parquet(str(tmp_path / "a.parquet")), tmp_path / "spool")] == ["ant", "bee"]


def test_hostile_values_are_faults_of_their_rows(tmp_path: Path) -> None:
    not_utf8 = pa.array([b"good", b"caf\xe9", b"", b"good", b"good"]).view(pa.string())
    label = pa.array([1.0, 2.0, 3.0, 4.5, float("nan")])
    pq.write_table(pa.table({"image": [b"x"] * 5, "text": not_utf8, "label": label}), tmp_path / "a.parquet")
    items = read(Parquet(str(tmp_path / "a.parquet")), tmp_path / "spool")
    assert faults(items) == [None, "bad_caption", "bad_caption", "bad_label", "bad_label"]
    assert items[0] == Item("a.parquet/000000", b"x", "1", "good")
    assert all(item.origin in item.fault[1] for item in items if item.fault)


def test_a_picture_too_long_is_not_taken(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [bytes(100), bytes(101)]}), tmp_path / "a.parquet")
    items = read(Parquet(str(tmp_path / "a.parquet"), max_bytes=100), tmp_path / "spool")
    assert [(len(item.data), item.fault and item.fault[0]) for item in items] == [(100, None), (0, "too_large")]


@pytest.mark.parametrize("pattern", ["", "*.parquet", "set-{0,1}.parquet", "**/*.parquet"])
def test_a_folder_and_a_pattern_name_all_files_in_order(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for number in (1, 0):
        pq.write_table(pa.table({"image": [b"%d" % number] * 2}), folder / f"set-{number}.parquet")
    (folder / ".hidden.parquet").write_bytes(b"x")
    items = read(Parquet(f"{folder}/{pattern}"), tmp_path / "spool")
    assert [(item.origin, item.data) for item in items] == [
        (f"set-{number}.parquet/{row:06d}", b"%d" % number) for number in (0, 1) for row in (0, 1)
    ]


GOOD = pa.table({"image": [b"x"], "text": ["t"]})


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"image": "picture"}, "no column 'picture'; allowed: image, text"),
        ({"image": "imag"}, "did you mean 'image'"),
        ({"caption": "caption"}, "no column 'caption'"),
        ({"label": "label"}, "no column 'label'"),
        ({"image": "text"}, "'text' is string; binary"),
    ],
)
def test_a_column_that_is_not_there_or_holds_no_bytes_is_refused(
    tmp_path: Path, keywords: dict[str, str], sentence: str
) -> None:
    pq.write_table(GOOD, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=sentence):
        Parquet(str(tmp_path / "a.parquet"), **keywords).catalog(tmp_path / "spool")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([b"x"])] * 2, names=["image", "image"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'image'"):
        Parquet(str(tmp_path / "a.parquet")).catalog(tmp_path / "spool")


def test_a_struct_without_bytes_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"path": "a.png"}]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a struct with binary 'bytes' is wanted"):
        Parquet(str(tmp_path / "a.parquet")).catalog(tmp_path / "spool")


@pytest.mark.parametrize("damage", ["missing", "empty", "no Parquet", "cut", "without a row"])
def test_a_file_that_is_no_table_of_pictures_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "torn.parquet"
    pq.write_table(GOOD.slice(0, 0) if damage == "without a row" else GOOD, path)
    if damage == "missing":
        path.unlink()
    elif damage in ("empty", "no Parquet", "cut"):
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "no Parquet": b"x" * 500, "cut": whole[:-1]}[damage])
    with pytest.raises(DataError, match=r"torn\.parquet"):
        Parquet(str(path)).catalog(tmp_path / "spool")


def test_a_damaged_page_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [number.to_bytes(4) * 25 for number in range(1000)]
    pq.write_table(pa.table({"image": rows}), path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[50_000] ^= 1
    path.write_bytes(data)
    source = Parquet(str(path))
    (part,) = source.catalog(tmp_path / "spool").parts
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(source.items(part))


def test_files_that_name_other_classes_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((NAMES, NAMES[::-1])):
        about = of_hugging_face({"_type": "ClassLabel", "names": names})
        schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], metadata=about)
        pq.write_table(pa.table({"image": [b"x"], "label": [1]}, schema=schema), tmp_path / f"{number}.parquet")
    with pytest.raises(DataError, match=r"1\.parquet names other classes"):
        Parquet(str(tmp_path)).catalog(tmp_path / "spool")


def test_a_long_row_group_does_not_lie_in_memory_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    noise = bytes(range(256)) * 4096
    picture = pa.array([noise])
    with pq.ParquetWriter(
        path, pa.schema([("image", pa.binary())]), compression="none", use_dictionary=False
    ) as writer:
        writer.write_table(pa.table({"image": pa.concat_arrays([picture] * 128)}), row_group_size=128)
    source = Parquet(str(path))
    (part,) = source.catalog(tmp_path / "spool").parts
    before = pa.total_allocated_bytes()
    highest = 0
    for item in source.items(part):
        assert item.data == noise
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert highest < 64 << 20  # of 128 MiB


def test_an_address_that_may_not_be_opened_is_refused() -> None:
    for path in ("pipe:cat x", "hdfs://host/x.parquet", "https://user:secret@host/x.parquet"):
        with pytest.raises(ConfigError) as refused:
            Parquet(path)
        assert "secret" not in str(refused.value)
