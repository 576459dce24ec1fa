"""Cache latents: every picture through the codec once, so that training reads moments and not pictures.

Mean and standard deviation are kept, not a draw: each epoch sees fresh latents from the picture's own distribution.
Captions are encoded the same way. What was encoded lies in a store under keys that name all it depends on, so that
only what is new is encoded; what this stage publishes is copied from there, in the order of the index.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion_core import bundle
from diffusion_core.adapters.text import TextSource
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.weights import create_tensors
from pipelines import launch
from pipelines.data import encoding, index
from pipelines.data.encoding import Encoder, Source, Task
from pipelines.data.index import INDEX, CaptionRow, LatentRow
from pipelines.data.latent_store import Found, Store
from pipelines.data.latents import CAPTIONS, KIND
from pipelines.data.wanted import (
    Captions,
    Part,
    Recipes,
    Wanted,
    What,
    caption_rows,
    latent_rows,
    plan,
    unique_captions,
)
from pipelines.stage import Stage, run

TEXT, CAPTION_TABLE = "text", "captions.parquet"
TASK_ROWS = 1024  # at most; fewer where a worker would have none


@dataclass(frozen=True)
class Config:
    """`batch` samples are encoded at once, by `workers` Ray workers or (0) here; what comes out is kept as `dtype`.

    `flip` keeps the moments of the mirrored pictures too. `text` encodes the captions; null leaves them out. Entries
    lie in the folder `store`, which projects may share, up to `store_gb` GB: the least recently used go first.
    """

    batch: int = 64
    dtype: Literal["float16", "float32"] = "float16"
    workers: int = 0
    flip: bool = False
    text: TextSource | None = None
    store: str = ".inkwell/latents"
    store_gb: float = 50.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.workers < 0:
            raise ConfigError(f"batch {self.batch}, workers {self.workers}: batch >= 1 and workers >= 0 are wanted")
        if not self.store or self.store_gb <= 0:
            raise ConfigError(f"store {self.store!r}, store_gb {self.store_gb}: a folder and a size above 0 are wanted")


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Encode what the store lacks, then write the moments of each split and the tables of their keys."""
    folder, data = stage.validated_data()
    codec_folder, _ = stage.input("artifacts/codec", "codec")
    code = encoding.code_of(bundle.load_codec(codec_folder)[0])
    codec = Encoder(codec_folder.resolve(), bundle.codec_digest(codec_folder), code, config.dtype, config.batch)
    text = _text_encoder(config, stage.out.resolve() / TEXT)
    channels = data.about["channels"]
    recipes = Recipes(
        lambda size, mirrored: encoding.picture_recipe((channels, *size), mirrored, codec),
        text and encoding.caption_recipe(text),
    )
    wanted = plan(folder, recipes, config.flip)
    if text is not None and not any(len(part.rows) for part in wanted.parts_of("caption")):
        raise ConfigError(f"text is given, and no picture of {folder} has a caption; text: null leaves them out")
    store = Store(Path(config.store).resolve())
    source = Source(folder.resolve(), data.digest)
    encoders: dict[What, Encoder] = {"moments": codec, "mirrored": codec}
    if text is not None:
        encoders["caption"] = text
    found = _filled(config, stage, store, wanted, source, encoders)
    said = None if text is None else _write_captions(stage, folder, wanted, found)
    _write_pictures(stage, folder, wanted, found, said)
    if dropped := store.trim(int(config.store_gb * 1e9)):
        stage.say(f"{dropped} segments dropped, the least recently used, to keep {store.root} below its limit")
    latent_channels, *latent_size = found.entry("moments", wanted.parts[0].where).shape
    return {
        "classes": data.about["classes"],
        "counts": {split: count for split, count in data.about["counts"].items() if count},
        "image_shape": [channels, *wanted.groups[0].size],
        "latent_shape": [latent_channels // 2, *latent_size],
        "transform": {"range": encoding.RANGE},
        "codec": codec.digest,
        "dtype": config.dtype,
        "layout": encoding.LAYOUT,
        "text": text and text.digest,
        "flip": config.flip,
    }


def _text_encoder(config: Config, folder: Path) -> Encoder | None:
    """The text encoder that params name, saved beside the latents: train puts it into the bundle, and it is served."""
    if config.text is None:
        return None
    made_by, encoder = config.text.made()
    bundle.save_text(encoder, made_by, folder)
    return Encoder(folder, bundle.text_digest(folder), encoding.code_of(encoder), config.dtype, config.batch)


def _filled(
    config: Config, stage: Stage, store: Store, wanted: Wanted, source: Source, encoders: Mapping[What, Encoder]
) -> Found:
    """All that is wanted, once what the store lacked has been encoded."""
    found = store.find(wanted.keys)
    encoded, damaged = len(found.missing), found.damaged
    reused = found.entries - encoded
    stage.tracker.metrics({"encoded": encoded, "reused": reused, "damaged": damaged})
    stage.say(f"{reused:,} entries reused, {encoded:,} to encode")
    if damaged:
        stage.say(f"{damaged} segments of {store.root} are damaged and thrown away; their entries are encoded anew")
    if not encoded:
        return found
    tasks = (
        Task(store.root, source, encoders[part.what], part.what, part.group.split, rows)
        for part, rows in _shares(config, wanted, found.missing)
    )
    with stage.bar("encode", encoded) as bar:
        for count in launch.map(encoding.encode, tasks, config.workers):
            bar.step(count)
    found = store.find(wanted.keys)
    if len(found.missing):
        raise IntegrityError(f"{len(found.missing)} of {encoded} entries are not in {store.root} after being encoded")
    return found


def _shares(config: Config, wanted: Wanted, missing: NDArray[np.int64]) -> Iterator[tuple[Part, tuple[int, ...]]]:
    """The rows of what is missing, as many at once as keep all workers busy and no task long; whole batches."""
    batches = min(TASK_ROWS, -(-len(missing) // max(config.workers, 1))) / config.batch
    size = max(1, math.ceil(batches)) * config.batch
    for part in wanted.parts:
        start, stop = np.searchsorted(missing, (part.where.start, part.where.stop))
        rows = part.rows[missing[start:stop] - part.where.start]
        for at in range(0, len(rows), size):
            yield part, tuple(rows[at : at + size].tolist())


def _write_captions(stage: Stage, folder: Path, wanted: Wanted, found: Found) -> Captions:
    """Copy the tokens of every caption out of the store, after those of the null caption: zeros, the first one real."""
    captions = unique_captions(wanted)
    count = 1 + len(captions.where)
    entries = {name: found.entry(name, captions.where) for name in ("text", "mask")}
    mapped = create_tensors(
        stage.out / CAPTIONS, {name: ((count, *entry.shape), entry.dtype) for name, entry in entries.items()}
    )
    mapped["mask"][0, 0] = True
    for name, tensor in mapped.items():
        found.copy(name, captions.where, tensor[1:])
    stage.samples[CAPTIONS] = count
    index.write(stage.out / CAPTION_TABLE, CaptionRow, caption_rows(folder, wanted, captions))
    return captions


def _write_pictures(stage: Stage, folder: Path, wanted: Wanted, found: Found, captions: Captions | None) -> None:
    """Copy the moments of every picture out of the store, and write where each lies."""
    first = wanted.parts_of("caption")[0].where.start if captions is not None else 0
    for group in wanted.groups:
        count, name = len(group.labels), wanted.file(group)
        own = {part.what: part for part in wanted.parts if part.group is group}
        entries = {what: found.entry("moments", part.where) for what, part in own.items() if what != "caption"}
        shapes = {what: ((count, *entry.shape), entry.dtype) for what, entry in entries.items()}
        numbers = ("label", "caption") if captions is not None else ("label",)
        mapped = create_tensors(stage.out / name, shapes | {number: ((count,), torch.int64) for number in numbers})
        mapped["label"].copy_(torch.frombuffer(group.labels, dtype=torch.int64))
        for what in entries:
            found.copy("moments", own[what].where, mapped[what])
        if captions is not None:
            where, rows = own["caption"].where, torch.from_numpy(own["caption"].rows - group.start)
            mapped["caption"][rows] = torch.from_numpy(captions.number[where.start - first : where.stop - first])
        stage.samples[name] = count
    index.write(stage.out / INDEX, LatentRow, latent_rows(folder, wanted))


if __name__ == "__main__":
    run("cache_latents", Config, main, out="artifacts/latents", kind=KIND)
