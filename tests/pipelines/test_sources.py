"""Digits and image folders on disk, against scikit-learn and plain files; addresses that may not be opened."""

import io
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from diffusion_core.errors import ConfigError, DataError
from diffusion_core.spec import build, spec
from pipelines.data.sources import Digits, ImageFolder, Item, Source, listing
from pipelines.data.sources.address import spelt_out
from pipelines.data.sources.store import in_lanes
from tests.pipelines.source_folders import faults, read, write


def test_digits_are_those_of_sklearn(tmp_path: Path) -> None:
    items, oracle = read(Digits(), tmp_path), load_digits()
    assert Digits().catalog(tmp_path).classes == tuple("0123456789")
    assert [item.label for item in items] == [str(target) for target in oracle.target]
    assert [item.origin for item in items[::1796]] == ["sklearn.digits/0000", "sklearn.digits/1796"]
    scans = np.stack([np.asarray(Image.open(io.BytesIO(item.data))) for item in items])
    assert np.array_equal(np.rint(scans / 255 * 16), oracle.images)


def test_class_folders_hand_out_the_files_own_bytes(tmp_path: Path) -> None:
    names = ("dog/b.png", "cat/deep/a.PNG", "cat/notes.txt", "dog/.hidden.png", ".git/x.png", "cat/.trash/y.png")
    root = write(tmp_path / "photos", {name: name.encode() for name in names} | {"readme.txt": b"beside the folders"})
    items = read(ImageFolder(str(root)), tmp_path / "spool")
    assert items == [
        Item("cat/deep/a.PNG", b"cat/deep/a.PNG", "cat"),
        Item("cat/notes.txt", b"cat/notes.txt", "cat"),
        Item("dog/b.png", b"dog/b.png", "dog"),
    ]
    assert read(ImageFolder(f"file://{root}"), tmp_path / "spool") == items


