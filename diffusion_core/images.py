"""Pictures <-> bytes: bounded decoding of untrusted files, PNG with metadata, grids. The only door to Pillow.

A picture inside the library is uint8 (H, W, C) in numpy, or float32 in [-1, 1] (B, C, H, W) in torch.
"""

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from diffusion_core.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 1024 * 1024
MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, channels: int, *, max_pixels: int = MAX_PIXELS, origin: str = "picture") -> NDArray[np.uint8]:
    """Decode untrusted bytes to uint8 (H, W, channels), turned upright by EXIF.

    The header is checked before any pixel is decoded. Raises DataError, naming `origin`, for a format
    other than PNG, JPEG or WebP, for more than `max_pixels`, and for a truncated or broken file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below, and is smaller
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > max_pixels:
                    size = f"{picture.width}x{picture.height}"
                    raise DataError(f"{origin} has {size} pixels; at most {max_pixels} are allowed")
                upright = _eight_bits(ImageOps.exif_transpose(picture)).convert(MODES[channels])
    except UnidentifiedImageError:
        raise DataError(f"{origin} is no picture in {', '.join(FORMATS)} ({len(data)} bytes)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{origin} cannot be decoded: {error}") from error
    return np.asarray(upright).reshape(upright.height, upright.width, channels)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of sixteen bits scaled to eight; Pillow's own conversion would clip all but the darkest to white."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Bicubic resize of (H, W, C) to (size, size, C) after a centred square crop."""
    height, width, channels = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    picture = Image.fromarray(square.squeeze(2) if channels == 1 else square)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, channels)


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
