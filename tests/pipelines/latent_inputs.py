"""What cache_latents reads, made by hand: a data folder of plain tars, a validation and a codec, sealed as always."""

import hashlib
import io
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import create_autospec

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from diffusion_core import bundle, manifest
from diffusion_core.adapters.text import TextSource
from diffusion_core.codec import Codec
from diffusion_core.vae import CodecSpec, KlVae
from pipelines import cache_latents
from pipelines.data import index
from pipelines.data.index import INDEX, PictureRow
from pipelines.stage import Stage
from pipelines.tracking import Tracker

CODEC = CodecSpec.read({"kind": "kl_vae", "channels": 3, "latent": 2, "widths": [8, 8]}, "codec")
TEXT = TextSource.read({"kind": "bytes", "width": 8, "length": 12, "depth": 1, "heads": 1}, "text")
OUT = Path("latents")
EXACT = {"float32": 1e-5, "float16": 2e-3}  # of half precision: two units in the last place
DATA, CODEC_FOLDER, VALIDATION = (Path("artifacts") / name for name in ("data", "codec", "validation"))


class Made(NamedTuple):
    """A picture (H, W, 3), its label and caption, and its split."""

    pixels: NDArray[np.uint8]
    label: int = -1
    caption: str | None = None
    split: str = "train"

    def png(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def tensor(self) -> torch.Tensor:
        """(3, H, W) in [-1, 1]."""
        return torch.from_numpy((self.pixels.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1).copy())


def some(count: int, seed: int = 0, size: tuple[int, int] = (8, 8)) -> list[Made]:
    """Pictures of noise, every fourth in val, some with a caption."""
    drawn = np.random.default_rng(seed)
    return [
        Made(
            drawn.integers(0, 256, (*size, 3), dtype=np.uint8),
            n % 3,
            None if n % 5 == 4 else f"picture {n % 7} of {seed}",
            "val" if n % 4 == 3 else "train",
        )
        for n in range(count)
    ]


def in_order(pictures: Sequence[Made]) -> list[Made]:
    """As the rows of the index stand: by split, height and width, and content."""
    return sorted(pictures, key=lambda one: (one.split, *one.pixels.shape[:2], hashlib.sha256(one.png()).hexdigest()))


def write_data(pictures: Sequence[Made]) -> None:
    """The data folder of these pictures, and that of a validation that they passed."""
    emptied(DATA)
    groups: dict[tuple[str, int, int], list[Made]] = {}
    for one in in_order(pictures):
        groups.setdefault((one.split, *one.pixels.shape[:2]), []).append(one)
    sizes = sorted({key[1:] for key in groups})
    rows = []
    for (split, height, width), members in groups.items():
        shard = f"{split}-00000.tar" if len(sizes) == 1 else f"{split}-{height}x{width}-00000.tar"
        with tarfile.open(DATA / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for one in members:
                sha256 = hashlib.sha256(one.png()).hexdigest()
                for suffix, content in (("json", b"{}"), ("png", one.png())):
                    member = tarfile.TarInfo(f"{sha256[:16]}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        with tarfile.open(DATA / shard) as tar:
            places = {member.name: member for member in tar}
        for one in members:
            sha256 = hashlib.sha256(one.png()).hexdigest()
            place = places[f"{sha256[:16]}.png"]
            start, size = place.offset_data, place.size
            told = (width, height, one.label, one.caption, "0" * 16, None, None, sha256[:8])
            rows.append(PictureRow(sha256[:16], split, shard, start, size, sha256, *told))
    index.write(DATA / INDEX, PictureRow, rows)
    counts = {split: sum(one.split == split for one in pictures) for split in ("train", "val")}
    about = {"classes": ["a", "b", "c"], "channels": 3, "counts": counts, "shapes": [list(size) for size in sizes]}
    sealed = manifest.seal(DATA, "data", about | {"resolution": sizes[0][0]})
    emptied(VALIDATION)
    manifest.seal(VALIDATION, "validation", {}, parents={DATA.as_posix(): sealed.digest})


def write_codec(codec: Codec, spec: CodecSpec = CODEC) -> None:
    """The codec's folder."""
    emptied(CODEC_FOLDER)
    bundle.save_codec(codec, spec, CODEC_FOLDER)
    manifest.seal(CODEC_FOLDER, "codec", {})


def fresh_codec(seed: int = 0) -> KlVae:
    """A codec of random weights."""
    torch.manual_seed(seed)
    codec: KlVae = CODEC.build()
    return codec.eval()


def cached(out: Path, **params: object) -> dict[str, float]:
    """Run the stage's main into a sealed folder; what it told the tracker."""
    emptied(out)
    tracker = create_autospec(Tracker, instance=True)
    stage = Stage("cache_latents", out, out, tracker, Console(quiet=True))
    about = cache_latents.main(cache_latents.Config(**params), stage)
    manifest.seal(out, "latents", about, samples=stage.samples)
    (told,) = (call.args[0] for call in tracker.metrics.call_args_list)
    return told


def write_inputs() -> KlVae:
    """Twenty pictures, a codec, which is returned, and a validation."""
    codec = fresh_codec()
    write_data(some(20))
    write_codec(codec)
    return codec


def files(folder: Path) -> dict[str, str]:
    """The digest of every file but the manifest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != manifest.NAME
    }


def hold_against_fresh(pictures: list[Made], codec: KlVae, dtype: str, flip: bool, captions: bool) -> None:
    """Every number that was cached is what encoding gives now, one sample at a time."""
    encoder = bundle.load_text(OUT / "text") if captions else None
    told = load_file(OUT / "captions.safetensors") if captions else {}
    for split in ("train", "val"):
        stored = load_file(OUT / f"{split}.safetensors")
        wanted = [one for one in in_order(pictures) if one.split == split]
        assert stored["label"].tolist() == [one.label for one in wanted]
        assert stored["moments"].dtype == getattr(torch, dtype)
        for row, one in enumerate(wanted):
            for name, x in {"moments": one.tensor(), "mirrored": one.tensor().flip(2)}.items():
                if name == "moments" or flip:
                    with torch.no_grad():
                        mean, std = codec.encode(x[None])
                    torch.testing.assert_close(
                        stored[name][row].float(), torch.cat((mean, std), 1)[0], rtol=EXACT[dtype], atol=EXACT[dtype]
                    )
            if encoder is None:
                continue
            place = int(stored["caption"][row])
            assert (place == 0) == (one.caption is None)
            if one.caption is not None:
                text, mask = encoder.encode([one.caption])
                torch.testing.assert_close(told["text"][place].float(), text[0], rtol=EXACT[dtype], atol=EXACT[dtype])
                assert torch.equal(told["mask"][place], mask[0])
    assert ("mirrored" in stored) == flip
    assert ("caption" in stored) == captions


def emptied(folder: Path) -> None:
    """The folder, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
