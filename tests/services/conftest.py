"""A tiny bundle with random weights, sealed like a real one, and the application around it without Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from diffusion_core import bundle, manifest
from diffusion_core.bundle import Bundle, DenoiserSpec
from diffusion_core.codec import Pixel
from diffusion_core.nets.text import TextSpec
from diffusion_core.sampler import Sampling
from diffusion_core.spec import build
from diffusion_core.vae import CodecSpec
from services import web
from services.config import Config, Target
from services.service import Service

DENOISER = {
    "net": {"kind": "dit", "channels": 4, "size": 8, "classes": 10, "width": 32, "depth": 2, "heads": 2},
    "schedule": {"kind": "linear"},
    "target": {"kind": "v"},
    "scale": {"kind": "unit_variance"},
    "label": {"kind": "time"},
}
CODEC = {"kind": "kl_vae", "channels": 1, "widths": [8, 8, 8]}

TEXT = TextSpec.read({"kind": "bytes", "width": 16, "length": 40, "depth": 1, "heads": 2}, "text")


def write_bundle(folder: Path, seed: int = 0) -> Path:
    """A sealed bundle whose pictures depend on noise, class, steps and guidance."""
    torch.manual_seed(seed)
    codec_spec = CodecSpec.read(CODEC, "codec")
    denoiser_spec = build(DenoiserSpec, DENOISER, "denoiser")
    denoiser = denoiser_spec.build()
    for weight in denoiser.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    sampling = Sampling(steps=2, guidance=1.5, allowed_steps=(1, 2, 4))
    classes = tuple(str(digit) for digit in range(10))
    made = Bundle(codec_spec.build(), codec_spec, denoiser, denoiser_spec, sampling, classes, (1, 32, 32))
    bundle.save(made, folder)
    manifest.seal(folder, "bundle", {"kind": "test"})
    return folder


def write_text_bundle(folder: Path, classes: tuple[str, ...]) -> Path:
    """A sealed bundle whose pictures depend on the text, and on the class where there are any."""
    torch.manual_seed(0)
    net = {"kind": "dit", "channels": 1, "size": 8, "width": 16, "depth": 1, "heads": 2}
    net |= {"classes": len(classes), "text": 16}
    spec = build(DenoiserSpec, DENOISER | {"net": net}, "denoiser")
    denoiser = spec.build()
    for weight in denoiser.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    made = Bundle(Pixel(), CodecSpec("pixel"), denoiser, spec, Sampling(2, guidance=1.5), classes, (1, 8, 8))
    made.text, made.text_spec = TEXT.build(), TEXT
    bundle.save(made, folder)
    manifest.seal(folder, "bundle", {"kind": "test"})
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads than idle processors make the tiniest product take milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("models") / "digits")


def settings(folder: Path, **more: object) -> Config:
    return Config.read({"model": f"folder://{folder}", "cache": str(folder.parent / "cache"), "threads": 1} | more)


@pytest.fixture(scope="module")
def service(folder: Path) -> Service:
    return Service(settings(folder))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(web.create(service), raise_server_exceptions=False) as client:
        assert client.portal is not None
        client.portal.call(service.load, Target(model=service.config.model, revision="first"))
        yield client
