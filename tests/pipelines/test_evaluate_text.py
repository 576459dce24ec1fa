"""Evaluation of models that read text: picture i is asked for the caption of training picture i, from start to wrap."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from diffusion_core.bundle import Bundle, DenoiserSpec
from diffusion_core.codec import Pixel
from diffusion_core.denoiser import Condition, Denoiser
from diffusion_core.errors import IntegrityError, RefusedError
from diffusion_core.images import decode, encode_png
from diffusion_core.metrics.passport import Passport
from diffusion_core.metrics.ruler import Ruler
from diffusion_core.nets.text import TextSpec
from diffusion_core.sampler import Sampling
from diffusion_core.schedule import Linear
from diffusion_core.target import X0
from diffusion_core.vae import CodecSpec
from pipelines import curves, evaluate
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from tests.pipelines import latent_inputs

TEXT = TextSpec.read({"kind": "bytes", "width": 8, "length": 12, "depth": 1, "heads": 2}, "text")
CAPTIONS = ["a cat", "a dog", None, "a bird"]
LABELS = torch.tensor([0, 1, 2, 0])


class Echo(nn.Module):
    """A network whose picture is the first number of its text's first token, and a hundredth of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c: Tensor, cond: Condition) -> Tensor:
        said = cond["text"][:, 1, 0] / 4 + cond["label"] / 100
        return said.reshape(-1, 1, 1, 1).expand_as(x) + self.nothing


def echoing(classes: tuple[str, ...] = ("a", "b", "c")) -> Bundle:
    spec = create_autospec(DenoiserSpec, instance=True, channels=1, text=8)
    parts = (Pixel(), CodecSpec("pixel"), Denoiser(Echo(), Linear(), X0()), spec, Sampling(1), classes, (1, 4, 4))
    return Bundle(*parts, text=TEXT.build().requires_grad_(False), text_spec=TEXT)


def wanted(count: int) -> Tensor:
    encoder = TEXT.build().requires_grad_(False)
    said = [0.0 if text is None else float(encoder.encode([text]).text[0, 1, 0]) / 4 for text in CAPTIONS]
    return (torch.tensor(said) + LABELS / 100)[torch.arange(count) % 4]


def captions(rows: Tensor) -> list[str | None]:
    return [CAPTIONS[row] for row in rows]


class Collected:
    """In place of a score: the pictures and labels that would be scored."""

    images: Tensor
    labels: Tensor

    def __init__(self, ruler: Ruler):
        Collected.images, Collected.labels = torch.empty(0, 1, 4, 4), torch.empty(0, dtype=torch.int64)

    def add(self, images: Tensor, labels: Tensor) -> None:
        Collected.images, Collected.labels = (torch.cat((Collected.images, images)), torch.cat((self.labels, labels)))

    def score(self) -> SimpleNamespace:
        return SimpleNamespace(count=len(self.images))


def test_every_picture_is_asked_for_its_caption_and_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "Scoring", Collected)
    ruler = SimpleNamespace(real=SimpleNamespace(labels=LABELS))
    passport = Passport("name", "e", "none", "r", 4, 10, 0, Sampling(1), "b", "none")
    curves.measure(echoing(), ruler, passport, 3, captions=captions)
    assert torch.equal(Collected.labels, LABELS[torch.arange(10) % 4])
    torch.testing.assert_close(Collected.images.mean((1, 2, 3)), wanted(10), rtol=0, atol=1e-5)


def test_the_sheet_shows_the_first_captions() -> None:
    pixels = decode(encode_png(evaluate.sheet(echoing(), 0, LABELS, captions)), 1)
    assert pixels.shape == (6 * 12 + 4, 10 * 12 + 4, 1)
    middles = torch.from_numpy(pixels[8 : 6 * 12 : 12, 8 : 10 * 12 : 12, 0].copy()).flatten()
    torch.testing.assert_close(middles / 127.5 - 1, wanted(60).clamp(-1, 1), rtol=0, atol=0.005)


def test_captions_come_from_the_training_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = latent_inputs.some(12)
    latent_inputs.write_data(pictures)
    train = [one for one in latent_inputs.in_order(pictures) if one.split == "train"]
    stage = Stage("evaluate", tmp_path, tmp_path, create_autospec(Tracker, instance=True), Console(quiet=True))
    found = evaluate.training_captions(stage, len(train))
    rows = torch.arange(len(train)).flip(0)
    assert found(rows) == [one.caption for one in train][::-1]
    assert list(stage.parents) == ["artifacts/data"]
    with pytest.raises(IntegrityError, match=f"has {len(train)} training pictures, the judge saw 5: run train_judge"):
        evaluate.training_captions(stage, 5)


def test_a_model_without_classes_cannot_be_judged() -> None:
    ruler = create_autospec(Ruler, instance=True)
    ruler.extractor = SimpleNamespace(shape=SimpleNamespace(channels=1, size=4, classes=0))
    with pytest.raises(RefusedError, match="the bundle knows no classes, .* give the pictures labels"):
        evaluate.check_fits(echoing(()), ruler)
