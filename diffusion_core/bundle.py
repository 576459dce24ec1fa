"""A bundle: codec + denoiser + sampling defaults in one folder, all a server needs to make pictures.

bundle.json holds the specs from which the modules are rebuilt, the safetensors files their weights,
manifest.json the digests; a text encoder, if there is one, has the folder `text` to itself. Nothing in a bundle is
code, and loading one runs none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_core import manifest
from diffusion_core.adapters import tokenizer
from diffusion_core.codec import Codec
from diffusion_core.denoiser import Condition, Denoiser, Label, Scale
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.nets import NetSpec
from diffusion_core.nets.text import Encoded, TextEncoder, TextSpec
from diffusion_core.sampler import Sampling
from diffusion_core.schedule import Schedule
from diffusion_core.spec import build, spec
from diffusion_core.target import Target
from diffusion_core.vae import CodecSpec
from diffusion_core.weights import load_weights, write_tensors

FORMAT = 1
NAME, CODEC_NAME, TEXT_NAME = "bundle.json", "codec.json", "text.json"
TEXT = "text"  # the folder of the text encoder in a bundle, and its key in bundle.json: absent where there is none
TEXT_WEIGHTS = "text.safetensors"
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

    @property
    def text(self) -> int:
        """How wide the text tokens are that the network reads, 0 if it reads none."""
        width = dict(self.net.keywords).get("text", 0)
        return width if isinstance(width, int) else 0


@dataclass
class Bundle:
    """A model ready to make pictures: modules in eval mode, defaults, class names and picture shape (C, H, W).

    With a text encoder its spec is given too. Raises ConfigError for a codec and a denoiser of different channels, and
    for a text encoder whose tokens the denoiser does not take.
    """

    codec: Codec
    codec_spec: CodecSpec
    denoiser: Denoiser
    denoiser_spec: DenoiserSpec
    sampling: Sampling
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    about: dict[str, Any] = field(default_factory=dict)
    text: TextEncoder | None = None
    text_spec: TextSpec | None = None

    def __post_init__(self) -> None:
        if self.denoiser_spec.channels != self.latent_shape[0]:
            raise ConfigError(
                f"the denoiser takes {self.denoiser_spec.channels} channels; the codec '{self.codec_spec.kind}' makes "
                f"{self.latent_shape[0]} of pictures of {self.image_shape[0]}"
            )
        if self.text is not None and self.text.width != self.denoiser_spec.text:
            raise ConfigError(
                f"the denoiser takes text {self.denoiser_spec.text} wide; the text encoder's is {self.text.width}"
            )

    @torch.no_grad()
    def condition(self, labels: Tensor, texts: Sequence[str | None] | None = None) -> Condition:
        """What `generate` is asked for: classes (B,), -1 for none, and a text each, None for none.

        Each text is encoded by itself, so that its tokens are the same bits in any company. Raises ConfigError for
        texts where there is no text encoder.
        """
        if self.text is None:
            if texts is not None:
                raise ConfigError("texts are given, and this model has no text encoder")
            return {"label": labels}
        wanted = [None] * len(labels) if texts is None else list(texts)
        encoded = {text: self.text.encode([text]) for text in set(wanted) if text is not None}
        rows = [encoded[text] if text is not None else _nothing(self.text) for text in wanted]
        return {
            "label": labels,
            "text": torch.cat([row.text for row in rows]),
            "mask": torch.cat([row.mask for row in rows]),
        }

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
    if bundle.text is not None and bundle.text_spec is not None:
        save_text(bundle.text, bundle.text_spec, folder / TEXT)
        described[TEXT] = text_digest(folder / TEXT)
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
    has_text = TEXT in described
    return Bundle(
        codec.eval().requires_grad_(False),
        codec_spec,
        load_denoiser(denoiser_spec, folder / "denoiser.safetensors"),
        denoiser_spec,
        build(Sampling, described["sampling"], f"{NAME}: sampling"),
        build(tuple[str, ...], described["classes"], f"{NAME}: classes"),
        build(tuple[int, int, int], described["image_shape"], f"{NAME}: image_shape"),
        described["about"],
        load_text(folder / TEXT) if has_text else None,
        text_spec(folder / TEXT) if has_text else None,
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


def codec_digest(folder: Path) -> str:
    """SHA-256 (hex) over the spec and the weights of a codec saved alone, and over nothing that lies beside them.

    Raises IntegrityError if a file is missing or cannot be read.
    """
    described = _read_json(folder / CODEC_NAME, ["codec"])["codec"]
    return manifest.digest_of([described, _hash(folder / "codec.safetensors")])


def save_text(encoder: TextEncoder, made_by: TextSpec, folder: Path) -> None:
    """Write a text encoder alone: text.json, its weights and, if it has one, its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / TEXT_NAME, {"format": FORMAT, "text": spec(made_by)})
    write_tensors(folder / TEXT_WEIGHTS, encoder.state_dict())
    if encoder.tokenizer is not None:
        (folder / tokenizer.NAME).write_bytes(encoder.tokenizer.to_json().encode())


def load_text(folder: Path) -> TextEncoder:
    """A text encoder saved alone, in eval mode and frozen; the folder's manifest is the caller's to verify.

    Raises ConfigError if it has a tokenizer and the extra `text` is not installed.
    """
    encoder: TextEncoder = text_spec(folder).build()
    load_weights(encoder, folder / TEXT_WEIGHTS)
    if (folder / tokenizer.NAME).exists():
        encoder.speaking(tokenizer.read_tokenizer(folder / tokenizer.NAME))
    return encoder.eval().requires_grad_(False)


def text_spec(folder: Path) -> TextSpec:
    """The spec of a text encoder saved alone."""
    return TextSpec.read(_read_json(folder / TEXT_NAME, ["text"])["text"], f"{TEXT_NAME}: text")


def text_digest(folder: Path) -> str:
    """SHA-256 (hex) over the spec, the weights and the tokenizer of a text encoder saved alone.

    Raises IntegrityError if a file is missing or cannot be read.
    """
    described = _read_json(folder / TEXT_NAME, ["text"])["text"]
    speaks = (folder / tokenizer.NAME).exists()
    words = _hash(folder / tokenizer.NAME) if speaks else None
    return manifest.digest_of([described, _hash(folder / TEXT_WEIGHTS), words])


def load_denoiser(denoiser_spec: DenoiserSpec, path: Path) -> Denoiser:
    """A denoiser from its spec and a file of weights, in eval mode and frozen."""
    denoiser = denoiser_spec.build()
    load_weights(denoiser, path)
    return denoiser.eval().requires_grad_(False)


def _nothing(text: TextEncoder) -> Encoded:
    """The null caption, as `without_condition` puts it: one token of zeros."""
    device = next(text.parameters()).device
    tokens = torch.zeros(1, text.length, text.width, device=device)
    return Encoded(tokens, torch.arange(text.length, device=device)[None] < 1)


def _hash(path: Path) -> str:
    try:
        return manifest.hash_file(path)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing") from error


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
