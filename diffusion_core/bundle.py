"""A bundle: codec + denoiser + sampling defaults in one folder, all a server needs to make pictures.

bundle.json holds the specs from which the modules are rebuilt, the safetensors files their weights,
manifest.json the digests. Nothing in a bundle is code, and loading one runs none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusion_core import manifest
from diffusion_core.codec import Codec
from diffusion_core.denoiser import Denoiser, Label, Scale
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.nets import NetSpec
from diffusion_core.sampler import Sampling
from diffusion_core.schedule import Schedule
from diffusion_core.spec import build, spec
from diffusion_core.target import Target
from diffusion_core.vae import CodecSpec
from diffusion_core.weights import load_weights, write_tensors

FORMAT = 1
NAME, CODEC_NAME = "bundle.json", "codec.json"
KEYS = ("codec", "denoiser", "sampling", "classes", "image_shape", "about")


@dataclass(frozen=True)
class DenoiserSpec:
    """Everything of a denoiser but its weights; read from params.yaml and from bundle.json alike."""

    net: NetSpec
    schedule: Schedule
    target: Target
    scale: Scale
    label: Label
    first: float = 1.0
    variance: Literal["fixed", "learned"] = "fixed"

    def build(self) -> Denoiser:
        """A denoiser with fresh weights."""
        net = self.net
        if self.variance == "learned":
            net = net.extended(out_channels=2 * self.channels)
        return Denoiser(
            net.build(),
            self.schedule,
            self.target,
            scale=self.scale,
            label=self.label,
            first=self.first,
            variance=self.variance,
        )

    @property
    def channels(self) -> int:
        """How many channels are diffused; raises ConfigError for a network that does not say."""
        channels = dict(self.net.keywords).get("channels")
        if not isinstance(channels, int):
            raise ConfigError(f"net '{self.net.kind}' lacks channels")
        return channels


@dataclass
class Bundle:
    """A model ready to make pictures: modules in eval mode, defaults, class names and picture shape (C, H, W).

    Raises ConfigError for a codec and a denoiser of different channels.
    """

    codec: Codec
    codec_spec: CodecSpec
    denoiser: Denoiser
    denoiser_spec: DenoiserSpec
    sampling: Sampling
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.denoiser_spec.channels != self.latent_shape[0]:
            raise ConfigError(
                f"the denoiser takes {self.denoiser_spec.channels} channels; the codec '{self.codec_spec.kind}' makes "
                f"{self.latent_shape[0]} of pictures of {self.image_shape[0]}"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of what is diffused."""
        return self.codec.latent_shape(self.image_shape)


def save(bundle: Bundle, folder: Path) -> None:
    """Write bundle.json and the weights; sealing the folder with a manifest is its owner's last act."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "format": FORMAT,
        "codec": spec(bundle.codec_spec),
        "denoiser": spec(bundle.denoiser_spec),
        "sampling": spec(bundle.sampling),
        "classes": list(bundle.classes),
        "image_shape": list(bundle.image_shape),
        "about": bundle.about,
    }
    _write_json(folder / NAME, described)
    write_tensors(folder / "codec.safetensors", bundle.codec.state_dict())
    write_tensors(folder / "denoiser.safetensors", bundle.denoiser.state_dict())


def load(folder: Path, *, verify: bool = True) -> Bundle:
    """Rebuild a bundle; raises IntegrityError for a file that is missing, altered or of another format.

    `verify` checks every file against the manifest first; leave it out only for a folder just verified.
    """
    if verify:
        manifest.verify(folder)
    described = _read_json(folder / NAME, KEYS)
    codec_spec = CodecSpec.read(described["codec"], f"{NAME}: codec")
    denoiser_spec = build(DenoiserSpec, described["denoiser"], f"{NAME}: denoiser")
    codec: Codec = codec_spec.build()
    load_weights(codec, folder / "codec.safetensors")
    return Bundle(
        codec.eval().requires_grad_(False),
        codec_spec,
        load_denoiser(denoiser_spec, folder / "denoiser.safetensors"),
        denoiser_spec,
        build(Sampling, described["sampling"], f"{NAME}: sampling"),
        build(tuple[str, ...], described["classes"], f"{NAME}: classes"),
        build(tuple[int, int, int], described["image_shape"], f"{NAME}: image_shape"),
        described["about"],
    )


def save_codec(codec: Codec, codec_spec: CodecSpec, folder: Path) -> None:
    """Write a codec alone: codec.json and its weights."""
    _write_json(folder / CODEC_NAME, {"format": FORMAT, "codec": spec(codec_spec)})
    write_tensors(folder / "codec.safetensors", codec.state_dict())


def load_codec(folder: Path) -> tuple[Codec, CodecSpec]:
    """A codec saved alone, in eval mode, and its spec; the folder's manifest is the caller's to verify."""
    codec_spec = CodecSpec.read(_read_json(folder / CODEC_NAME, ["codec"])["codec"], f"{CODEC_NAME}: codec")
    codec: Codec = codec_spec.build()
    load_weights(codec, folder / "codec.safetensors")
    return codec.eval().requires_grad_(False), codec_spec


def load_denoiser(denoiser_spec: DenoiserSpec, path: Path) -> Denoiser:
    """A denoiser from its spec and a file of weights, in eval mode and frozen."""
    denoiser = denoiser_spec.build()
    load_weights(denoiser, path)
    return denoiser.eval().requires_grad_(False)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def _read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        described: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read ({error})") from error
    found = described.get("format") if isinstance(described, dict) else None
    if found != FORMAT:
        raise IntegrityError(f"{path} has format {found!r}; this version reads format {FORMAT}")
    if missing := [key for key in keys if key not in described]:
        raise IntegrityError(f"{path} lacks {', '.join(missing)}")
    return described
