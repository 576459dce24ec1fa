"""Tars of samples, written with `tarfile` or the webdataset package, which is also asked what it reads from them."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from diffusion_core.errors import ConfigError, DataError
from diffusion_core.spec import build
from pipelines.data.sources import Item, Source, Tars
from tests.pipelines.source_folders import read

WRITTEN_BY_PEER = """
import sys, webdataset
with webdataset.ShardWriter(sys.argv[1] + "/set-%03d.tar", maxcount=3, mtime=0, verbose=0) as shards:
    for number in range(8):
        shards.write({
            "__key__": f"{number:04d}", "png": b"png %d" % number, "cls": number % 3, "txt": f"number {number} \\u2713",
            "json": {"licence": "CC0", "url": f"https://a.b/{number}"},
        })
"""
READ_BY_PEER = """
import json, sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
    about = {key: data.hex() for key, data in sample.items() if not key.startswith("__")}
    print(json.dumps([sample["__key__"], about]))
"""


def peer(code: str, *arguments: str, secure: str) -> str:
    """What the peer prints; in its secure mode it decodes nothing dangerous, and writes nothing."""
    command = [sys.executable, "-c", code, *arguments]
    env = os.environ | {"WDS_SECURE": secure}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def tar(path: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def fault_of(tmp_path: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes]) -> tuple[str, str] | None:
    (item,) = read(Tars(str(tar(tmp_path / "a.tar", members))), tmp_path / "spool")
    assert not item.fault or item.fault[0] in ("bad_label", "bad_caption") or item.data == b""
    return item.fault


def test_tars_of_the_peer_are_read_as_the_peer_reads_them(tmp_path: Path) -> None:
    peer(WRITTEN_BY_PEER, str(tmp_path), secure="0")
    tars = sorted(map(str, tmp_path.glob("*.tar")))
    assert len(tars) == 3
    items = read(Tars(f"{tmp_path}/set-{{000..002}}.tar"), tmp_path / "spool")
    wanted = [json.loads(line) for line in peer(READ_BY_PEER, *tars, secure="1").splitlines()]
    assert [item.data for item in items] == [bytes.fromhex(sample["png"]) for _, sample in wanted]
    assert [item.caption for item in items] == [bytes.fromhex(sample["txt"]).decode() for _, sample in wanted]
    assert [item.label for item in items] == [bytes.fromhex(sample["cls"]).decode() for _, sample in wanted]
    assert [item.source for item in items] == [json.loads(bytes.fromhex(s["json"]))["url"] for _, s in wanted]
    assert {item.licence for item in items} == {"CC0"}
    assert [item.origin for item in items] == [f"set-00{n // 3}.tar/{key}.png" for n, (key, _) in enumerate(wanted)]
    sizes = [Path(path).stat().st_size for path in tars]
    assert [part.weight for part in Tars(f"{tmp_path}/*.tar").catalog(tmp_path / "spool").parts] == sizes


@pytest.mark.parametrize(
    "pattern",
    ["*.tar", "set-{0,1}.tar", "set-[01].tar", "set-?.tar", "", "**/*.tar"],
    ids=lambda pattern: pattern or ".",
)
def test_a_pattern_a_folder_and_a_list_name_the_same_tars(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in (1, 0):
        tar(folder / f"set-{number}.tar", {f"{number}.png": b"%d" % number})
    listed = Tars(paths=(f"{folder}/set-0.tar", f"{folder}/set-1.tar", f"{folder}/set-0.tar"))
    wanted = [Item("set-0.tar/0.png", b"0"), Item("set-1.tar/1.png", b"1")]
    assert read(Tars(f"{folder}/{pattern}"), tmp_path / "spool") == wanted == read(listed, tmp_path / "spool")


def test_a_name_with_brackets_is_that_file(tmp_path: Path) -> None:
    tar(tmp_path / "[1].tar", {"a.png": b"a"})
    assert read(Tars(f"{tmp_path}/[1].tar"), tmp_path / "spool") == [Item("[1].tar/a.png", b"a")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_formats_long_names_and_every_picture_suffix(tmp_path: Path, form: int) -> None:
    names = ["a.png", "b.JPG", "c.jpeg", "deep/er/d.webp", f"{'x' * 90}/{'y' * 60}.png", "./dotted/e.png"]
    path = tar(tmp_path / "a.tar", {name: name.encode() for name in names}, form)
    items = read(Tars(str(path)), tmp_path / "spool")
    assert [item.data.decode() for item in items] == names
    assert not any(item.fault for item in items)


def test_what_stands_beside_a_picture_says_what_it_is(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar",
        [
            ("1.jpg", b"1"),
            ("1.json", json.dumps({"label": 7, "caption": "seven", "license": "MIT", "source": "s"}).encode()),
            ("2.cls", b"cat\n"),
            ("2.png", b"2"),
            ("2.txt", "two\nlines \N{CAT FACE}\n".encode()),
            ("2.json", b'{"label": "dog", "text": "another"}'),
            ("3.png", b"3"),
            ("3.cls", b""),
            ("3.json", b'{"label": null, "width": [1, 2]}'),
        ],
    )
    assert read(Tars(str(path)), tmp_path / "spool") == [
        Item("a.tar/1.jpg", b"1", "7", "seven", "MIT", "s"),
        Item("a.tar/2.png", b"2", "cat", "two\nlines \N{CAT FACE}"),
        Item("a.tar/3.png", b"3"),
    ]


def test_hidden_members_are_passed_over(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"._a.png": b"fork", ".DS_Store": b"x", "a.png": b"a", ".git/b.png": b"b"})
    assert read(Tars(str(path)), tmp_path / "spool") == [Item("a.tar/a.png", b"a")]


FORBIDDEN = ("pyd", "pkl", "pickle", "pth", "pt", "dill", "ten", "mp", "gz", "tar", "so", "py", "svg", "gif", "")


@pytest.mark.parametrize("suffix", FORBIDDEN)
def test_a_member_of_another_kind_is_a_fault_of_its_sample_and_never_decoded(tmp_path: Path, suffix: str) -> None:
    bomb = b"cos\nsystem\n(S'exit 1'\ntR."
    members = {"a.png": b"a", "b.png": b"b", f"b.{suffix}": bomb, "c.png": b"c"}
    first, second, third = read(Tars(str(tar(tmp_path / "a.tar", members))), tmp_path / "spool")
    assert (first, third) == (Item("a.tar/a.png", b"a"), Item("a.tar/c.png", b"c"))
    assert second.fault is not None
    assert second.fault[0] == "bad_member"
    assert second.data == b""


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({"a.txt": b"no picture"}, "bad_member"),
        ({"README": b"no suffix"}, "bad_member"),
        ({"a.png": b"1", "a.jpg": b"2"}, "bad_member"),
        ([("a.png", b"1"), ("a.PNG", b"2")], "bad_member"),
        ({"a.png": b"1", "a.json": b"{"}, "bad_member"),
        ({"a.png": b"1", "a.json": b"[]"}, "bad_member"),
        ({"a.png": b"1", "a.json": b"\xff\xfe"}, "bad_member"),
        ({"a.png": b"1", "a.json": b"[" * 100_000}, "bad_member"),
        ({"a.png": b"1", "a.json": b" " * (1 << 20) + b"{}"}, "bad_member"),
        ({"a.png": b"1", "a.txt": b"x" * (1 << 20) + b"x"}, "bad_member"),
        ({"a.png": b"1", "a.txt": b"caf\xe9"}, "bad_caption"),
        ({"a.png": b"1", "a.txt": b" \n"}, "bad_caption"),
        ({"a.png": b"1", "a.json": b'{"text": NaN}'}, "bad_caption"),
        ({"a.png": b"1", "a.json": b'{"text": "\\ud83c"}'}, "bad_caption"),
        ({"a.png": b"1", "a.cls": b"\xff"}, "bad_label"),
        ({"a.png": b"1", "a.json": b'{"label": 1.5}'}, "bad_label"),
        ({"a.png": b"1", "a.json": b'{"label": [1]}'}, "bad_label"),
    ],
)
def test_a_hostile_sample_is_a_fault_of_its_own(
    tmp_path: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes], kind: str
) -> None:
    fault = fault_of(tmp_path, members)
    assert fault is not None
    assert fault[0] == kind
    assert fault[1].startswith("a.tar/")


def test_a_sample_torn_apart_is_a_fault(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.png": b"a", "b.png": b"b", "a.txt": b"far from its picture"})
    assert [item.fault and item.fault[0] for item in read(Tars(str(path)), tmp_path / "spool")] == [
        None,
        None,
        "bad_member",
    ]


def test_a_picture_too_long_is_not_taken(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.png": bytes(100), "b.png": bytes(101)})
    items = read(Tars(str(path), max_bytes=100), tmp_path / "spool")
    assert [(len(item.data), item.fault and item.fault[0]) for item in items] == [(100, None), (0, "too_large")]


@pytest.mark.parametrize("end", ["in a payload", "in a header", "before the end mark", "nothing"])
def test_a_torn_tar_is_refused_by_its_name_before_its_first_picture(tmp_path: Path, end: str) -> None:
    path = tar(tmp_path / "torn.tar", {f"{number}.png": bytes(700) for number in range(5)})
    length = {"in a payload": 512 * 8, "in a header": 512 * 3 + 100, "before the end mark": 512 * 15, "nothing": 0}[end]
    os.truncate(path, length)
    source = Tars(str(path))
    (part,) = source.catalog(tmp_path / "spool").parts
    with pytest.raises(DataError, match=r"^torn\.tar"):
        next(source.items(part))


def test_a_forged_header_is_refused_by_a_sentence(tmp_path: Path) -> None:
    """The reason is found deep in the walk, while pieces of the mapped file are still held."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("x" * 200 + ".png")
        file.addfile(info)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"path=", b"path\n"))
    source = Tars(str(path))
    (part,) = source.catalog(tmp_path / "spool").parts
    with pytest.raises(DataError, match=r"a\.tar.*pax header"):
        list(source.items(part))


