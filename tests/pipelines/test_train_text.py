"""Training with captions: from a hand-made cache to a bundle that draws what a text says, and what is refused."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from rich.console import Console
from torch import Tensor

from diffusion_core import bundle, manifest
from diffusion_core.bundle import Bundle, DenoiserSpec
from diffusion_core.codec import Pixel
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.images import decode
from diffusion_core.nets.text import TextSpec
from diffusion_core.noise import Noise
from diffusion_core.sampler import Sampling, generate
from diffusion_core.spec import build
from diffusion_core.vae import CodecSpec
from diffusion_core.weights import write_tensors
from pipelines import distill, train
from pipelines.data.latents import Latents
from pipelines.stage import Stage
from pipelines.tracking import Tracker

ENCODER = TextSpec.read({"kind": "bytes", "width": 16, "length": 12, "depth": 1, "heads": 2}, "text")
CAPTIONS = ("a dark one", "a bright one", "bright", "dark")
BRIGHTNESS = (-0.8, 0.8, 0.8, -0.8)
TEXTS = ["dark", "bright", None]
NET = {"kind": "dit", "width": 32, "depth": 1, "heads": 2}
PARAMS: dict[str, Any] = {
    "denoiser": {
        "net": NET,
        "schedule": {"kind": "linear"},
        "target": {"kind": "velocity"},
        "scale": {"kind": "unit_variance"},
        "label": {"kind": "quarter_log_noise"},
    },
    "times": {"kind": "uniform_times"},
    "weight": {"kind": "flat"},
    "plan": {"images": 3840, "batch": 32, "lr": 1e-2, "warm_up": 320, "ema": 0.8},
    "sampling": {"steps": 8},
    "cluster": {"workers": 0},
}


def sealed(folder: Path, kind: str, about: dict[str, Any]) -> Path:
    manifest.seal(folder, kind, about)
    return folder


def write_latents(
    sizes: Sequence[tuple[int, int]] = ((4, 4),), classes: Sequence[str] = (), captions: bool = True
) -> Path:
    """A cache of pictures of one brightness each that only their caption tells; every ninth has none."""
    folder = Path("artifacts/latents")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    encoder = ENCODER.build().requires_grad_(False)
    for height, width in sizes:
        rows = torch.arange(64)
        said = torch.where(rows % 9 == 8, 0, rows % 4 + 1)
        mean = torch.tensor(BRIGHTNESS)[rows % 4].reshape(-1, 1, 1, 1).expand(-1, 1, height, width)
        tensors = {"moments": torch.cat((mean, torch.full_like(mean, 0.05)), 1)}
        tensors["label"] = rows % len(classes) if classes else torch.full((64,), -1)
        name = "train.safetensors" if len(sizes) == 1 else f"train-{height}x{width}.safetensors"
        write_tensors(folder / name, tensors | ({"caption": said} if captions else {}))
    if captions:
        text, mask = encoder.encode(CAPTIONS)
        null = torch.zeros(1, *mask.shape[1:], dtype=torch.bool)
        null[0, 0] = True
        rows = {"text": torch.cat((torch.zeros(1, *text.shape[1:]), text)), "mask": torch.cat((null, mask))}
        write_tensors(folder / "captions.safetensors", rows)
        bundle.save_text(encoder, ENCODER, folder / "text")
    about = {
        "classes": list(classes),
        "counts": {"train": 64 * len(sizes)},
        "image_shape": [1, *sizes[0]],
        "latent_shape": [1, *sizes[0]],
        "codec": bundle.codec_digest(Path("artifacts/codec")),
        "text": bundle.text_digest(folder / "text") if captions else None,
    }
    return sealed(folder, "latents", about)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    codec = Path("artifacts/codec")
    codec.mkdir(parents=True)
    bundle.save_codec(Pixel(), CodecSpec("pixel"), codec)
    sealed(codec, "codec", {})
    return tmp_path


def stage(name: str, out: str) -> Stage:
    tracker = create_autospec(Tracker, instance=True)
    tracker.journal = Path("journal.jsonl").resolve()
    tracker.journal.touch()
    shutil.rmtree(out, ignore_errors=True)
    Path(out).mkdir(parents=True)
    return Stage(name, Path(out), Path("work") / name, tracker, Console(quiet=True))


def trained(**changes: Any) -> Bundle:
    """The teacher of one run of the stage, as it was saved."""
    train.main(build(train.Config, PARAMS | changes, "train"), stage("train", "artifacts/teacher"))
    return bundle.load(sealed(Path("artifacts/teacher"), "bundle", {}).resolve())


def brief(images: int = 64) -> dict[str, Any]:
    return {"images": images, "batch": 32, "ema": 0.5}


def denoiser(**net: Any) -> dict[str, Any]:
    return PARAMS["denoiser"] | {"net": net}


def drawn(made: Bundle, texts: Sequence[str | None], sampling: Sampling | None = None) -> Tensor:
    seeds, labels = [7] * len(texts), torch.full((len(texts),), -1)
    asked = made.condition(labels, texts)
    return generate(made.denoiser, made.codec, sampling or made.sampling, made.latent_shape, seeds, asked)


def test_a_model_draws_what_its_captions_taught_it_and_so_does_its_student(here: Path) -> None:
    latents = write_latents()
    teacher = trained()
    assert teacher.text_spec == ENCODER and teacher.classes == () and teacher.image_shape == (1, 4, 4)
    assert bundle.text_digest(Path("artifacts/teacher/text")) == bundle.text_digest(latents / "text")
    dark, bright, neither = drawn(teacher, TEXTS).mean((1, 2, 3)).tolist()
    assert dark < -0.5 and bright > 0.5
    assert torch.equal(drawn(teacher, TEXTS), drawn(teacher, TEXTS))
    torch.testing.assert_close(drawn(teacher, TEXTS[:1])[0], drawn(teacher, TEXTS)[0], rtol=0, atol=1e-5)
    unconditional = generate(teacher.denoiser, teacher.codec, teacher.sampling, (1, 4, 4), [7])
    assert unconditional.mean() == pytest.approx(neither, abs=0.3)  # no text and the null caption mean the same
    sheet = decode(Path("artifacts/teacher/samples.png").read_bytes(), 1)
    assert sheet.shape == (4 * 6 + 2, 8 * 6 + 2, 1)
    said = [sheet[2 + 6 * (n // 8) : 6 + 6 * (n // 8), 2 + 6 * (n % 8) : 6 + 6 * (n % 8)].mean() for n in range(32)]
    for n, level in enumerate(said):  # picture n was asked for the caption of training picture n
        assert n % 9 == 8 or (level > 127) == (BRIGHTNESS[n % 4] > 0)

    config = build(
        distill.ProgressiveConfig,
        {"start": 8, "stop": 4, "weight": {"kind": "flat"}, "plan": brief(320), "cluster": {"workers": 0}},
        "distill",
    )
    distill.main(config, stage("distill.progressive", "student"))
    student = bundle.load(sealed(Path("student"), "bundle", {}))
    assert student.text_spec == ENCODER and student.sampling.steps == 4
    dark, bright, _ = drawn(student, TEXTS).mean((1, 2, 3)).tolist()
    assert dark < -0.4 and bright > 0.4
    assert Path("student/samples-4.png").exists()


def test_the_condition_of_a_bundle_is_the_cached_one(here: Path) -> None:
    latents = Latents.open(write_latents(), "train")
    teacher = trained(plan=brief())
    ids = torch.arange(10)
    cached = latents.batch(ids, Noise(0, ids)).cond
    found = teacher.condition(cached["label"], [None if n % 9 == 8 else CAPTIONS[n % 4] for n in range(10)])
    assert found.keys() == cached.keys()
    assert torch.equal(found["mask"], cached["mask"]) and torch.equal(found["label"], cached["label"])
    torch.testing.assert_close(found["text"], cached["text"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "net",
    [
        {"kind": "mmdit", "width": 16, "depth": 1, "heads": 2},
        {"kind": "uvit", "width": 16, "depth": 1, "heads": 2},
        {"kind": "unet", "widths": [8], "depth": 1, "attention": [4], "head_width": 8, "groups": 4},
    ],
    ids=lambda net: net["kind"],
)
def test_every_network_that_reads_text_is_given_its_width(net: dict[str, Any], here: Path) -> None:
    write_latents(classes=("a", "b"))
    made = trained(denoiser=denoiser(**net), plan=brief())
    assert made.denoiser_spec.text == ENCODER.build().width and made.classes == ("a", "b")


@pytest.mark.parametrize("kind", ["lean", "edm2"])
def test_a_network_that_cannot_read_is_refused_before_anything_is_trained(kind: str, here: Path) -> None:
    write_latents()
    with pytest.raises(ConfigError, match=f"'{kind}' reads no text, .*allowed: dit, mmdit, unet, uvit.*text: null"):
        trained(denoiser=denoiser(kind=kind))
    assert not Path("artifacts/teacher/denoiser.safetensors").exists()


def test_without_captions_nothing_is_read(here: Path) -> None:
    write_latents(captions=False)
    made = trained(plan=brief())
    assert made.text is None and made.denoiser_spec.text == 0
    assert not Path("artifacts/teacher/text").exists()
    with pytest.raises(ConfigError, match="this model has no text encoder"):
        made.condition(torch.tensor([-1]), ["a cat"])


def test_latents_of_several_shapes_want_a_network_that_takes_them(here: Path) -> None:
    sizes = ((4, 8), (6, 6), (8, 4))
    write_latents(sizes, captions=False)
    with pytest.raises(ConfigError, match=r"'dit' cannot take all latents: x is 4x8.*'unet' and 'lean'"):
        trained()
    lean = {"kind": "lean", "widths": [8, 16], "groups": 4, "heads": 2}
    made = trained(denoiser=denoiser(**lean), plan=brief())
    assert made.image_shape == (1, 6, 6)
    write_latents(((6, 12), (8, 8)), captions=False)
    with pytest.raises(ConfigError, match=r"'lean' cannot take all latents: x is 6x12; .* multiples of 4"):
        trained(denoiser=denoiser(**lean | {"widths": [8, 8, 16]}))


def test_latents_of_another_codec_are_refused(here: Path) -> None:
    write_latents()
    other = CodecSpec.read({"kind": "kl_vae", "channels": 1, "latent": 1, "widths": [8, 8]}, "codec")
    bundle.save_codec(other.build(), other, Path("artifacts/codec"))
    sealed(Path("artifacts/codec"), "codec", {})
    with pytest.raises(IntegrityError, match="made by the codec .*run cache_latents again"):
        trained()


def test_a_text_encoder_that_the_network_was_not_made_for_is_refused() -> None:
    spec = build(DenoiserSpec, denoiser(**NET, channels=1, size=4, classes=0, text=8), "denoiser")
    with pytest.raises(ConfigError, match="the denoiser takes text 8 wide; the text encoder's is 16"):
        Bundle(
            *(Pixel(), CodecSpec("pixel"), spec.build(), spec, Sampling(2), (), (1, 4, 4)),
            text=ENCODER.build(),
            text_spec=ENCODER,
        )
