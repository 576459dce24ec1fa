"""Pictures: untrusted bytes give a picture or a DataError, and what is written is what plain Pillow reads."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_core.errors import DataError
from diffusion_core.images import decode, encode_png, grid, resize, to_pixels, to_tensor

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def saved(pixels, format, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


ENCODED = {"PNG": saved(NOISE, "PNG"), "JPEG": saved(NOISE, "JPEG"), "WEBP": saved(NOISE, "WEBP", lossless=True)}


@pytest.mark.parametrize("format", ENCODED)
@pytest.mark.parametrize("channels", [1, 3])
def test_reads_what_pillow_reads(format, channels):
    wanted = Image.open(io.BytesIO(ENCODED[format])).convert({1: "L", 3: "RGB"}[channels])
    found = decode(ENCODED[format], channels)
    assert found.dtype == np.uint8 and found.shape == (24, 40, channels)
    assert np.array_equal(found.squeeze(), np.asarray(wanted))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_any_mode_becomes_the_wanted_one(mode):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    picture = Image.fromarray(ramp * 257) if mode == "I;16" else Image.fromarray(ramp.astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    found = decode(buffer.getvalue(), 3)
    assert found.shape == (16, 16, 3)
    if mode != "1":
        assert np.abs(found[..., 0].astype(int) - ramp).max() <= 3  # the ramp itself, sixteen bits scaled to eight


@pytest.mark.parametrize("turn", range(1, 9))
def test_is_turned_upright_by_exif(turn):
    """Each of the eight orientations of a picture whose corners differ; upright, red is top left, blue below it."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16, 0] = upright[8:, :16, 2] = upright[:8, 16:, 1] = 255
    stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }[turn](upright)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = saved(np.ascontiguousarray(stored), "JPEG", exif=exif, quality=95, subsampling=0)
    assert np.abs(decode(data, 3).astype(int) - upright).mean() < 4


@pytest.mark.parametrize("format", ENCODED)
def test_truncated_anywhere_is_refused(format):
    data = ENCODED[format]
    for cut in range(0, len(data) - 16, 97):
        with pytest.raises(DataError, match="^holiday"):
            decode(data[:cut], 3, origin="holiday")


@pytest.mark.parametrize("format", ENCODED)
@settings(max_examples=150)
@given(
    places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6), head=st.booleans()
)
def test_altered_bytes_give_a_picture_or_a_data_error(format, places, head):
    data = bytearray(ENCODED[format])
    for place, value in places:
        data[place % (64 if head else len(data))] = value
    with contextlib.suppress(DataError):
        assert decode(bytes(data), 3, max_pixels=10**6).shape[2] == 3


@given(exif=st.binary(max_size=60))
def test_any_exif_gives_a_picture_or_a_data_error(exif):
    data = saved(NOISE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + exif)
    with contextlib.suppress(DataError):
        assert decode(data, 3).size == NOISE.size


def bomb(width, height):
    """A PNG of a few hundred bytes that claims, and would unpack to, width x height pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packed = zlib.compress(bytes(min(width * height // 8, 10**6)), 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 8192), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (70_000_000, 1)])
def test_a_bomb_is_refused_by_its_header(size):
    with pytest.raises(DataError, match="picture"):
        decode(bomb(*size), 1)


def test_the_limit_counts_pixels():
    with pytest.raises(DataError, match="upload has 40x24 pixels; at most 959 are allowed"):
        decode(ENCODED["PNG"], 3, max_pixels=959, origin="upload")
    decode(ENCODED["PNG"], 3, max_pixels=960)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(format):
    with pytest.raises(DataError, match="no picture in PNG, JPEG, WEBP"):
        decode(saved(NOISE, format), 3)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(DataError, match="no picture"):
        decode(data, 3)


@given(text=st.dictionaries(st.text("abcXYZ_-", min_size=1, max_size=20), st.text(max_size=40), max_size=3))
def test_png_metadata_is_read_by_plain_pillow(text):
    text = {key: value.replace("\0", "") for key, value in text.items()}
    data = encode_png(NOISE, text)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG"
        assert {key: str(value) for key, value in picture.text.items()} == text
        assert np.array_equal(np.asarray(picture), NOISE)
    assert encode_png(NOISE, text) == data


def test_levels_survive_the_float_range():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    batch = to_tensor(list(levels))
    assert batch.shape == (1, 1, 16, 16) and batch.min() == -1 and batch.max() == 1
    assert np.array_equal(to_pixels(batch), levels)
    assert to_pixels(torch.tensor([[[[-9.0, 9.0]]]])).flatten().tolist() == [0, 255]


def test_resize_crops_the_centre_and_grid_lays_out_rows():
    wide = np.zeros((8, 24, 1), np.uint8)
    wide[:, 8:16] = 200
    assert (resize(wide, 4) == 200).all()
    assert resize(NOISE, 24).shape == (24, 24, 3)
    tiles = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(2, 1).repeat(3, 2) * 10
    sheet = grid(tiles, 3, gap=1)
    assert sheet.shape == (7, 13, 1)
    assert sheet[1, 1, 0] == 10 and sheet[1, 9, 0] == 30 and sheet[4, 5, 0] == 50 and sheet[4, 9, 0] == 96
