"""The walk over a tar's headers, against `tarfile` on good ones and by a named outcome on damaged and hostile ones."""

import gzip
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.errors import DataError
from pipelines.data import headers, tar
from pipelines.data.tar import Member, Seen, members, parted

BLOCK = 512
LIMIT = 64 * 2**20  # bytes by which memory may grow

COUNT_MEMBERS = """
import mmap, sys
from pipelines.data.tar import members
def private():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    before, most, count = private(), 0, 0
    for count, _ in enumerate(members(data, path), 1):
        if count % 50_000 == 0:
            most = max(most, private() - before)
    print(max(most, private() - before), count)
"""


def header(name: str | bytes, size: int | bytes = 0, kind: bytes = b"0", **fields: bytes) -> bytes:
    """A header by the letter of POSIX; raw bytes may stand for a number, and `fields` for some of the others."""
    raw = name if isinstance(name, bytes) else name.encode()
    parts = {
        "name": raw.ljust(100, b"\0"),
        "mode": b"0000644\0",
        "uid": b"0000000\0",
        "gid": b"0000000\0",
        "size": size if isinstance(size, bytes) else b"%011o\0" % size,
        "mtime": b"%011o\0" % 0,
        "sum": b" " * 8,
        "kind": kind,
        "link": bytes(100),
        "magic": b"ustar\x0000",
        "rest": bytes(247),
    } | fields
    block = b"".join(parts.values())
    assert len(block) == BLOCK
    return block.replace(b" " * 8, b"%06o\0 " % sum(block), 1) if "sum" not in fields else block


def member(name: str | bytes, data: bytes = b"x", kind: bytes = b"0", **fields: bytes) -> bytes:
    return header(name, len(data), kind, **fields) + data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")


def pax(*records: tuple[str, str], kind: bytes = b"x") -> bytes:
    lines = b""
    for key, value in records:
        line = f" {key}={value}\n".encode()
        length = next(n for n in range(len(line), len(line) + 8) if n == len(line) + len(str(n)))
        lines += str(length).encode() + line
    return member("pax", lines, kind)


END = bytes(2 * BLOCK)
GOOD = member("a.json", b"{}") + member("a.png", b"picture")


