"""A local folder of a CLIP or T5 model in Hugging Face's format -> our text encoder: the same network, other names.

The folder holds `config.json`, `model.safetensors` and `tokenizer.json`. Of a model with a vision tower or a decoder
only what encodes text is read. A configuration says much that does not change the network, so only the options that
do are looked at; the weights must fit to the last tensor.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from torch import Tensor

from diffusion_core.adapters.folder import (
    CONFIG,
    filled,
    joined,
    present,
    read_config,
    read_options,
    read_weights,
    renamed,
)
from diffusion_core.adapters.tokenizer import NAME, read_tokenizer
from diffusion_core.errors import ConfigError, suggest
from diffusion_core.nets.text import TextEncoder, TextSpec

WEIGHTS = "model.safetensors"
NO_TEXT = re.compile(
    r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$|decoder\.|lm_head\.|"
    r"(text_model\.)?embeddings\.position_ids$|encoder\.embed_tokens\."  # the last is shared.weight once more
)
CLIP_NAMES = {
    **{"embeddings.token_embedding": "tokens", "embeddings.position_embedding": "places"},
    **{"encoder.layers": "blocks", "final_layer_norm": "norm", "layer_norm1": "norm1", "layer_norm2": "norm2"},
    **{"self_attn.out_proj": "join", "mlp.fc1": "widen", "mlp.fc2": "narrow"},
}
T5_NAMES = {
    **{"shared": "tokens", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "bias"},
    **{"encoder.block": "blocks", "encoder.final_layer_norm": "norm", "layer.0.layer_norm": "norm1"},
    **{"layer.1.layer_norm": "norm2", "layer.0.SelfAttention.o": "join", "layer.1.DenseReluDense.wo": "narrow"},
    "layer.1.DenseReluDense.wi": "widen",
}
O = TypeVar("O")  # noqa: E741 (options)


@dataclass(frozen=True)
class ClipOptions:
    """The options of a CLIP text model that change its network, with the values that a file may leave out."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class T5Options:
    """The options of a T5 model that change its encoder, with the values that a file may leave out."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"


@dataclass(frozen=True)
class Pretrained:
    """A CLIP or T5 model in the local folder `path`, its weights of SHA-256 `sha256` if given.

    `length` is how many tokens a text has (default: all that CLIP knows, 128 of T5); `penultimate` stops one block
    before the last, as many networks were taught.
    """

    path: str
    sha256: str | None = None
    length: int | None = None
    penultimate: bool = False

    def read(self) -> tuple[TextSpec, TextEncoder]:
        """The encoder and its spec; raises ConfigError and IntegrityError as `read_text` does."""
        return read_text(Path(self.path), self.sha256, length=self.length, penultimate=self.penultimate)


class TextSource(TextSpec):
    """Where a text encoder comes from: its spec, if it is to be built here, or a pretrained one."""

    known: ClassVar[Mapping[str, type]] = {"bytes": TextSpec.known["bytes"], "pretrained": Pretrained}

    def made(self) -> tuple[TextSpec, TextEncoder]:
        """The encoder, in eval mode and frozen, and the spec under which it is saved."""
        if self.kind == "pretrained":
            pretrained: Pretrained = self.build()
            return pretrained.read()
        encoder: TextEncoder = self.build()
        return TextSpec(self.kind, self.keywords), encoder.eval().requires_grad_(False)


def read_text(
    folder: Path, sha256: str | None = None, *, length: int | None = None, penultimate: bool = False
) -> tuple[TextSpec, TextEncoder]:
    """The text encoder of a folder in float32, frozen, and its spec; `Pretrained` says what the options are.

    Raises ConfigError for a missing file, another kind of model or an option that cannot be expressed, and
    IntegrityError for weights that are torn, of another digest, or not those of the options.
    """
    config = read_config(folder)
    readers: Mapping[str, Callable[..., tuple[TextSpec, dict[str, Tensor]]]] = {
        **{"clip": _clip, "clip_text_model": _clip},
        "t5": _t5,
    }
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in readers:
        raise ConfigError(f"{folder / CONFIG}: model_type is {kind!r}; {suggest(str(kind), readers)}")
    found = read_weights(folder, WEIGHTS, sha256)
    tensors = {name: tensor for name, tensor in found.items() if not NO_TEXT.match(name)}
    spec, ours = readers[kind](config, tensors, folder, length, int(penultimate))
    encoder: TextEncoder = filled(spec.build(), ours, folder, WEIGHTS)
    return spec, encoder.speaking(read_tokenizer(present(folder, NAME))).eval().requires_grad_(False)


def _clip(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], folder: Path, length: int | None, less: int
) -> tuple[TextSpec, dict[str, Tensor]]:
    nested = config.get("text_config")  # of a model with a vision tower
    options = _options(ClipOptions, nested if isinstance(nested, Mapping) else config, folder)
    length = options.max_position_embeddings if length is None else length
    if not 1 <= length <= options.max_position_embeddings:
        raise ConfigError(f"length {length}: from 1 to {options.max_position_embeddings}, as {folder} has, is wanted")
    spec = TextSpec("clip").extended(
        vocabulary=options.vocab_size,
        width=options.hidden_size,
        depth=options.num_hidden_layers - less,
        heads=options.num_attention_heads,
        inner=options.intermediate_size,
        length=length,
        activation=options.hidden_act,
        eps=options.layer_norm_eps,
    )
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ours = renamed(joined(bare, parts, "mix"), CLIP_NAMES)
    if "places.weight" in ours:
        ours["places.weight"] = ours["places.weight"][:length]
    return spec, _without_last(ours, options.num_hidden_layers, less)


def _t5(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], folder: Path, length: int | None, less: int
) -> tuple[TextSpec, dict[str, Tensor]]:
    options = _options(T5Options, config, folder)
    spec = TextSpec("t5").extended(
        vocabulary=options.vocab_size,
        width=options.d_model,
        depth=options.num_layers - less,
        heads=options.num_heads,
        head_width=options.d_kv,
        inner=options.d_ff,
        feed=options.feed_forward_proj,
        buckets=options.relative_attention_num_buckets,
        farthest=options.relative_attention_max_distance,
        eps=options.layer_norm_epsilon,
        **({} if length is None else {"length": length}),
    )
    asks = tuple(f"layer.0.SelfAttention.{part}" for part in "qkv")
    gates = tuple(f"layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1"))
    ours = renamed(joined(joined(tensors, asks, "mix"), gates, "widen"), T5_NAMES)
    return spec, _without_last(ours, options.num_layers, less)


def _options(wanted: type[O], config: Mapping[str, object], folder: Path) -> O:
    names = wanted.__annotations__
    return read_options(wanted, {name: value for name, value in config.items() if name in names}, folder)


def _without_last(tensors: Mapping[str, Tensor], depth: int, less: int) -> dict[str, Tensor]:
    """The tensors but those of the `less` last blocks of `depth`."""
    left_out = tuple(f"blocks.{number}." for number in range(depth - less, depth))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}