def test_a_flat_folder_is_pictures_without_labels(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", {"b.png": b"b", "a.jpg": b"a", ".DS_Store": b"x"})
    assert read(ImageFolder(str(root)), tmp_path / "spool") == [Item("a.jpg", b"a"), Item("b.png", b"b")]


def test_a_folder_named_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", {"cat/a.png/b.png": b"b"})
    assert read(ImageFolder(str(root)), tmp_path / "spool") == [Item("cat/a.png/b.png", b"b", "cat")]


def test_many_files_are_listed_through_the_spool_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SORTED_AT_ONCE", 100)
    names = [f"{number % 7}/{number * 7919 % 1303:04d}.png" for number in range(1303)]
    root, spool = write(tmp_path / "photos", {name: b"" for name in names}), tmp_path / "spool"
    catalog = ImageFolder(str(root)).catalog(spool)
    parts = list(catalog.parts)
    assert [part.weight for part in parts] == [512, 512, 279]
    assert [item.origin for part in parts for item in ImageFolder(str(root)).items(part)] == sorted(names)
    assert [path.name for path in spool.iterdir()] == ["pictures.jsonl"]


def test_names_that_are_no_utf8_or_hold_a_newline_are_read_and_spelt_out(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    (root / "cat").mkdir(parents=True)
    for name in (b"\xff\xfe.png", b"new\nline.png", "\N{CAT FACE}.png".encode()):
        Path(os.fsdecode(os.fsencode(root / "cat") + b"/" + name)).write_bytes(name)
    items = read(ImageFolder(str(root)), tmp_path / "spool")
    assert {item.data for item in items} == {b"\xff\xfe.png", b"new\nline.png", "\N{CAT FACE}.png".encode()}
    assert all(item.origin.encode() for item in items)
    assert len({item.origin for item in items}) == 3


def test_links_that_leave_the_folder_pipes_and_broken_links_are_faults(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", {"cat/a.png": b"a", "cat/deep/x.png": b"x"})
    secret = write(tmp_path / "elsewhere", {"secret.png": b"secret"})
    (root / "cat/in.png").symlink_to("a.png")
    (root / "cat/out.png").symlink_to(secret / "secret.png")
    (root / "cat/gone.png").symlink_to("nowhere.png")
    (root / "cat/loop.png").symlink_to("loop.png")
    (root / "cat/folder").symlink_to(secret)
    (root / "cat/again").symlink_to("deep")
    os.mkfifo(root / "cat/pipe.png")
    items = read(ImageFolder(str(root)), tmp_path / "spool")
    good = {"cat/a.png": b"a", "cat/deep/x.png": b"x", "cat/in.png": b"a"}
    assert {item.origin: item.data for item in items if not item.fault} == good
    bad = {f"cat/{name}" for name in ("out.png", "gone.png", "loop.png", "folder", "again", "pipe.png")}
    assert {item.origin: item.fault[0] for item in items if item.fault} == dict.fromkeys(bad, "unreadable")
    assert not any(b"secret" in item.data or str(tmp_path) in str(item.fault) for item in items)


def test_a_file_too_long_is_not_read_whole(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", {"cat/a.png": bytes(1000), "cat/b.png": bytes(1001)})
    with (root / "cat/huge.png").open("wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that would not fit into memory
    items = read(ImageFolder(str(root), max_bytes=1000), tmp_path / "spool")
    assert faults(items) == {"cat/a.png": None, "cat/b.png": "too_large", "cat/huge.png": "too_large"}
    assert len(items[0].data) == 1000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_fault(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", {"cat/a.png": b"a"})
    (root / "cat/a.png").chmod(0)
    assert faults(read(ImageFolder(str(root)), tmp_path / "spool")) == {"cat/a.png": "unreadable"}


def test_a_file_that_vanishes_after_listing_is_a_fault(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", {"cat/a.png": b"a", "cat/b.png": b"b"})
    source = ImageFolder(str(root))
    (part,) = source.catalog(tmp_path / "spool").parts
    (root / "cat/a.png").unlink()
    assert faults(source.items(part)) == {"cat/a.png": "unreadable", "cat/b.png": None}


@pytest.mark.parametrize("made", [None, ".", "cat"], ids=["missing", "empty", "empty class folder"])
def test_a_folder_without_pictures_is_refused_by_its_path(tmp_path: Path, made: str | None) -> None:
    root = tmp_path / "photos"
    if made:
        (root / made).mkdir(parents=True)
    with pytest.raises(DataError, match=str(root)):
        ImageFolder(str(root)).catalog(tmp_path / "spool")


def test_a_file_as_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"photos": b"a file"})
    with pytest.raises(DataError, match="photos"):
        ImageFolder(str(tmp_path / "photos")).catalog(tmp_path / "spool")


REFUSED = {
    "pipe:cat /etc/hostname": "may not begin with 'pipe:'",
    "ssh://host/photos": "may not begin with 'ssh:'",
    "simplecache::s3://bucket/x": "may not begin with 'simplecache:'",
    "S3://bucket/x": "did you mean 's3'",
    "http:photos": "may not begin with 'http:'",
    "http://user:secret@127.0.0.1/x": "credentials come from the environment",
    "s3://key@bucket/x": "credentials come from the environment",
    "http://[::1/x": "cannot be read",
    "file://server/photos": "names the machine 'server'",
    "http://127.0.0.1/x?token=1": "has a query",
    "": "names nothing",
    "a\0b": "names nothing",
}


@pytest.mark.parametrize("path", REFUSED)
def test_an_address_that_may_not_be_opened_is_refused_when_it_is_read(path: str) -> None:
    with pytest.raises(ConfigError, match="source") as refused:
        build(Source, {"kind": "image_folder", "path": path}, "prepare.source")
    assert REFUSED[path] in str(refused.value)
    assert "secret" not in str(refused.value)


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    files = {"train/cat/1.png": b"1", "test/dog/2.png": b"2"}
    root = write(tmp_path / "photos", files)
    with pytest.raises(DataError, match=r"test, train, which are splits.*photos/test"):
        ImageFolder(str(root)).catalog(tmp_path / "spool")
    plain = write(tmp_path / "plain", {"train/1.png": b"1", "test/2.png": b"2"})  # classes of these names
    assert [item.label for item in read(ImageFolder(str(plain)), tmp_path / "other")] == ["test", "train"]


def test_lanes_keep_the_order_and_do_not_run_ahead() -> None:
    taken = []

    def endless() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield number

    stream = in_lanes(lambda number: number**2, endless(), 4)
    assert [next(stream) for _ in range(50)] == [number**2 for number in range(50)]
    assert len(taken) < 50 + 4
    stream.close()


def test_the_family_is_complete_and_is_its_own_configuration() -> None:
    ours = {name for name, kind in Source.kinds().items() if kind.__module__.startswith("pipelines.")}
    assert ours == {"digits", "image_folder", "tars", "parquet"}
    for plain in (
        {"kind": "digits"},
        {"kind": "image_folder", "path": "s3://bucket/photos", "max_bytes": 5},
        {"kind": "tars", "path": None, "paths": ["a.tar", "b.tar"], "max_bytes": 5},
        {"kind": "parquet", "path": "a", "image": "i", "label": "l", "caption": None, "licence": None, "source": None}
        | {"max_bytes": 5},
    ):
        assert spec(build(Source, plain, "source")) == plain


LISTS = st.lists(st.text("ab0", max_size=2), min_size=2, max_size=3).map(lambda words: f"{{{','.join(words)}}}")
COUNTS = st.tuples(st.integers(0, 120), st.integers(0, 120), st.integers(1, 4)).map(
    lambda ends: f"{{{ends[0]:0{ends[2]}d}..{ends[1]:0{ends[2]}d}}}"
)


@given(st.lists(LISTS | COUNTS | st.text("ab-/", max_size=3) | st.just("{a}"), max_size=2).map("".join))
def test_braces_are_those_of_the_peer(pattern: str) -> None:
    """Against the package that webdataset uses."""
    assert spelt_out(pattern) == list(braceexpand(pattern, escape=False))


@pytest.mark.parametrize("pattern", ["{0..999999999999}", "{0..9999}{0..9999}", "{a,b}" * 1000])
def test_braces_without_bound_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="more than"):
        spelt_out(pattern)


def test_braces_in_braces_are_refused() -> None:
    with pytest.raises(ConfigError, match="braces in braces"):
        spelt_out("{a,{b,c}}")
    assert spelt_out("one{alone") == ["one{alone"]
