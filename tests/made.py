"""A captioned RGB image folder, made up: smooth varied pictures, and among them files made to hurt.

What each hostile file is to meet is said beside it: a kind of refusal, or that it is a picture like any other.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

LABELS = ("circle", "square", "stripe", "sky", "leaf")
COLORS = ("red", "green", "blue", "gold", "violet", "teal", "orange", "grey")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}
NAN = float("nan")


class Hostile(NamedTuple):
    """One file by its name: its bytes (None for none), the kind of its refusal (None for none), and its caption."""

    name: str
    data: bytes | None
    kind: str | None
    caption: object = "made to hurt"


class Expected(NamedTuple):
    """How many plain pictures there are, and what each hostile origin is to meet: a kind of refusal, or None."""

    pictures: int
    hostile: Mapping[str, str | None]


def make_folder(path: Path, count: int, *, captions: bool = True, hostile: int = 30, seed: int = 0) -> Expected:
    """Make a folder of `count` pictures in one folder a label, and the first `hostile` of the hostile files.

    With `captions` a metadata.jsonl names all of them and their labels.
    """
    path.mkdir(parents=True)
    for label in LABELS:
        (path / label).mkdir()
    rows: list[dict[str, object]] = []
    for number in range(count):
        label, caption, data, ending = picture(seed, number)
        name = f"{label}/{number:06d}{ending}"
        (path / name).write_bytes(data)
        rows.append({"file_name": name, "text": caption, "label": label})
    expected: dict[str, str | None] = {}
    for name, data, kind, caption in list(hostiles(path))[:hostile]:
        if data is not None:
            (path / name).write_bytes(data)
        rows.append({"file_name": name, "text": caption, "label": LABELS[0]})
        if captions:
            expected[f"metadata.jsonl, line {len(rows)}" if ".." in name else name] = kind
        elif (path / name).exists():
            expected[name] = None if kind == "bad_caption" else kind
    if captions:
        with (path / "metadata.jsonl").open("w", encoding="utf-8") as table:
            table.writelines(json.dumps(row) + "\n" for row in rows)
    return Expected(count, expected)


def hostiles(path: Path) -> Iterator[Hostile]:
    """Hostile files, each with its outcome; a link out of the folder at `path` is laid on the way."""
    noise = np.random.default_rng(7).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    png, jpeg, webp = (encoded(noise, form) for form in ("PNG", "JPEG", "WEBP"))
    pixels = png.index(b"IDAT") + 4

    def named(name: str, data: bytes | None, kind: str | None, caption: object = "made to hurt") -> Hostile:
        return Hostile(f"{LABELS[0]}/hostile-{name}", data, kind, caption)

    yield named("cut.png", png[: len(png) // 2], "broken")
    yield named("cut.jpg", jpeg[: len(jpeg) // 2], "broken")
    yield named("cut.webp", webp[: len(webp) // 2], "broken")
    yield named("cut-in-header.png", png[:20], "broken")
    yield named("flipped.png", _flipped(png, pixels + 500), "broken")
    yield named("flipped-header.png", _flipped(png, 18), "broken")
    yield named("flipped.jpg", _flipped(jpeg, jpeg.index(b"\xff\xc0") + 1), "broken")
    yield named("empty.png", b"", "not_a_picture")
    yield named("zeros.png", bytes(4096), "not_a_picture")
    yield named("text.png", b"this is text\n" * 50, "not_a_picture")
    yield named("still.gif", encoded(noise, "GIF"), "not_a_picture")
    yield named("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "not_a_picture")
    yield named("paper.jpg", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + jpeg, "not_a_picture")
    yield named("bitmap.png", encoded(noise, "BMP"), "not_a_picture")
    yield named("moving.png", _animated(noise, "PNG"), "animated")
    yield named("moving.webp", _animated(noise, "WEBP"), "animated")
    yield named("bomb.png", one_bit(12_000, 12_000), "too_large")
    yield named("wide.png", one_bit(40_000, 4_000), "too_large")
    yield named("giant.png", one_bit(2**31 - 1, 2**31 - 1), "too_large")
    yield named("text-bomb.png", _with_chunk(png, b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26), 9)), "broken")
    yield named("profile-bomb.jpg", _profile_bomb(jpeg), None)
    yield named("wrong-crc.png", _flipped(png, len(png) - 1), "broken")
    yield named("no-size.png", _sized(png, 0, 0), "broken")
    yield named("no-height.png", _sized(png, 80, 0), "broken")
    yield named("no-pixels.png", png[: pixels - 8] + chunk(b"IEND", b""), "broken")
    yield named("tiny.png", encoded(noise[:2, :2], "PNG"), "too_small")
    yield named("polyglot.png", png + b"PK\x03\x04<script>alert(1)</script>", None)
    yield named("missing.png", None, "unreadable")
    yield Hostile("../../secret.png", None, "unreadable")
    yield named("nan.png", encoded(noise[1:], "PNG"), "bad_caption", NAN)
    yield named("surrogate.png", encoded(noise[2:], "PNG"), "bad_caption", "half a sign \ud83d")
    yield named("silent.png", encoded(noise[3:], "PNG"), "bad_caption", " \t")
    yield named("nul.png", encoded(noise[4:], "PNG"), "bad_caption", "a\0b")
    (path / LABELS[0] / "hostile-link.png").symlink_to(_outside(path, png))
    yield named("link.png", None, "unreadable")
    yield from (named(f"fine-{name}", data, None) for name, data in unusual(noise).items())


def unusual(noise: np.ndarray) -> dict[str, bytes]:
    """Pictures in modes that are rare and right, by file name; each of its own content."""
    deep = np.random.default_rng(8).integers(0, 1 << 16, noise.shape[:2], dtype=np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "cmyk.jpg": encoded(noise, "JPEG", "CMYK"),
        "sixteen.png": encoded(deep, "PNG"),
        "palette.png": encoded(noise, "PNG", "P"),
        "turned.jpg": encoded(np.ascontiguousarray(noise[:, ::-1]), "JPEG", exif=turned),
        "alpha.png": encoded(noise[::2, ::2], "PNG", "RGBA"),
        "one-bit.png": encoded(noise, "PNG", "1"),
    }


def encoded(pixels: np.ndarray, form: str, mode: str | None = None, **options: object) -> bytes:
    """Pixels as a file of one format, converted to a mode of Pillow first."""
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def one_bit(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims, and begins to unpack to, width x height pixels."""
    packed = zlib.compress(bytes(min(width * height // 8, 10**6)), 9)
    return _png(struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), chunk(b"IDAT", packed))


def _png(header: bytes, body: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def _sized(png: bytes, width: int, height: int) -> bytes:
    return png[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + png[24:29]) + png[33:]


def _with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    return png[:33] + chunk(kind, content) + png[33:]


def _profile_bomb(jpeg: bytes) -> bytes:
    """A JPEG whose colour profile claims parts that are not there; profiles do not count."""
    body = b"ICC_PROFILE\0\xff\xff" + bytes(60_000)
    return jpeg[:2] + b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


def _animated(pixels: np.ndarray, form: str) -> bytes:
    frames = [Image.fromarray(np.roll(pixels, shift, 1)) for shift in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


def _outside(path: Path, data: bytes) -> Path:
    """A picture beside the folder, where a link may lead."""
    secret = path.with_name(f"{path.name}-outside.png")
    secret.write_bytes(data)
    return secret.resolve()


def picture(seed: int, number: int) -> tuple[str, str, bytes, str]:
    """(label, caption, bytes, ending) of one plain picture: a shape of one colour before a gradient of others."""
    rng = np.random.default_rng([seed, number])
    width, height = (int(side) for side in rng.integers(48, 161, 2))
    which = int(rng.integers(len(LABELS)))
    color, back = rng.integers(len(COLORS), size=2)
    corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    picture = corners.resize((width, height), Image.Resampling.BILINEAR)
    _SHAPES[LABELS[which]](ImageDraw.Draw(picture), rng, width, height, COLORS[color])
    ending = list(FORMATS)[number % 3]
    buffer = io.BytesIO()
    fast = {"PNG": {"compress_level": 1}, "JPEG": {"quality": 90}, "WEBP": {"quality": 80, "method": 0}}
    picture.save(buffer, FORMATS[ending], **fast[FORMATS[ending]])
    caption = f"a {COLORS[color]} {LABELS[which]}, naïve {COLORS[back]} № {number} 🖼"
    return LABELS[which], caption, buffer.getvalue(), ending


def _box(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    return left, top, left + int(rng.integers(8, width // 2 + 8)), top + int(rng.integers(8, height // 2 + 8))


def _stripes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, color: str) -> None:
    gap = int(rng.integers(8, 24))
    for left in range(int(rng.integers(gap)), width + height, gap):
        draw.line((left, 0, left - height, height), color, gap // 3 + 1)


_Draw = Callable[[ImageDraw.ImageDraw, np.random.Generator, int, int, str], None]
_SHAPES: Mapping[str, _Draw] = {
    "circle": lambda draw, rng, width, height, color: draw.ellipse(_box(rng, width, height), color),
    "square": lambda draw, rng, width, height, color: draw.rectangle(_box(rng, width, height), color),
    "stripe": _stripes,
    "sky": lambda draw, rng, width, height, color: draw.rectangle(
        (0, int(rng.integers(height // 4, height * 3 // 4)), width, height), color
    ),
    "leaf": lambda draw, rng, width, height, color: draw.chord(
        _box(rng, width, height), int(rng.integers(360)), int(rng.integers(360, 620)), color
    ),
}
