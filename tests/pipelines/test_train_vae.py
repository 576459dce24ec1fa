"""Stage train_vae over pictures of two sizes: what is published and told, the import of a folder, and every refusal."""

import hashlib
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from diffusion_core import bundle, manifest
from diffusion_core.errors import ConfigError, DataError, IntegrityError
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch
from diffusion_core.spec import build
from pipelines import reconstruction, train_vae
from pipelines.stage import Stage
from pipelines.tracking import Tracker

PLAN = {"images": 640, "batch": 8, "lr": 4e-3, "warm_up": 80, "ema": 0.9, "log_every": 80, "checkpoint_every": 160}
KL_VAE = {"codec": {"kind": "kl_vae", "latent": 3, "widths": [8, 16]}, "plan": PLAN, "kl": 1e-4}
CRITIC = {"kind": "patch", "start_images": 80, "width": 8, "layers": 1}
SPLITS = ("train", "val")
SIMILAR = {"kind": "ms_ssim", "scales": 2, "window": 3}


class Memory:
    """Pictures in memory with the face of the reader's: groups of consecutive rows of one size."""

    splits: ClassVar[dict[str, list[Tensor]]] = {}

    def __init__(self, parts: list[Tensor]):
        self.parts, self.groups = parts, tuple(map(len, parts))
        self.shapes = tuple(tuple(part.shape[1:]) for part in parts)
        self.shape, self.classes = self.shapes[0], ("none",)
        self.keys = tuple(f"key{row}" for row in range(len(self)))
        self.asked: list[int] = []

    @classmethod
    def open(cls, folder: Path, split: str, *, flip: bool = False) -> "Memory":
        turned = [part.flip(3) for part in cls.splits[split]]
        return cls(turned if flip else cls.splits[split])

    def __len__(self) -> int:
        return sum(self.groups)

    def tensor(self, ids: Tensor) -> Tensor:
        self.asked += ids.tolist()
        rows = [picture for part in self.parts for picture in part]
        return torch.stack([rows[row] for row in ids.tolist()])

    def batch(self, ids: Tensor, noise: Noise) -> Batch:
        return Batch(self.tensor(ids), {}, ids)


