"""Cache latents: every picture through the codec once, so that training reads moments and not pictures.

Mean and standard deviation are kept, not a draw: each epoch sees fresh latents from the picture's own
distribution. A row's cache key names all that its moments depend on. The work is done here or, with `workers`,
in Ray tasks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion_core import manifest
from diffusion_core.bundle import load_codec
from diffusion_core.codec import Codec, Moments
from diffusion_core.errors import ConfigError, DataError
from diffusion_core.weights import write_tensors
from pipelines import launch
from pipelines.data import index
from pipelines.data.index import INDEX, LatentRow
from pipelines.data.reader import Pictures
from pipelines.stage import Stage, run

LAYOUT = "mean+std"


@dataclass(frozen=True)
class Config:
    """`batch` pictures are encoded at once, by `workers` Ray workers or (0) here; the moments are stored as `dtype`."""

    batch: int = 256
    dtype: Literal["float16", "float32"] = "float16"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.workers < 0:
            raise ConfigError(f"batch {self.batch}, workers {self.workers}: batch >= 1 and workers >= 0 are wanted")


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `end` of a split, and where they and the codec are; paths are absolute."""

    data: Path
    codec: Path
    dtype: str
    split: str
    start: int
    end: int


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Write the moments of each split and the table of their cache keys."""
    folder, data = stage.input("artifacts/data", "data")
    stage.input("artifacts/validation", "validation")
    codec_folder, made = stage.input("artifacts/codec", "codec")
    splits = {split: count for split, count in data.about["counts"].items() if count}
    image_shape = [data.about["channels"], data.about["resolution"], data.about["resolution"]]
    recipe = {
        "transform": {"image_shape": image_shape, "range": [-1, 1]},
        "codec": made.digest,
        "dtype": config.dtype,
        "layout": LAYOUT,
    }
    chunks = [
        Chunk(folder.resolve(), codec_folder.resolve(), config.dtype, split, start, min(start + config.batch, count))
        for split, count in splits.items()
        for start in range(0, count, config.batch)
    ]
    encoded: dict[str, list[Moments]] = {split: [] for split in splits}
    with stage.bar("encode", sum(splits.values())) as bar:
        for chunk, found in zip(chunks, launch.map(encode, chunks, config.workers), strict=True):
            encoded[chunk.split].append(found)
            bar.step(chunk.end - chunk.start)
    rows: list[LatentRow] = []
    for split, parts in encoded.items():
        pictures = Pictures.open(folder, split)
        mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
        write_tensors(stage.out / f"{split}.safetensors", {"mean": mean, "std": std, "label": pictures.labels})
        stage.samples[f"{split}.safetensors"] = len(pictures)
        rows += keyed(pictures, split, recipe)
    index.write(stage.out / INDEX, LatentRow, rows)
    latent_shape = list(mean.shape[1:])
    return recipe | {
        "classes": data.about["classes"],
        "counts": splits,
        "image_shape": image_shape,
        "latent_shape": latent_shape,
    }


@torch.inference_mode()
def encode(chunk: Chunk) -> Moments:
    """The moments of a chunk, (n, c, h, w) each; raises DataError naming the first picture whose are not finite."""
    codec, pictures = _opened(chunk.data, chunk.codec, chunk.split)
    dtype = getattr(torch, chunk.dtype)
    found = Moments(*(part.to(dtype) for part in codec.encode(pictures.tensor(torch.arange(chunk.start, chunk.end)))))
    finite = (found.mean.isfinite() & found.std.isfinite()).flatten(1).all(1)
    if not finite.all():
        key = pictures.keys[chunk.start + int((~finite).nonzero()[0])]
        raise DataError(f"the latent of picture {key} is not finite as {chunk.dtype}; the codec is broken")
    return found


@lru_cache(maxsize=1)
def _opened(data: Path, codec: Path, split: str) -> tuple[Codec, Pictures]:
    """Codec and pictures, opened once by every process that encodes."""
    return load_codec(codec)[0], Pictures.open(data, split)


def keyed(pictures: Pictures, split: str, recipe: Mapping[str, Any]) -> Iterator[LatentRow]:
    """Each row of a split with its cache key: a digest of the picture's content and of the whole recipe."""
    for number, row in enumerate(pictures.rows):
        cache_key = manifest.digest_of({"image": row.sha256, **recipe})
        yield LatentRow(row.key, row.sha256, split, number, cache_key)


if __name__ == "__main__":
    run("cache_latents", Config, main, out="artifacts/latents", kind="latents")