def made(files: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar as the standard library writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def listed(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as read:
        return [(entry.name, entry.offset_data, entry.size) for entry in read if entry.isreg()]


def outcome(data: bytes | memoryview) -> list[Member]:
    return list(members(data, "t.tar"))


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty file"),
    "gzip": (gzip.compress(GOOD + END), "compressed with gzip"),
    "not a tar": (b"plain text ".ljust(BLOCK, b".") + END, "wrong checksum"),
    "cut in a header": (GOOD[: BLOCK * 2 + 100], "cut off"),
    "cut in a payload": (member("a.png", bytes(2000))[: BLOCK * 3], "says 2000 bytes, and 1024 are left"),
    "cut in the padding": (GOOD[:-100], "cut off"),
    "no end mark": (GOOD, "no end mark"),
    "half an end mark": (GOOD + bytes(BLOCK), "cut off in its end mark"),
    "bytes after the end mark": (GOOD + END + GOOD, "more bytes after its end mark"),
    "wrong checksum": (GOOD + header("b.png", sum=b"000777\0 ") + END, "byte 2048 has a header with a wrong checksum"),
    "no checksum": (GOOD + header("b.png", sum=b"zzzzzz\0 ") + END, "wrong checksum"),
    "hard link": (GOOD + header("b.png", kind=b"1", link=b"a.png".ljust(100, b"\0")) + END, "'b.png' is a hard link"),
    "symbolic link": (header("b.png", kind=b"2", link=b"/etc/x".ljust(100, b"\0")) + END, "'b.png' is a symbolic link"),
    "character device": (header("b.png", kind=b"3") + END, "'b.png' is a device"),
    "block device": (header("b.png", kind=b"4") + END, "'b.png' is a device"),
    "named pipe": (header("b.png", kind=b"6") + END, "'b.png' is a named pipe"),
    "unknown kind": (header("b.png", kind=b"Q") + END, "unknown kind b'Q'"),
    "absolute name": (GOOD + member("/etc/passwd.txt") + END, "'/etc/passwd.txt' leads out"),
    "name upwards": (GOOD + member("b/../../c.png") + END, "'b/../../c.png' leads out"),
    "absolute by pax": (pax(("path", "/b.png")) + member("b.png") + END, "'/b.png' leads out"),
    "sparse by GNU": (header("b.png", kind=b"S") + END, "'b.png' is a sparse file"),
    "sparse by pax": (pax(("GNU.sparse.major", "1")) + member("b.png") + END, "begins a sparse file"),
    "10 GB claimed": (header("b.png", size=b"\x80" + (10 << 30).to_bytes(11)) + END, "says 10737418240 bytes"),
    "size below zero": (header("b.png", size=b"\xff" * 12) + END, "no number above 0"),
    "size in words": (header("b.png", size=b"+0000000001\0") + END, "no number above 0"),
    "name twice": (GOOD + member("a.png") + END, "'a.png' is there twice"),
    "name twice, far apart": (GOOD + member("b.cls") + member("a.png") + END, "'a.png' is there twice"),
    "name with NUL by pax": (pax(("path", "b.png\0.txt")) + member("b.png") + END, "holds NUL"),
    "name not UTF-8": (GOOD + member(b"\xff\xfe.png") + END, "not UTF-8"),
    "no name": (GOOD + member("") + END, "empty"),
    "pax size too large": (pax(("size", "99999")) + member("b.png") + END, "says 99999 bytes"),
    "pax size below zero": (pax(("size", "-1")) + member("b.png") + END, "no number above 0"),
    "pax broken": (member("pax", b"99 path=b.png\n", b"x") + member("b.png") + END, "broken pax header"),
    "pax for all": (pax(("path", "b.png"), kind=b"g") + GOOD + END, "gives every member one path"),
    "two names of one": (pax(("path", "b.png")) + member("c.png\0", kind=b"L") + GOOD + END, "a second path"),
    "pax and nothing": (GOOD + pax(("path", "b.png")) + END, "promised by an extended header and missing"),
    "endless pax": (member("pax", b"x" * (2**20 + 1), b"x") + GOOD + END, "more than 1048576 bytes"),
    "endless name": (pax(("path", "b" * 4097)) + member("b.png") + END, "a name of 4,097 bytes"),
    "folder with bytes": (member("b", b"x", b"5") + END, "folder of 1 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_tar_is_refused_by_name_and_reason(case: str) -> None:
    data, reason = REFUSED[case]
    for given_as in (data, memoryview(data)):
        with pytest.raises(DataError, match=rf"^t\.tar.*{reason}"):
            outcome(given_as)


TAKEN: dict[str, tuple[bytes, list[str]]] = {
    "no member": (END, []),
    "upper case": (member("A.PNG") + END, ["A.PNG"]),
    "same key in two folders": (member("x/a.png") + member("y/a.png") + END, ["x/a.png", "y/a.png"]),
    "a key in pieces": (GOOD + member("b.png") + member("a.txt") + END, ["a.json", "a.png", "b.png", "a.txt"]),
    "a folder between": (member("b/", b"", b"5") + member("b/a.png") + END, ["b/a.png"]),
    "an old folder": (member("b/", b"", b"\0") + member("b/a.png", kind=b"\0") + END, ["b/a.png"]),
    "a prefix": (member("a.png", rest=bytes(80) + b"far/away".ljust(167, b"\0")) + END, ["far/away/a.png"]),
    "a comment for all": (pax(("comment", "hi"), kind=b"g") + GOOD + END, ["a.json", "a.png"]),
    "dots in a name": (GOOD + member("b..c.png") + END, ["a.json", "a.png", "b..c.png"]),
    "no zero after the size": (member("a.png", b"123", mode=b"000644 \0") + END, ["a.png"]),
    "more zeros": (GOOD + bytes(BLOCK * 20), ["a.json", "a.png"]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_an_odd_tar_is_taken_for_what_it_is(case: str) -> None:
    data, wanted = TAKEN[case]
    found = outcome(data)
    assert [entry.name for entry in found] == wanted
    assert found == listed(data)


def test_a_name_is_parted_as_the_webdataset_package_does() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("a.png", "x/a.seg.PNG", "v1.2/b.c.json", "./a.txt", "v1/x.y/z.cls"):
        key, suffix = base_plus_ext(name)
        assert parted(name) == (key, suffix.lower())


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150).filter(
    lambda name: not name.startswith("/") and not name.endswith("/") and ".." not in name.split("/")
)
FILES = st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8, unique_by=lambda file: file[0])


@settings(deadline=None, max_examples=150)
@given(files=FILES, form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_names_offsets_and_sizes_are_those_of_tarfile(files: list[tuple[str, bytes]], form: int) -> None:
    data = made(files, form)
    found = list(members(data, "t.tar"))
    assert found == listed(data) and [entry.name for entry in found] == [name for name, _ in files]
    assert [data[entry.offset : entry.offset + entry.size] for entry in found] == [content for _, content in files]


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_one_changed_byte_of_a_header_is_never_read_as_something_else(data: st.DataObject) -> None:
    """The checksum is a sum: any single byte changed is seen, wherever it is."""
    good = bytearray(made([("a.json", b"{}"), ("a.png", bytes(700)), ("b.png", b"x")]))
    offsets = [entry[1] - BLOCK for entry in listed(bytes(good))]
    field, before = data.draw(st.integers(0, BLOCK - 1)), listed(bytes(good))
    good[data.draw(st.sampled_from(offsets)) + field] ^= data.draw(st.integers(1, 255))
    if 148 <= field < 156:  # the checksum itself: the same number can be written in several ways
        with suppress(DataError):
            assert list(members(bytes(good), "t.tar")) == before
    else:
        with pytest.raises(DataError, match="checksum"):
            list(members(bytes(good), "t.tar"))


def cuts(size: int, edges: Sequence[int]) -> list[int]:
    """200 places, and every edge of a member with what is beside it."""
    spread = [size * number // 201 for number in range(1, 201)]
    return sorted({place for place in [*spread, *(e + d for e in edges for d in (-1, 0, 1))] if 0 <= place < size})


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_before_its_end_mark_is_refused(form: int) -> None:
    data = made(
        [(f"{n:03d}.{suffix}", os.urandom(n * 97 % 1300)) for n in range(20) for suffix in ("cls", "png")], form
    )
    places = listed(data)
    end = places[-1][1] + -(-places[-1][2] // BLOCK) * BLOCK + 2 * BLOCK  # what is after it is zeros of no meaning
    for cut in cuts(end, [edge for _, start, size in places for edge in (start - BLOCK, start, start + size)]):
        with pytest.raises(DataError, match="t.tar"):
            list(members(data[:cut], "t.tar"))
    assert len(list(members(data[:end], "t.tar"))) == len(places)


def test_ordinary_headers_and_all_others_are_walked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain files are found many at once, in windows; what they are does not depend on where a window ends."""
    data = made([(f"{n}.png", bytes(n * 31 % 3000)) for n in range(300)])
    for blocks in (1, 2, 7, 100):
        monkeypatch.setattr(headers, "WINDOW", blocks)
        assert list(members(data, "t.tar")) == listed(data)
    monkeypatch.setattr(tar, "ordinary", lambda data, position: [])
    assert list(members(data, "t.tar")) == listed(data)


@pytest.mark.parametrize("planted", [b"ustar\x0000", header("inner.png", 5)], ids=["magic", "header"])
def test_a_tar_inside_a_payload_is_payload(planted: bytes) -> None:
    inner = bytes(257) + planted if len(planted) < BLOCK else planted
    data = made([("a.png", inner.ljust(2 * BLOCK, b"\0") + inner), ("b.png", b"x")])
    assert list(members(data, "t.tar")) == listed(data)


def test_a_name_is_remembered_among_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "REMEMBERED", 10)
    seen = Seen()
    assert [seen.again([f"{n}"]) for n in range(95)] == [None] * 95
    assert seen.again(["new", "17", "x"]) == "17" and seen.again(["y", "94"]) == "94" and seen.again(["z", "z"]) == "z"


def write_tiny(path: Path) -> None:
    """A million files of no bytes, 512 MB, whose names differ in their digits."""
    with path.open("wb") as out:
        block = header("000000000.txt")
        head, tail, rest = block[13:148], block[156:], sum(block) - sum(block[148:156]) + 256 - sum(b"0" * 9)
        for thousand in range(1000):
            names = [b"%09d" % (thousand * 1000 + number) for number in range(1000)]
            out.writelines(b"%b.txt%b%06o\0 %b" % (name, head, rest + sum(name), tail) for name in names)
        out.write(END)


def write_claim(path: Path) -> None:
    """Ten gigabytes claimed and, on paper, there: a file with a hole."""
    with path.open("wb") as out:
        out.write(GOOD + header("b.png", size=b"\x80" + (10 << 30).to_bytes(11)))
        out.truncate(out.tell() + (10 << 30) + 4 * BLOCK)


def write_pax(path: Path) -> None:
    path.write_bytes(pax(*((f"key{n}", "x" * 100) for n in range(8000))) + GOOD + END)


def test_memory_stays_small(tmp_path: Path) -> None:
    cases = {write_claim: 3, write_pax: 2, write_tiny: 1_000_000}
    paths = [tmp_path / f"{write.__name__}.tar" for write in cases]
    for write, path in zip(cases, paths, strict=True):
        write(path)
    done = subprocess.run([sys.executable, "-c", COUNT_MEMBERS, *paths], capture_output=True, text=True, check=True)
    for path in paths:
        path.unlink()  # half a gigabyte
    for line, count in zip(done.stdout.splitlines(), cases.values(), strict=True):
        grown, found = map(int, line.split())
        assert found == count and grown < LIMIT
