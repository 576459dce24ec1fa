"""Pictures <-> bytes: bounded decoding of untrusted files, PNG with metadata, grids. The only door to Pillow.

A picture inside the library is uint8 (H, W, C) in numpy, or float32 in [-1, 1] (B, C, H, W) in torch.
"""

import io
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from diffusion_core.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 1024 * 1024
MOST_PIXELS = 178_956_970  # above which Pillow itself refuses
MODES = {1: "L", 3: "RGB"}
WHITE = (255, 255, 255)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
Color = tuple[int, int, int]
Shape = tuple[int, int]  # height, width
Crop = Literal["center", "stretch", "pad"]
Reason = Literal["not_a_picture", "broken", "too_large", "too_small", "animated"]


class PictureError(DataError):
    """Bytes that give no picture; `kind` says in one word why, the text in one sentence."""

    def __init__(self, kind: Reason, sentence: str):
        super().__init__(kind, sentence)  # both, so that the error survives pickling
        self.kind: Reason = kind

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Fit:
    """The sizes (height, width) that pictures get: each the one of the nearest aspect ratio, by a bicubic resize.

    Where the ratio still differs, "center" cuts the largest centred box of the wanted one, "stretch" distorts and "pad"
    puts the whole picture in the middle of the background.
    """

    shapes: tuple[Shape, ...]
    crop: Crop = "center"

    def nearest(self, height: int, width: int) -> Shape:
        """The shape whose aspect ratio is nearest on a logarithmic scale, of several the first."""
        return min(self.shapes, key=lambda shape: abs(math.log(height * shape[1] / (width * shape[0]))))


def decode(
    data: bytes,
    channels: int,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 1,
    background: Color = WHITE,
    origin: str = "picture",
) -> NDArray[np.uint8]:
    """Decode untrusted bytes to uint8 (H, W, channels), turned upright by EXIF, with transparency on `background`.

    The header is checked before any pixel is decoded. Of sixteen bits the upper eight count; colour profiles do not.
    Raises PictureError, naming `origin`, for a format other than PNG, JPEG or WebP, for more than `max_pixels` or a
    side below `min_side`, for an animation, and for a truncated or broken file.
    """
    picture = _read(data, MODES[channels], max_pixels, min_side, background, origin)
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


class Transcoded(NamedTuple):
    """A picture as PNG, and its brightness (Rec. 601), uint8 (H, W)."""

    png: bytes
    grey: NDArray[np.uint8]


def transcode(
    data: bytes,
    channels: int,
    fit: Fit,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 1,
    background: Color = WHITE,
    origin: str = "picture",
) -> Transcoded:
    """Untrusted bytes -> PNG of a wanted size, with nothing but pixels of the original; raises as `decode` does."""
    picture = _read(data, MODES[channels], max_pixels, min_side, background, origin)
    picture = _fitted(picture, fit.nearest(picture.height, picture.width), fit.crop, background)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=PngImagePlugin.PngInfo(), exif=b"", icc_profile=None)
    return Transcoded(buffer.getvalue(), np.asarray(picture if channels == 1 else picture.convert("L")))