def test_reading_can_end_early(tmp_path: Path) -> None:
    source = Tars(str(tar(tmp_path / "a.tar", {"a.png": b"a", "b.png": b"b"})))
    (part,) = source.catalog(tmp_path / "spool").parts
    items = source.items(part)
    next(items)
    items.close()


def test_a_link_in_a_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        file.addfile(link)
    source = Tars(str(path))
    (part,) = source.catalog(tmp_path / "spool").parts
    with pytest.raises(DataError, match=r"a\.tar.*link"):
        list(source.items(part))


@pytest.mark.parametrize("name", ["missing.tar", "none-*.tar", "empty"])
def test_tars_that_are_not_there_are_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    tar(tmp_path / "there.tar", {"a.png": b"a"})
    with pytest.raises(DataError, match=name.replace("*", r"\*")):
        Tars(paths=(f"{tmp_path}/there.tar", f"{tmp_path}/{name}")).catalog(tmp_path / "spool")


def test_a_pipe_named_as_a_tar_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="no regular file"):
        Tars(f"{tmp_path}/a.tar").catalog(tmp_path / "spool")


@pytest.mark.parametrize(
    "keywords",
    [
        {"path": "pipe:cat a.tar"},
        {"paths": ["a.tar", "pipe:cat a.tar"]},
        {"path": "https://user:secret@host/a.tar"},
        {"path": "gopher://host/a.tar"},
        {"paths": ["{a,pipe:cat}.tar", "ftp://host/a.tar"]},
        {},
        {"paths": []},
        {"path": "a.tar", "paths": ["b.tar"]},
        {"path": "a.tar", "max_bytes": 0},
    ],
)
def test_what_may_not_be_opened_is_refused_when_it_is_configured(keywords: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refused:
        build(Source, {"kind": "tars", **keywords}, "source")
    assert "secret" not in str(refused.value)


def test_braces_cannot_spell_what_may_not_be_opened(tmp_path: Path) -> None:
    """The address is checked again once its braces are spelt out."""
    with pytest.raises(ConfigError, match="pipe"):
        Tars("{pipe:cat /etc/hostname,a.tar}").catalog(tmp_path / "spool")
