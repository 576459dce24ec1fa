"""Cache latents: every picture through the codec once, so that training reads moments and not pictures.

Mean and standard deviation are kept, not a draw: each epoch sees fresh latents from the picture's own
distribution. A row's cache key names all that its moments depend on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_core import manifest
from diffusion_core.bundle import load_codec
from diffusion_core.codec import Codec
from diffusion_core.errors import ConfigError, DataError
from diffusion_core.weights import write_tensors
from pipelines.data import index
from pipelines.data.index import INDEX, LatentRow
from pipelines.data.reader import Pictures
from pipelines.progress import Bar
from pipelines.stage import Stage, run

LAYOUT = "mean+std"


@dataclass(frozen=True)
class Config:
    """`batch` pictures are encoded at once; the moments are stored as `dtype`."""

    batch: int = 256
    dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"batch {self.batch}: at least 1 is wanted")


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Write the moments of each split and the table of their cache keys."""
    folder, data = stage.input("artifacts/data", "data")
    stage.input("artifacts/validation", "validation")
    codec_folder, made = stage.input("artifacts/codec", "codec")
    codec, _ = load_codec(codec_folder)
    splits = {split: count for split, count in data.about["counts"].items() if count}
    channels, side = data.about["channels"], data.about["resolution"]
    image_shape = (channels, side, side)
    recipe = {
        "transform": {"image_shape": list(image_shape), "range": [-1, 1]},
        "codec": made.digest,
        "dtype": config.dtype,
        "layout": LAYOUT,
    }
    rows: list[LatentRow] = []
    with stage.bar("encode", sum(splits.values())) as bar:
        for split in splits:
            pictures = Pictures.open(folder, split)
            tensors = moments(codec, pictures, config, bar)
            write_tensors(stage.out / f"{split}.safetensors", tensors)
            stage.samples[f"{split}.safetensors"] = len(pictures)
            rows += keyed(pictures, split, recipe)
    index.write(stage.out / INDEX, LatentRow, rows)
    return recipe | {
        "classes": data.about["classes"],
        "counts": splits,
        "image_shape": list(image_shape),
        "latent_shape": list(codec.latent_shape(image_shape)),
    }


@torch.inference_mode()
def moments(codec: Codec, pictures: Pictures, config: Config, bar: Bar) -> dict[str, Tensor]:
    """Mean and std of a split's latents, (N, c, h, w) each, and its labels (N,); DataError if one is not finite."""
    dtype = getattr(torch, config.dtype)
    mean = torch.empty(len(pictures), *codec.latent_shape(pictures.shape), dtype=dtype)
    std = torch.empty_like(mean)
    for start in range(0, len(pictures), config.batch):
        ids = torch.arange(start, min(start + config.batch, len(pictures)))
        found = codec.encode(pictures.tensor(ids))
        mean[ids], std[ids] = found.mean.to(dtype), found.std.to(dtype)
        finite = (mean[ids].isfinite() & std[ids].isfinite()).flatten(1).all(1)
        if not finite.all():
            key = pictures.keys[int(ids[~finite][0])]
            raise DataError(f"the latent of picture {key} is not finite as {config.dtype}; the codec is broken")
        bar.step(len(ids))
    return {"mean": mean, "std": std, "label": pictures.labels}


def keyed(pictures: Pictures, split: str, recipe: Mapping[str, Any]) -> Iterator[LatentRow]:
    """Each row of a split with its cache key: a digest of the picture's content and of the whole recipe."""
    for number, row in enumerate(pictures.rows):
        cache_key = manifest.digest_of({"image": row.sha256, **recipe})
        yield LatentRow(row.key, row.sha256, split, number, cache_key)


if __name__ == "__main__":
    run("cache_latents", Config, main, out="artifacts/latents", kind="latents")