def encode_png(pixels: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> bytes:
    """PNG bytes of uint8 (H, W, C); `text` goes into its metadata. Equal input gives equal bytes."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def to_tensor(pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
    """uint8 pictures (H, W, C) of one size -> float32 (B, C, H, W) in [-1, 1]."""
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return batch.float().div_(127.5).sub_(1)


def to_pixels(batch: Tensor) -> NDArray[np.uint8]:
    """Float (B, C, H, W), clipped to [-1, 1] -> uint8 (B, H, W, C), rounded to the nearest level."""
    levels = batch.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    array: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).cpu().numpy()
    return array


def grid(pixels: NDArray[np.uint8], columns: int, gap: int = 2) -> NDArray[np.uint8]:
    """Pictures (B, H, W, C) laid out row by row on a mid-grey sheet, (rows*(H+gap), columns*(W+gap), C)."""
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 96, np.uint8)
    for i in range(count):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = pixels[i]
    return sheet


def _read(data: bytes, mode: str, max_pixels: int, min_side: int, background: Color, origin: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Pillow warns we refuse, or it is harmless
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _check_header(picture, max_pixels, min_side, origin)
                if picture.format == "PNG":
                    _check_chunks(data, origin)
                picture.load()
                if picture.info:  # where the EXIF data would be
                    ImageOps.exif_transpose(picture, in_place=True)
                flat = _opaque(picture, background)
                return flat if flat.mode == mode else flat.convert(mode)
    except PictureError:
        raise
    except UnidentifiedImageError:
        if _format_of(data):
            reason = f"{origin} begins like {_format_of(data)} but its header cannot be read ({len(data)} bytes)"
            raise PictureError("broken", reason) from None
        sentence = f"{origin} is no picture in {', '.join(FORMATS)} ({len(data)} bytes)"
        raise PictureError("not_a_picture", sentence) from None
    except Image.DecompressionBombError:
        raise PictureError("too_large", f"{origin} has far more than the {max_pixels} pixels allowed") from None
    except Exception as error:  # on bytes made to hurt, Pillow raises whatever it stumbles over
        raise PictureError("broken", f"{origin} cannot be decoded: {error or type(error).__name__}") from error


def _check_header(picture: Image.Image, max_pixels: int, min_side: int, origin: str) -> None:
    size = f"{picture.width}x{picture.height}"
    if picture.width * picture.height > max_pixels:
        raise PictureError("too_large", f"{origin} has {size} pixels; at most {max_pixels} are allowed")
    if min(picture.size) < min_side:
        raise PictureError("too_small", f"{origin} has {size} pixels; a side of at least {min_side} is wanted")
    if picture.format != "MPO" and getattr(picture, "is_animated", False):  # MPO: a camera's JPEG with a preview
        frames = getattr(picture, "n_frames", "several")
        raise PictureError("animated", f"{origin} is an animation of {frames} frames; one picture is wanted")


def _check_chunks(data: bytes, origin: str) -> None:
    """Hold every chunk of a PNG against its checksum, which Pillow does not do for those that hold the pixels."""
    place, kind = len(PNG_MAGIC), b""
    while kind != b"IEND":
        size, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        end = place + 8 + size
        if end + 4 > len(data):
            raise PictureError("broken", f"{origin} is truncated: its last chunk ends beyond its {len(data)} bytes")
        if zlib.crc32(memoryview(data)[place + 4 : end]) != int.from_bytes(data[end : end + 4]):
            name = kind.decode("ascii", "backslashreplace")
            raise PictureError("broken", f"{origin} is damaged: its chunk {name} does not match its checksum")
        place = end + 4


def _format_of(data: bytes) -> str:
    """The format that the first bytes claim, or nothing."""
    if data.startswith(PNG_MAGIC):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def _opaque(picture: Image.Image, background: Color) -> Image.Image:
    """Grey or colour of eight bits; Pillow's own conversion clips sixteen, and drops transparency."""
    if picture.mode.startswith("I;16"):
        levels = np.asarray(picture)
        clear = levels == picture.info.get("transparency", -1)
        picture = Image.fromarray((levels >> 8).astype(np.uint8))
        if clear.any():
            picture.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    if not picture.has_transparency_data:
        return picture if picture.mode in MODES.values() else picture.convert("RGB")
    over = picture.convert("RGBA")
    flat = Image.new("RGB", picture.size, background)
    flat.paste(over, mask=over.getchannel("A"))
    return flat


def _fitted(picture: Image.Image, shape: Shape, crop: Crop, background: Color) -> Image.Image:
    height, width = shape
    if crop == "pad":
        scale = min(height / picture.height, width / picture.width)
        inner = _scaled(picture, (max(1, round(picture.height * scale)), max(1, round(picture.width * scale))))
        sheet = Image.new("RGB", (width, height), background).convert(picture.mode)
        sheet.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
        return sheet
    if crop == "center":
        box = _box(picture, shape)
        picture = picture if box == (0, 0, *picture.size) else picture.crop(box)
    return _scaled(picture, shape)


def _box(picture: Image.Image, shape: Shape) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the largest centred box with the aspect ratio of a shape."""
    tall = min(picture.height, max(1, round(picture.width * shape[0] / shape[1])))
    wide = picture.width
    if tall == picture.height:
        wide = min(picture.width, max(1, round(picture.height * shape[1] / shape[0])))
    left, top = (picture.width - wide) // 2, (picture.height - tall) // 2
    return left, top, left + wide, top + tall


def _scaled(picture: Image.Image, shape: Shape) -> Image.Image:
    size = (shape[1], shape[0])
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
