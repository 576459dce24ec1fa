"""What prepare is made of: perceptual hashes, duplicates, the opt-out list, budgets and the report."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from rich.console import Console
from scipy.fft import dctn

from diffusion_core.errors import DataError
from diffusion_core.images import Fit, transcode
from pipelines import progress
from pipelines.data import duplicates, opt_out, quarantine
from pipelines.data.index import QUARANTINE, RefusalRow, read, rows
from pipelines.data.opt_out import OptOut
from pipelines.data.phash import Hasher, spelt
from pipelines.data.preparing import Budget, Done, Refused
from pipelines.data.quarantine import REPORT, Quarantine
from pipelines.data.sources import Part
from tests import made

SMOOTH = [
    np.asarray(
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((64, 48), 3)
    )
    for seed in range(40)
]


def hashes(*pictures: NDArray[np.uint8] | Image.Image) -> list[int]:
    hasher = Hasher()
    for pixels in pictures:
        hasher.add(np.asarray(Image.fromarray(np.asarray(pixels)).convert("L")))
    return hasher.hashes().tolist()


def bits(first: int, second: int) -> int:
    return (first ^ second).bit_count()


def test_a_hash_is_the_signs_of_scipys_dct_about_its_median() -> None:
    for pixels, found in zip(SMOOTH, hashes(*SMOOTH), strict=True):
        low = dctn(np.asarray(Image.fromarray(pixels).convert("L"), float), type=2)[:8, :8].ravel()
        # SciPy's cosine is not rounded, so that what lies at the median itself may fall on either side.
        clear = np.abs(low - np.median(low)) > 1e-3 * np.abs(low[1:]).max()
        wanted = low > np.median(low)
        ours = np.array([int(sign) for sign in f"{found:064b}"], bool)
        assert np.array_equal(ours[clear], wanted[clear]) and clear.sum() > 48
    assert spelt(5) == "0000000000000005"


def test_a_hash_survives_what_leaves_a_picture_the_same_to_the_eye() -> None:
    for pixels, found in zip(SMOOTH, hashes(*SMOOTH), strict=True):
        picture = Image.fromarray(pixels)
        blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)))
        small = np.asarray(picture.resize((40, 30), Image.Resampling.LANCZOS))
        lighter = (pixels * 0.8 + 40).astype(np.uint8)
        assert max(bits(found, other) for other in hashes(blurred, small, lighter)) <= 10
    assert np.mean([bits(*pair) for pair in zip(hashes(*SMOOTH), hashes(*SMOOTH[1:]), strict=False)]) > 20


def remade(original: Image.Image, way: str) -> Image.Image:
    """A copy that someone might have made of a picture."""
    width, height = original.size
    if way == "jpeg":
        buffer = io.BytesIO()
        original.save(buffer, "JPEG", quality=75)
        return Image.open(buffer)
    if way == "crop":  # three per cent of each side
        edge = (round(width * 0.015), round(height * 0.015))
        return original.crop((*edge, width - edge[0], height - edge[1]))
    return original.resize((width * 7 // 10, height * 7 // 10), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("way", "least"), [("jpeg", 0.8), ("resize", 0.8), ("crop", 0.7)])
def test_planted_copies_are_found_and_distinct_pictures_left_alone(way: str, least: float) -> None:
    """Every original, 200 of them, and a copy of every fourth, in any order."""
    originals = [Image.open(io.BytesIO(made.picture(1, number)[2])).convert("RGB") for number in range(200)]
    fit = Fit(((64, 64),))

    def seen(some: list[Image.Image]) -> NDArray[np.uint64]:
        return np.array(hashes(*(Image.open(io.BytesIO(transcode(png(one), 3, fit).png)) for one in some)), np.uint64)

    alone, copies = seen(originals), seen([remade(one, way) for one in originals[::4]])
    found = duplicates.near(np.concatenate([alone, copies]), 6)
    assert (found[: len(alone)] >= 0).mean() <= 0.03
    assert (found[len(alone) :] >= 0).mean() >= least


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_flat_pictures_of_any_level_are_one() -> None:
    flat = [np.full((32, 32, 3), level, np.uint8) for level in (1, 100, 255)]
    assert len(set(hashes(*flat))) == 1


def greedy(values: list[int], distance: int) -> list[bool]:
    """One after another, each against all that were kept."""
    kept: list[int] = []
    return [not any(bits(value, other) <= distance for other in kept) and not kept.append(value) for value in values]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), distance=st.integers(0, 12))
def test_near_duplicates_are_those_that_one_after_another_would_find(data: st.DataObject, distance: int) -> None:
    """Hashes in clusters and chains, so that there is much to decide."""
    values = [data.draw(st.integers(0, 2**64 - 1))]
    for _ in range(data.draw(st.integers(0, 60))):
        value = values[data.draw(st.integers(0, len(values) - 1))]
        for place in data.draw(st.lists(st.integers(0, 63), max_size=14)):
            value ^= 1 << place
        values.append(value)
    found = duplicates.near(np.array(values, np.uint64), distance).tolist()
    assert [place < 0 for place in found] == greedy(values, distance)
    for value, place in zip(values, found, strict=True):
        assert place < 0 or (found[place] < 0 and bits(value, values[place]) <= distance)


@pytest.mark.parametrize("distance", [1, 4, 9, 16])
def test_all_pairs_are_found(distance: int) -> None:
    rng = np.random.default_rng(distance)
    some = rng.integers(0, 2**64, 120, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, count, replace=False)) for count in rng.integers(1, 20, 120)]
    values = np.unique(np.concatenate([some, some ^ np.array(flips, np.uint64)]))
    near = np.bitwise_count(values[:, None] ^ values[None]) <= distance
    wanted = {(a, b) for a, b in zip(*np.nonzero(near), strict=True) if a < b}
    found = {pair for some in duplicates.pairs(values, distance) for pair in zip(some.first, some.second, strict=True)}
    assert found == wanted and wanted


def test_equal_digests_stand_for_the_first() -> None:
    sha256 = np.array([b"a" + bytes(31), b"b\0c" + bytes(29), b"b\0c" + bytes(29), b"b\0c" + bytes(29)], "S32")
    assert duplicates.equal(sha256).tolist() == [-1, -1, 1, 1]
    assert duplicates.equal(sha256[:0]).tolist() == []


def listed(tmp_path: Path, content: bytes) -> OptOut:
    (tmp_path / "list").write_bytes(content)
    return OptOut(opt_out.keep(str(tmp_path / "list"), tmp_path))


def test_the_opt_out_list_knows_its_lines(tmp_path: Path) -> None:
    digest = "0F" * 32
    known = listed(tmp_path, f"\ufeffdog/1.png\r\n# cat.png\n\n  naïve 🖼.jpg \n{digest}\n".encode())
    for name in ("dog/1.png", "naïve 🖼.jpg", digest.lower()):
        assert known.named(["other", name]) == name
    assert known.named(["cat.png", "# cat.png", "dog/1.pn", "", "1.png"]) is None
    assert listed(tmp_path, b"").named(["x"]) is None


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe\0a", "UTF-8"), (b"a\n" + b"x" * 5000, "line 2")])
def test_what_is_no_list_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        listed(tmp_path, content)
    with pytest.raises(DataError, match="gone"):
        opt_out.keep(str(tmp_path / "gone"), tmp_path)


def part(seen: int, *places: int, kind: str = "broken", unread: bool = False) -> Done:
    refused = [Refused(place, RefusalRow(f"{place}.png", kind, f"reason {place}", "")) for place in places]
    return Done(Part(0, seen, None), Path(), seen, refused=refused, unread=unread)


def test_the_share_counts_against_all_that_will_come() -> None:
    refused = Quarantine(Budget(400, 1.0, 100), 400, "pictures")
    for _ in range(4):
        refused.take(part(100, 5))
    refused.close()
    with pytest.raises(
        DataError, match=r"5 of 400 items.*max_quarantine_percent allows 1 %: reason 5; reason 5; reason 5$"
    ):
        refused.take(part(1, 0))


def test_of_an_unknown_number_the_share_counts_from_a_thousand_on() -> None:
    refused = Quarantine(Budget(None, 1.0, 100), 5, "bytes")
    refused.take(part(900, *range(0, 90, 2)))
    with pytest.raises(DataError, match="45 of 1,000 items"):
        refused.take(part(100))
    refused = Quarantine(Budget(None, 1.0, 100), 5, "bytes")
    refused.take(part(900, *range(0, 90, 2)))
    with pytest.raises(DataError, match="45 of 900 items"):
        refused.close()


def test_refusals_in_a_row_are_counted_across_parts() -> None:
    refused = Quarantine(Budget(None, 100.0, 5), 5, "bytes")
    refused.take(part(10, 2, 3, 4, 5, 8, 9))  # four in a row, then two
    refused.take(part(3, 0, 1, 2))  # which makes five
    with pytest.raises(DataError, match=r"6 items in a row.*max_consecutive allows 5: reason 8; reason 9; reason 0$"):
        refused.take(part(4, 0))
    refused = Quarantine(Budget(None, 100.0, 5), 5, "bytes")
    refused.take(part(5, *range(5)))
    refused.take(part(5, *range(1, 5)))  # the picture between them ends the row


def test_decisions_use_up_no_budget() -> None:
    refused = Quarantine(Budget(10, 0.0, 0), 10, "pictures")
    refused.take(part(10, *range(9), kind="opt_out"))
    refused.close()
    assert len(refused.rows) == 9


def test_a_part_that_broke_off_counts_by_its_weight() -> None:
    refused = Quarantine(Budget(None, 30.0, 100), 1000, "bytes")
    refused.take(part(300, 299, unread=True))
    with pytest.raises(DataError, match="301 of 1,000 bytes are in parts that cannot be read to their end.*30 %"):
        refused.take(part(1, unread=True))


def test_without_any_picture_there_is_no_data_set() -> None:
    refused = Quarantine(Budget(2, 100.0, 100), 2, "pictures")
    refused.take(part(2, 0, 1))
    with pytest.raises(DataError, match="no usable picture among 2: reason 0; reason 1"):
        refused.close()


def test_the_table_is_sorted_and_the_report_cannot_be_led_astray(tmp_path: Path) -> None:
    nasty = "a|b`c` <script>[x](javascript:1)\n# big ![i](http://x)"
    some = [RefusalRow(nasty, "broken", "torn\0", "aa"), RefusalRow("a.png", "animated", "moves", "bb")]
    many = [RefusalRow(f"{n}.png", "duplicate", "of a", "cc") for n in range(25)]
    counts = quarantine.write(tmp_path, some, iter(many))
    assert counts == {"broken": 1, "animated": 1, "duplicate": 25}
    assert rows(read(tmp_path / QUARANTINE, RefusalRow), RefusalRow) == [some[1], some[0], *many]
    report = (tmp_path / REPORT).read_text(encoding="utf-8")
    assert "| duplicate | 25 | a decision |" in report and "| broken | 1 | a defect |" in report
    assert "| `a\\|b'c' <script>[x](javascript:1) # big ![i](http://x)` | `torn` |" in report
    assert "`19.png`" in report and "`20.png`" not in report and "the first 20" in report


def test_an_empty_quarantine_says_so(tmp_path: Path) -> None:
    assert not quarantine.write(tmp_path, [], [])
    assert "Nothing was left out." in (tmp_path / REPORT).read_text()


def test_a_bar_tells_rate_and_time_left_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty units in eight seconds are five a second, and the sixty left take twelve."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "LINE_EVERY", 1.0)
    log = io.StringIO()
    with progress.Bar(Console(file=log), "decode, pictures", 100) as bar:
        now += 8
        bar.step(40)
        now += 12
        bar.to(100, "done")
    assert log.getvalue().splitlines() == [
        "decode, pictures: 40 of 100, 5/s, 12 s left",
        "decode, pictures: 100 of 100 done, 5/s, 0 s left",
        "decode, pictures: 100 of 100 in 20.0 s, 5/s",
    ]
