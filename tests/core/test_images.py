"""Pictures: untrusted bytes give a picture or a DataError, and what is written is what plain Pillow reads."""

import contextlib
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_core.errors import DataError
from diffusion_core.images import Fit, PictureError, decode, encode_png, grid, to_pixels, to_tensor, transcode

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


def test_grid_lays_out_rows():
    tiles = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(2, 1).repeat(3, 2) * 10
    sheet = grid(tiles, 3, gap=1)
    assert sheet.shape == (7, 13, 1)
    assert sheet[1, 1, 0] == 10 and sheet[1, 9, 0] == 30 and sheet[4, 5, 0] == 50 and sheet[4, 9, 0] == 96


ALPHA = np.random.default_rng(1).integers(0, 256, (24, 40, 1), dtype=np.uint8)
GREY = np.array([0.299, 0.587, 0.114])  # Rec. 601


def over(color, alpha, background):
    """Porter and Duff's "over" on an opaque ground, in real numbers."""
    share = alpha / 255
    return color * share + np.array(background, float) * (1 - share)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (200, 30, 90)])
def test_transparency_is_laid_on_the_background(background):
    rgba = saved(np.concatenate([NOISE, ALPHA], 2), "PNG")
    wanted = over(NOISE, ALPHA, background)
    assert np.abs(decode(rgba, 3, background=background) - wanted).max() <= 1
    assert np.abs(decode(rgba, 1, background=background)[..., 0] - wanted @ GREY).max() <= 2
    grey = saved(np.concatenate([NOISE[..., :1], ALPHA], 2), "PNG")
    assert (
        np.abs(decode(grey, 3, background=background) - over(NOISE[..., :1].repeat(3, 2), ALPHA, background)).max() <= 1
    )
    webp = saved(np.concatenate([NOISE, ALPHA], 2), "WEBP", lossless=True, exact=True)
    assert np.abs(decode(webp, 3, background=background) - wanted).max() <= 1


def test_a_palette_may_have_transparency_of_its_own():
    places = np.arange(24 * 40).reshape(24, 40) % 4
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 99, 199]], np.uint8)
    picture = Image.fromarray(places.astype(np.uint8), "L")
    picture.putpalette(colors.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=bytes([255, 0, 128, 255]))
    alpha = np.array([255, 0, 128, 255])[places][..., None]
    found = decode(buffer.getvalue(), 3, background=(10, 20, 30))
    assert np.abs(found - over(colors[places], alpha, (10, 20, 30))).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_one_level_of_grey_may_be_transparent(depth):
    levels = (np.arange(24 * 40).reshape(24, 40) % 5 * 50).astype(np.uint8)
    stored = levels if depth == 8 else levels.astype(np.uint16) * 257
    found = decode(saved(stored, "PNG", transparency=int(stored[0, 2])), 1, background=(7, 7, 7))
    assert np.array_equal(found[..., 0], np.where(levels == 100, 7, levels))


def png_of(header, rows):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("color", [0, 2, 4, 6], ids=["grey", "RGB", "grey with alpha", "RGBA"])
def test_of_sixteen_bits_the_upper_eight_count(color):
    """PNG's own layout, written here: samples of two bytes, the high one first (PNG specification, 7.1)."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    deep = np.random.default_rng(color).integers(0, 1 << 16, (24, 40, samples), dtype=np.uint16)
    if color in (4, 6):
        deep[..., -1] = 65535
    header = struct.pack(">IIBBBBB", 40, 24, 16, color, 0, 0, 0)
    found = decode(png_of(header, [row.astype(">u2").tobytes() for row in deep]), 3)
    shades = deep[..., :3] if samples > 2 else deep[..., :1].repeat(3, 2)
    assert np.array_equal(found, shades // 256)


def test_one_bit_is_black_and_white():
    bits = np.random.default_rng(2).integers(0, 2, (24, 40)).astype(bool)
    header = struct.pack(">IIBBBBB", 40, 24, 1, 0, 0, 0, 0)
    found = decode(png_of(header, [np.packbits(row).tobytes() for row in bits]), 3)
    assert np.array_equal(found, np.where(bits, 255, 0)[..., None].repeat(3, 2))


def test_cmyk_is_ink_on_white():
    """(255 - ink)(255 - black) / 255; Pillow stores such a JPEG inverted and marks it as Adobe's, and so YCCK."""
    inks = np.zeros((32, 32, 4), np.uint8)
    inks[:16, :16, 0], inks[:16, 16:, 1], inks[16:, :16, 2], inks[16:, 16:, 3] = 255, 200, 150, 100
    buffer = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(buffer, "JPEG", quality=100, subsampling=0)
    wanted = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    assert np.abs(decode(buffer.getvalue(), 3) - wanted).max() <= 4
    assert np.abs(decode(buffer.getvalue(), 1)[..., 0] - wanted @ GREY).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_refused(format):
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.roll(NOISE, shift, 0)) for shift in range(3)]
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    with pytest.raises(PictureError, match="holiday is an animation of 3 frames") as caught:
        decode(buffer.getvalue(), 3, origin="holiday")
    assert caught.value.kind == "animated"


