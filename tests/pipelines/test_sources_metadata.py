"""Metadata beside pictures, written with `csv` and `json`: what it says, and thirty hostile rows and tables."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core.errors import DataError
from pipelines.data.sources import ImageFolder, Item
from pipelines.data.sources.metadata import records
from tests.pipelines.source_folders import as_csv, faults, jsonl, read, write

TOLD = [
    {
        "file_name": "a/1.png",
        "text": "a boletus\nin moss",
        "label": "boletus",
        "licence": "CC0",
        "source": "https://a.b",
    },
    {
        "file_name": "a/2.png",
        "text": "\N{MUSHROOM} a “mushroom”, said he",
        "label": "amanita",
        "licence": "",
        "source": "",
    },
    {"file_name": "3.png", "text": " spaced ", "label": "3", "licence": "CC BY, 4.0", "source": ""},
]
WANTED = [
    Item("a/1.png", b"1", "boletus", "a boletus\nin moss", "CC0", "https://a.b"),
    Item("a/2.png", b"2", "amanita", "\N{MUSHROOM} a “mushroom”, said he"),
    Item("3.png", b"3", "3", " spaced ", "CC BY, 4.0"),
]
PICTURES = {"a/1.png": b"1", "a/2.png": b"2", "3.png": b"3", "unnamed.png": b"not in the table"}


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("metadata.jsonl", jsonl(TOLD)),
        ("metadata.jsonl", b"\xef\xbb\xbf" + jsonl(TOLD).replace(b"\n", b"\r\n\r\n")),
        ("metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TOLD).encode().rstrip()),
        ("metadata.csv", as_csv(TOLD)),
        ("metadata.csv", as_csv(TOLD, "utf-8-sig", "\n")),
    ],
    ids=[
        "jsonl",
        "jsonl with a byte-order mark and empty lines",
        "jsonl in UTF-8",
        "csv",
        "csv with a byte-order mark",
    ],
)
def test_metadata_says_which_pictures_and_what_they_are(tmp_path: Path, name: str, table: bytes) -> None:
    root = write(tmp_path / "photos", PICTURES | {name: table})
    assert read(ImageFolder(str(root)), tmp_path / "spool") == WANTED


def test_metadata_knows_the_other_spellings(tmp_path: Path) -> None:
    row = {"file_name": "./a//1.png", "caption": "c", "license": "MIT", "url": "https://a.b", "width": 7}
    root = write(tmp_path / "photos", PICTURES | {"metadata.jsonl": jsonl([row])})
    wanted = [Item("a/1.png", b"1", None, "c", "MIT", "https://a.b")]
    assert read(ImageFolder(str(root)), tmp_path / "spool") == wanted


@pytest.mark.parametrize(
    ("row", "label"),
    [("3", "3"), (3, "3"), (3.0, "3"), (-1, "-1"), (" 3 ", "3"), ("3.0", "3.0"), (None, None), ("", None)],
)
def test_a_label_is_a_name(tmp_path: Path, row: object, label: str | None) -> None:
    root = write(tmp_path / "photos", PICTURES | {"metadata.jsonl": jsonl([{"file_name": "3.png", "label": row}])})
    assert read(ImageFolder(str(root)), tmp_path / "spool") == [Item("3.png", b"3", label)]


HOSTILE = {
    "missing file": ('{"file_name": "none.png"}', "unreadable"),
    "folder as a file": ('{"file_name": "a"}', "unreadable"),
    "file as a folder": ('{"file_name": "3.png/x.png"}', "unreadable"),
    "above the folder": ('{"file_name": "../secret.png"}', "unreadable"),
    "above, later": ('{"file_name": "a/../../secret.png"}', "unreadable"),
    "absolute": ('{"file_name": "/etc/hostname"}', "unreadable"),
    "another scheme": ('{"file_name": "http://127.0.0.1/x.png"}', "unreadable"),
    "no name": ('{"text": "a picture of nothing"}', "unreadable"),
    "null name": ('{"file_name": null}', "unreadable"),
    "empty name": ('{"file_name": ""}', "unreadable"),
    "the folder itself": ('{"file_name": "."}', "unreadable"),
    "number as a name": ('{"file_name": 3}', "unreadable"),
    "NUL in the name": ('{"file_name": "3.png\\u0000.jpg"}', "unreadable"),
    "surrogate in the name": ('{"file_name": "\\ud800.png"}', "unreadable"),
    "endless name": (json.dumps({"file_name": "x" * 5000}), "unreadable"),
    "NaN caption": ('{"file_name": "3.png", "text": NaN}', "bad_caption"),
    "number as a caption": ('{"file_name": "3.png", "text": 3}', "bad_caption"),
    "list of captions": ('{"file_name": "3.png", "text": ["a", "b"]}', "bad_caption"),
    "empty caption": ('{"file_name": "3.png", "text": ""}', "bad_caption"),
    "blank caption": ('{"file_name": "3.png", "text": " \\n\\t"}', "bad_caption"),
    "lone surrogate": ('{"file_name": "3.png", "text": "half \\ud83c"}', "bad_caption"),
    "NaN label": ('{"file_name": "3.png", "label": NaN}', "bad_label"),
    "half a label": ('{"file_name": "3.png", "label": 3.5}', "bad_label"),
    "truth as a label": ('{"file_name": "3.png", "label": true}', "bad_label"),
    "list of labels": ('{"file_name": "3.png", "label": [1]}', "bad_label"),
    "surrogate label": ('{"file_name": "3.png", "label": "\\udc00"}', "bad_label"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_row_is_a_fault_of_its_own_and_says_its_line_or_file(tmp_path: Path, case: str) -> None:
    line, kind = HOSTILE[case]
    write(tmp_path, {"secret.png": b"secret"})
    table = b'{"file_name": "a/1.png"}\n' + line.encode() + b'\n{"file_name": "a/2.png"}\n'
    root = write(tmp_path / "photos", PICTURES | {"metadata.jsonl": table})
    before, item, after = read(ImageFolder(str(root)), tmp_path / "spool")
    assert (before, after) == (Item("a/1.png", b"1"), Item("a/2.png", b"2"))
    assert item.fault is not None
    assert item.fault[0] == kind
    assert item.data == b""
    assert item.origin in item.fault[1] or "line 2" in item.fault[1]
    assert (item.origin + item.fault[1]).encode().isascii() or "\\" in item.fault[1]


def test_bytes_that_are_no_utf8_are_a_fault_of_their_row(tmp_path: Path) -> None:
    table = b"file_name,text,licence\na/1.png,good,\xff\na/2.png,caf\xe9,\n3.png,,\n"
    root = write(tmp_path / "photos", PICTURES | {"metadata.csv": table})
    items = read(ImageFolder(str(root)), tmp_path / "spool")
    assert faults(items) == {"a/1.png": None, "a/2.png": "bad_caption", "3.png": None}
    assert items[2].caption is None
    assert items[0].licence is not None
    assert items[0].licence.isascii()


@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=20)), min_size=1, max_size=5))
def test_any_text_comes_through_either_table_as_it_was(rows: list[tuple[str, str]]) -> None:
    told = [{"file_name": name, "text": text} for name, text in rows]
    with tempfile.TemporaryDirectory() as folder:
        for table, data in (("metadata.jsonl", jsonl(told)), ("metadata.csv", as_csv(told))):
            path = Path(folder, table)
            path.write_bytes(data)
            assert [record for _, record in records(path, table)] == told


def test_a_name_given_twice_is_handed_out_twice(tmp_path: Path) -> None:
    rows = [{"file_name": "3.png", "text": text} for text in ("one", "another")]
    root = write(tmp_path / "photos", PICTURES | {"metadata.csv": as_csv(rows)})
    wanted = [Item("3.png", b"3", None, "one"), Item("3.png", b"3", None, "another")]
    assert read(ImageFolder(str(root)), tmp_path / "spool") == wanted


def test_a_link_in_the_metadata_does_not_lead_out(tmp_path: Path) -> None:
    secret = write(tmp_path / "elsewhere", {"secret.png": b"secret"})
    root = write(tmp_path / "photos", {"metadata.jsonl": jsonl([{"file_name": "link/secret.png"}])})
    (root / "link").symlink_to(secret)
    assert faults(read(ImageFolder(str(root)), tmp_path / "spool")) == {"link/secret.png": "unreadable"}


NO_TABLE = {
    "no JSON": ("metadata.jsonl", b'{"file_name": "3.png"}\n{"file_name": \n', r"metadata.jsonl, line 2 is no JSON"),
    "cut line": ("metadata.jsonl", jsonl(TOLD)[:-9], r"metadata.jsonl, line 3 is no JSON"),
    "a list": ("metadata.jsonl", b'\n["3.png"]\n', "line 2 is list"),
    "deep JSON": ("metadata.jsonl", b"[" * 100_000 + b"\n", "line 1 is no JSON"),
    "endless line": ("metadata.jsonl", b'{"file_name": "' + b"x" * 2_000_000, "line 1 is longer"),
    "number of a million digits": ("metadata.jsonl", b'{"label": ' + b"9" * 10_000 + b"}", "line 1 is no JSON"),
    "no row": ("metadata.jsonl", b"\n\n", "has no row"),
    "empty csv": ("metadata.csv", b"", "line 1 names no column 'file_name'"),
    "header alone": ("metadata.csv", b"file_name,text\n", "has no row"),
    "no file_name": ("metadata.csv", b"filename,text\n3.png,x\n", "did you mean 'filename'"),
    "column twice": ("metadata.csv", b"file_name,text,text\n3.png,x,y\n", "names a column twice"),
    "UTF-16": ("metadata.csv", as_csv(TOLD, "utf-16"), "line 1 names no column"),
    "comma without quotes": ("metadata.csv", b"file_name,text\n3.png,a, b\n", "line 2 has 3 cells, the header 2"),
    "row too short": ("metadata.csv", b"file_name,text\n3.png,a\n3.png\n", "line 3 has 1 cells"),
    "quote never closed": ("metadata.csv", b'file_name,text\n3.png,"a\n4.png,b\n', "is no CSV"),
    "endless cell": ("metadata.csv", b'file_name,text\n3.png,"' + b"x\n" * 200_000, "is no CSV"),
}


@pytest.mark.parametrize("case", NO_TABLE)
def test_what_is_no_table_is_refused_by_its_line(tmp_path: Path, case: str) -> None:
    name, table, sentence = NO_TABLE[case]
    root = write(tmp_path / "photos", PICTURES | {name: table})
    with pytest.raises(DataError, match=sentence) as refused:
        ImageFolder(str(root)).catalog(tmp_path / "spool")
    str(refused.value).encode()


def test_two_tables_or_one_further_down_are_refused(tmp_path: Path) -> None:
    both = write(tmp_path / "both", PICTURES | {"metadata.jsonl": jsonl(TOLD), "metadata.csv": as_csv(TOLD)})
    with pytest.raises(DataError, match="one of them is wanted"):
        ImageFolder(str(both)).catalog(tmp_path / "spool")
    below = write(tmp_path / "below", {"train/metadata.csv": as_csv(TOLD), "train/3.png": b"3"})
    with pytest.raises(DataError, match="name the folder 'train' itself"):
        ImageFolder(str(below)).catalog(tmp_path / "spool")