def smooth(count: int, channels: int, height: int, width: int, seed: int) -> Tensor:
    """Blobs of random place, colour and size."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    blobs = []
    for _ in range(count):
        radius = ((y - draw.uniform(0, height)) ** 2 + (x - draw.uniform(0, width)) ** 2) / draw.uniform(8, 60)
        blobs.append(np.exp(-radius) * draw.uniform(-1, 2, size=(channels, 1, 1)) - draw.uniform(0, 1))
    return torch.tensor(np.stack(blobs)).float().clamp(-1, 1)


class Run(NamedTuple):
    """What a run of the stage gave: the manifest's `about` and all numbers the tracker was told."""

    about: dict[str, Any]
    told: dict[str, float]
    tracker: Mock


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with checked inputs, whose pictures are in memory: 24 of 16x16 and 16 of 8x24, grey."""
    monkeypatch.chdir(tmp_path)
    parents: dict[str, str] = {}
    for name in ("data", "validation"):
        Path(f"artifacts/{name}").mkdir(parents=True)
        sealed = manifest.seal(Path(f"artifacts/{name}"), name, {"classes": ["none"]}, parents=parents)
        parents[f"artifacts/{name}"] = sealed.digest
    parts = [(24, 1, 16, 16), (16, 1, 8, 24)]
    monkeypatch.setattr(Memory, "splits", {split: [smooth(*p, i) for p in parts] for i, split in enumerate(SPLITS)})
    monkeypatch.setattr(train_vae, "Pictures", Memory)
    return tmp_path


def run(params: dict[str, Any], out: str = "codec") -> Run:
    folder = Path(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tracker = create_autospec(Tracker, instance=True)
    tracker.journal = Path("journal.jsonl").resolve()
    tracker.journal.touch()
    stage = Stage("train_vae", folder, Path("work"), tracker, Console(quiet=True))
    about = train_vae.main(build(train_vae.Config, params, "train_vae"), stage)
    told = {name: value for call in tracker.metrics.call_args_list for name, value in call.args[0].items()}
    return Run(about, told, tracker)


def through(folder: str, x: Tensor) -> np.ndarray:
    codec, _ = bundle.load_codec(Path(folder))
    with torch.no_grad():
        return codec.decode(codec.encode(x).mean).clamp(-1, 1).double().numpy()


def test_the_codec_is_normalized_measured_and_published(here: Path) -> None:
    about, told, tracker = run(KL_VAE)
    codec, _ = bundle.load_codec(Path("codec"))
    assert about["latent_shape"] == [3, 8, 8] and about["classes"] == ["none"]
    assert about["scale"] == codec.scale.flatten().tolist() and about["shift"] == codec.shift.flatten().tolist()
    drawn: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    squares, pixels = 0.0, 0
    for split, groups in Memory.splits.items():
        for x in groups:
            latents = codec.encode(x)
            drawn[split] += [latents.draw(Noise(seed, torch.arange(len(x)))).detach().numpy() for seed in range(8)]
            if split == "val":
                squares += ((through("codec", x) - x.numpy()) ** 2).sum()
                pixels += x.numel()
    for split in SPLITS:
        std = np.concatenate([one.swapaxes(0, 1).reshape(3, -1) for one in drawn[split]], 1).std()
        assert about["latent_std"][split] == pytest.approx(std, rel=0.02)
    assert about["latent_std"]["train"] == pytest.approx(1, abs=1e-3)
    assert about["psnr"] == pytest.approx(10 * math.log10(4 * pixels / squares), abs=1e-3)
    mean = torch.cat([part.flatten() for part in Memory.splits["val"]])
    assert about["psnr"] > 10 * math.log10(4 / mean.var()) + 3, "no better than one grey"
    assert 0.5 < about["ssim"] < 1 and "perceptual" not in about
    assert told == {
        **{f"latent_std/{split}": about["latent_std"][split] for split in SPLITS},
        **{name: about[name] for name in ("psnr", "ssim")},
    }
    assert [call.args[0].name for call in tracker.artifact.call_args_list] == ["reconstructions.png", "worst.png"]


def test_with_flip_it_is_trained_on_what_the_reader_mirrors(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(KL_VAE | {"flip": True}, "flipped")
    turned = {"train": [part.flip(3) for part in Memory.splits["train"]], "val": Memory.splits["val"]}
    monkeypatch.setattr(Memory, "splits", turned)
    run(KL_VAE)
    flipped, by_hand = (load_file(f"{name}/codec.safetensors") for name in ("flipped", "codec"))
    assert all(torch.equal(flipped[name], by_hand[name]) for name in flipped if name not in ("shift", "scale"))


def test_the_pages_show_pairs_of_the_commonest_size_and_the_worst_of_them(here: Path) -> None:
    run(KL_VAE)
    x = Memory.splits["val"][0]  # 24 of 16x16 against 16 of 8x24
    again = through("codec", x)
    errors = ((again - x.numpy()) ** 2).mean((1, 2, 3))
    for name, rows in (("reconstructions", np.arange(24)), ("worst", np.argsort(-errors)[:8])):
        page = np.asarray(Image.open(f"codec/{name}.png"))
        assert page.shape == (2 + 18 * math.ceil(len(rows) / 5), 2 + 18 * 10)
        for place, row in enumerate(rows):
            top, left = 2 + 18 * (place // 5), 2 + 36 * (place % 5)
            for shift, wanted in ((0, x[row, 0].numpy()), (18, again[row, 0])):
                shown = page[top : top + 16, left + shift : left + shift + 16]
                assert np.abs(shown - (wanted + 1) * 127.5).max() < 0.6


@pytest.mark.parametrize("terms", [{}, {"adversarial": CRITIC, "perceptual": SIMILAR, "reconstruction": "l1"}])
def test_an_interrupted_run_ends_at_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch, terms: dict[str, Any]
) -> None:
    about = run(KL_VAE | terms, "whole").about
    assert ("perceptual" in about) == bool(terms)
    shutil.rmtree("work")
    whole, count = Memory.tensor, 0

    def dying(self: Memory, ids: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == 47:
            raise KeyboardInterrupt
        return whole(self, ids)

    monkeypatch.setattr(Memory, "tensor", dying)
    with pytest.raises(KeyboardInterrupt):
        run(KL_VAE | terms, "resumed")
    kept = [int(place.name.removeprefix("step-")) for place in Path("work").glob("step-*")]
    assert max(kept) == 40
    again = run(KL_VAE | terms, "resumed").about
    assert again == about
    for name in ("codec.safetensors", "codec.json", "worst.png"):
        assert Path("whole", name).read_bytes() == Path("resumed", name).read_bytes()


def peer(folder: Path, **changed: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3, "scaling_factor": 0.5}
    model = AutoencoderKL(in_channels=1, out_channels=1, shift_factor=0.25, **types, **(sizes | changed)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("normalize", ["folder", "measure"])
def test_a_local_folder_is_imported_and_not_needed_again(here: Path, normalize: str) -> None:
    theirs = peer(here / "theirs")
    digest = hashlib.sha256(Path("theirs/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    codec = {"kind": "pretrained", "path": "theirs", "sha256": digest}
    about = run({"codec": codec | ({"normalize": "measure"} if normalize == "measure" else {})}).about
    shutil.rmtree("theirs")
    codec, codec_spec = bundle.load_codec(Path("codec"))
    assert codec_spec.kind == "ldm_vae" and "path" not in dict(codec_spec.keywords)
    x = Memory.splits["val"][1]
    shift, scale = (torch.tensor(about[name])[:, None, None] for name in ("shift", "scale"))
    with torch.no_grad():
        wanted = (theirs.encode(x).latent_dist.mean - shift) * scale
        torch.testing.assert_close(codec.encode(x).mean, wanted, rtol=1e-4, atol=1e-5)
        again = theirs.decode(wanted / scale + shift).sample
        torch.testing.assert_close(codec.decode(wanted), again, rtol=1e-4, atol=1e-5)
    if normalize == "folder":
        assert about["shift"] == [0.25] * 3 and about["scale"] == [0.5] * 3
    else:
        assert about["latent_std"]["train"] == pytest.approx(1, abs=1e-3)
    assert not Path("work").exists()


def test_pixels_need_no_plan_and_lose_nothing(here: Path) -> None:
    about, told, _ = run({"codec": {"kind": "pixel"}, "perceptual": SIMILAR})
    assert about["psnr"] > 120 and about["ssim"] == pytest.approx(1)
    assert about["perceptual"] == pytest.approx(0, abs=1e-6) == told["perceptual"]
    assert not {"scale", "latent_std"} & about.keys()


def test_so_many_pictures_are_chosen_evenly_and_never_two_sizes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "CHUNK", 16 * 16 * 5)
    pictures = Memory([smooth(24, 1, 16, 16, 0), smooth(1, 1, 64, 64, 0), smooth(16, 1, 8, 24, 0)])
    every = list(reconstruction.chunks(pictures))
    assert torch.cat(every).tolist() == list(range(41))
    assert [len(chunk) for chunk in every] == [5, 5, 5, 5, 4, 1, 6, 6, 4]
    for most in (1, 7, 30, 40, 41, 1000):
        ids = torch.cat(list(reconstruction.chunks(pictures, most)))
        gaps = ids.diff()
        assert len(ids) == min(most, 41) and ids[0] == 0
        assert len(ids) == 1 or (gaps.max() - gaps.min() <= 1 and 41 - ids[-1] <= gaps.max() + 1)
    found = list(reconstruction.moments(lambda x: x, pictures, torch.device("cpu"), 7))
    assert sum(map(len, found)) == 7 == len(pictures.asked)


def test_normalization_takes_no_more_pictures_than_it_may(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer(here / "theirs")
    codec = {"kind": "pretrained", "path": "theirs", "normalize": "measure"}
    few = run({"codec": codec, "normalize_images": 10}).about
    ours, _ = bundle.load_codec(Path("codec"))
    ids = torch.arange(10) * 40 // 10
    rows = [ours.raw(torch.cat([part[i : i + 1]])) for part in Memory.splits["train"] for i in range(len(part))]
    mean = torch.cat([rows[i].mean.transpose(0, 1).flatten(1) for i in ids], 1).double()
    std = torch.cat([rows[i].std.transpose(0, 1).flatten(1) for i in ids], 1).double()
    np.testing.assert_allclose(few["shift"], mean.mean(1).tolist(), rtol=1e-4, atol=1e-6)
    wanted = (mean.var(1, unbiased=False) + std.square().mean(1)).rsqrt()
    np.testing.assert_allclose(few["scale"], wanted.tolist(), rtol=1e-4)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"codec": {"kind": "kl_vae"}}, "codec kl_vae is to be trained, and there is no plan"),
        ({"codec": {"kind": "pixel"}, "adversarial": CRITIC}, "codec pixel is not trained here; an adversarial term"),
        ({"codec": {"kind": "pixel"}, "normalize_images": 0}, "normalize_images 0: at least 1"),
        (KL_VAE | {"codec": {"kind": "kl_vae", "widths": [8] * 5}}, "cannot be divided by 16, the codec's factor"),
        (KL_VAE | {"codec": {"kind": "pretraind"}}, "did you mean 'pretrained'"),
        (KL_VAE | {"reconstruction": "l2"}, "reconstruction is 'l2'; allowed: l1, mse"),
        (KL_VAE | {"perceptual": SIMILAR | {"window": 11}}, "8x24 are too small for perceptual .*sides of 22 or more"),
        (KL_VAE | {"adversarial": CRITIC | {"layers": 2}}, "8x24 are too small for adversarial .*sides of 12 or more"),
        ({"codec": {"kind": "pretrained", "path": "nowhere"}}, "nowhere lacks config.json"),
    ],
)
def test_what_cannot_be_is_a_sentence(here: Path, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(params)


def test_a_folder_of_other_channels_or_bytes_is_refused(here: Path) -> None:
    folder = here / "colour"
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder)
    with pytest.raises(ConfigError, match="pictures of 1 channels; the codec takes 3"):
        run({"codec": {"kind": "pretrained", "path": "colour"}})
    with pytest.raises(IntegrityError, match="00 is wanted"):
        run({"codec": {"kind": "pretrained", "path": "colour", "sha256": "00"}})


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_a_codec_that_is_not_finite_is_not_published(here: Path, where: str) -> None:
    model = peer(here / "theirs")
    with torch.no_grad():
        getattr(model, where).conv_out.bias[0] = math.inf
    model.save_pretrained("theirs")
    sentence = {"encoder": "latents cannot be measured: they are not finite", "decoder": "picture key0 is not finite"}
    with pytest.raises(DataError, match=sentence[where]):
        run({"codec": {"kind": "pretrained", "path": "theirs", "normalize": "measure"}})
    assert not Path("codec/codec.safetensors").exists()