@pytest.mark.parametrize(
    ("data", "limits", "kind"),
    [
        (b"GIF89a" + bytes(50), {}, "not_a_picture"),
        (ENCODED["PNG"][:30], {}, "broken"),
        (ENCODED["JPEG"][:900], {}, "broken"),
        (ENCODED["PNG"], {"max_pixels": 900}, "too_large"),
        (ENCODED["PNG"], {"min_side": 25}, "too_small"),
        (bomb(2**31 - 1, 2**31 - 1), {}, "too_large"),
    ],
)
def test_a_refusal_has_a_kind_also_after_a_journey(data, limits, kind):
    with pytest.raises(PictureError) as caught:
        decode(data, 3, **limits)
    there = pickle.loads(pickle.dumps(caught.value))
    assert there.kind == caught.value.kind == kind
    assert str(there) == str(caught.value) != ""


def test_every_flipped_bit_of_a_png_is_noticed():
    data = ENCODED["PNG"]
    for place in range(8, len(data), 41):
        with pytest.raises(DataError):
            decode(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :], 3)


def test_a_side_is_measured_before_anything_is_decoded():
    decode(ENCODED["PNG"], 3, min_side=24)
    with pytest.raises(PictureError, match="40x24 pixels; a side of at least 25 is wanted"):
        decode(ENCODED["PNG"][:-400], 3, min_side=25)


def fitted(fit, channels, **options):
    """What plain Pillow reads of a transcoded picture."""
    png, grey = transcode(ENCODED["PNG"], channels, fit, **options)
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.mode == {1: "L", 3: "RGB"}[channels]
        assert np.array_equal(np.asarray(picture.convert("L")), grey)
        return np.asarray(picture).reshape(picture.height, picture.width, channels)


def test_nothing_but_pixels_comes_through():
    """Text, EXIF data, a profile, a physical size, and what follows the end."""
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    info = PngInfo()
    info.add_text("Comment", "a secret")
    data = saved(NOISE, "PNG", pnginfo=info, exif=exif, icc_profile=b"a secret" * 20, dpi=(72, 72)) + b"a secret"
    png, _ = transcode(data, 3, Fit(((24, 40),)))
    assert b"secret" not in png and {chunk for chunk, *_ in chunks(png)} == {b"IHDR", b"IDAT", b"IEND"}
    assert png == transcode(ENCODED["PNG"], 3, Fit(((24, 40),))).png == encode_png(NOISE)


def chunks(png):
    place = 8
    while place < len(png):
        size = int.from_bytes(png[place : place + 4])
        yield png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
        place += 12 + size


@pytest.mark.parametrize("shape", [(16, 16), (10, 30), (30, 10), (24, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_against_pillow_on_a_box_by_hand(shape, channels):
    """24 x 40: a square is the middle 24 columns, 1 : 3 the middle 13 rows, 3 : 1 the middle 8 columns."""
    box = {(16, 16): (8, 0, 32, 24), (10, 30): (0, 5, 40, 18), (30, 10): (16, 0, 24, 24), (24, 40): (0, 0, 40, 24)}[
        shape
    ]
    whole = Image.fromarray(NOISE).convert({1: "L", 3: "RGB"}[channels])
    size, way = (shape[1], shape[0]), Image.Resampling.BICUBIC
    center = np.asarray(whole.crop(box).resize(size, way)).reshape(*shape, channels)
    assert np.array_equal(fitted(Fit((shape,)), channels), center)
    stretched = np.asarray(whole.resize(size, way)).reshape(*shape, channels)
    assert np.array_equal(fitted(Fit((shape,), "stretch"), channels), stretched)


@pytest.mark.parametrize(("shape", "inside"), [((48, 48), (9, 0, 29, 48)), ((12, 60), (0, 20, 12, 20))])
def test_padding_keeps_the_whole_picture_in_the_middle(shape, inside):
    """24 x 40 in 48 x 48 is 29 x 48 (28.8 rounded), and in 12 x 60 it is 12 x 20."""
    found = fitted(Fit((shape,), "pad"), 3, background=(1, 2, 3))
    top, left, tall, wide = inside
    whole = Image.fromarray(NOISE).resize((wide, tall), Image.Resampling.BICUBIC)
    wanted = np.full((*shape, 3), (1, 2, 3), np.uint8)
    wanted[top : top + tall, left : left + wide] = whole
    assert np.array_equal(found, wanted)


def test_a_picture_goes_to_the_nearest_aspect_ratio():
    """On a logarithmic scale, so that twice as high and twice as wide are equally far from a square."""
    fit = Fit(((32, 32), (24, 40), (40, 24)))
    assert [fit.nearest(*size) for size in [(100, 100), (100, 128), (100, 130), (130, 100), (9, 1), (1, 9)]] == [
        (32, 32),
        (32, 32),
        (24, 40),
        (40, 24),
        (40, 24),
        (24, 40),
    ]
    for size in [(50, 61), (61, 50), (70, 49), (49, 70)]:
        far = [abs(np.log(size[0] / size[1]) - np.log(h / w)) for h, w in fit.shapes]
        assert fit.nearest(*size) == fit.shapes[int(np.argmin(far))]


def test_a_cameras_jpeg_with_a_preview_is_its_picture():
    pixels = np.full((40, 60, 3), (200, 80, 20), np.uint8)
    buffer, preview = io.BytesIO(), Image.new("RGB", (6, 4))
    Image.fromarray(pixels).save(buffer, "MPO", save_all=True, append_images=[preview])
    assert Image.open(io.BytesIO(buffer.getvalue())).n_frames == 2
    assert np.abs(decode(buffer.getvalue(), 3).astype(int) - pixels).max() <= 2
