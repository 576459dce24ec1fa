"""What validate measures, against scipy, Pillow, Python's own decoder and search by brute force."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from scipy.special import rel_entr
from scipy.stats import ks_2samp

from pipelines.data import drift, measures, near, sampled
from tests.pipelines.data_folder import png

HASHES = arrays.arrays(np.uint64, st.integers(0, 40), elements=st.integers(0, 2**64 - 1))
SAMPLES = st.lists(st.integers(-5, 5) | st.floats(-1e6, 1e6), min_size=1, max_size=50).map(np.array)


@settings(deadline=None)
@given(HASHES, HASHES, st.integers(0, 8), st.data())
def test_a_twin_is_found_wherever_brute_force_finds_one(
    asked: np.ndarray, known: np.ndarray, distance: int, data: st.DataObject
) -> None:
    if len(known):  # random hashes are far apart: some are put near
        for place in range(0, len(asked), 2):
            bits = data.draw(st.sets(st.integers(0, 63), max_size=distance + 1))
            asked[place] = known[place % len(known)] ^ np.uint64(sum(1 << bit for bit in bits))
    found = near.close(asked, known, distance)
    for one, place in zip(asked.tolist(), found.tolist(), strict=True):
        apart = [(one ^ other).bit_count() for other in known.tolist()]
        assert (place >= 0) == (min(apart, default=65) <= distance)
        assert place < 0 or apart[place] <= distance


@settings(deadline=None)
@given(SAMPLES, SAMPLES)
def test_the_distance_is_that_of_kolmogorov_and_smirnov(now: np.ndarray, before: np.ndarray) -> None:
    assert drift.distance(now, before) == pytest.approx(ks_2samp(now, before).statistic, abs=1e-12)


def test_where_one_side_has_no_sample_the_distance_is_greatest() -> None:
    none, some = np.array([]), np.array([1.0])
    assert [drift.distance(*pair) for pair in ((none, none), (none, some), (some, none))] == [0, 1, 1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 1000)), min_size=1, max_size=20))
def test_the_stability_index_is_the_divergence_both_ways(counts: list[tuple[int, int]]) -> None:
    now, before = np.array(counts).T
    p, q = now / now.sum(), before / before.sum()
    wanted = rel_entr(p, q).sum() + rel_entr(q, p).sum()
    assert drift.stability_index(now, before) == pytest.approx(wanted, abs=1e-12)


def test_a_class_that_went_is_a_large_but_finite_drift() -> None:
    found = drift.stability_index(np.array([100, 0]), np.array([50, 50]))
    p, q = np.array([100, 0.5]) / 100.5, np.array([0.5, 0.5])
    assert found == pytest.approx((rel_entr(p, q) + rel_entr(q, p)).sum())


def labelled(labels: list[int]) -> pa.Table:
    rest = {name: [8] * len(labels) for name in ("width", "height", "size")}
    return pa.table({"label": labels, **rest, "caption": pa.array([None] * len(labels), pa.string())})


def test_classes_are_compared_by_name() -> None:
    now, before = labelled([0, 0, 1, -1]), labelled([2, 2, 0, -1])
    bounds = drift.Drift(label=0.5)
    same = drift.drifted(now, before, (("ant", "bee"), ("bee", "cat", "ant")), bounds)
    assert same["found"].tolist() == [0.0] * 5
    assert same["bound"].tolist() == [0.5, 0.1, 0.1, 0.1, 0.1]
    other = drift.drifted(now, before, (("ant", "bee"), ("ant", "bee", "cat")), bounds)
    p, q = np.array([1, 2, 1, 0.5]) / 4.5, np.array([1, 1, 0.5, 2]) / 4.5  # none, ant, bee, cat
    assert other["found"][0] == pytest.approx((rel_entr(p, q) + rel_entr(q, p)).sum())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16"])
def test_the_mode_in_a_header_is_the_one_that_pillow_finds(mode: str) -> None:
    buffer = io.BytesIO()
    drawn = {"P": "RGB", "PA": "RGBA", "1": "L"}.get(mode, mode)
    noise = np.random.default_rng(0).integers(0, 255, (9, 7, 4), np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(noise.squeeze()).convert(drawn).convert(mode.replace("PA", "P"))
    picture.save(buffer, "PNG", transparency=3) if mode == "PA" else picture.save(buffer, "PNG")
    found = sampled.mode(buffer.getvalue())
    assert Image.open(io.BytesIO(buffer.getvalue())).mode == {"PA": "P"}.get(mode, mode)
    assert found == {"1": "L;1", "I;16": "L;16", "PA": "P, transparent"}.get(mode, mode)


def test_what_is_no_png_has_no_mode() -> None:
    for data in (b"", png(0)[:20], png(0, form="JPEG"), b"\x89PNG\r\n\x1a\n" + bytes(40)):
        assert sampled.mode(data) == "no PNG"


TEXTS = st.lists(st.none() | st.binary(max_size=4) | st.text(max_size=4).map(str.encode), max_size=40)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_text_that_is_no_utf_8_is_found_row_by_row(keys: list[bytes | None], captions: list[bytes | None]) -> None:
    count = min(len(keys), len(captions))
    table = pa.table({name: as_text(texts[:count]) for name, texts in (("key", keys), ("caption", captions))})
    legible, garbled = measures.legible(table)
    for row in range(count):
        broken = [name for name, texts in (("key", keys), ("caption", captions)) if not is_utf_8(texts[row])]
        assert garbled.get(row, "") == ", ".join(broken)
    legible.validate(full=True)
    assert legible["key"].to_pylist() == [
        None if key is None else key.decode("utf-8", "replace") for key in keys[:count]
    ]


def as_text(texts: list[bytes | None]) -> pa.ChunkedArray:
    """Text as a faulty writer would leave it, in two chunks."""
    half = len(texts) // 2
    chunks = [pa.array(part, pa.binary()) for part in (texts[:half], texts[half:])]
    return pa.chunked_array([pa.Array.from_buffers(pa.string(), len(part), part.buffers()) for part in chunks])


def is_utf_8(text: bytes | None) -> bool:
    try:
        (text or b"").decode()
    except UnicodeDecodeError:
        return False
    return True
