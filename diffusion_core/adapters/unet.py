"""diffusers' `UNet2DModel` and `UNet2DConditionModel` (the kind of Stable Diffusion 1 and 2) as our `UNet`.

Both are one network with other keywords. Three differences of layout are absorbed in the weights: the queries, keys
and values of an attention are one linear map here; sines come before cosines; and projections by 1x1 convolution are
linear maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from diffusion_core.adapters.folder import CONFIG, class_of, filled, joined, read_folder, read_options, renamed
from diffusion_core.errors import ConfigError, suggest
from diffusion_core.nets import NetSpec
from diffusion_core.nets.unet import UNet, sides_of

PLAIN, TEXT = "UNet2DModel", "UNet2DConditionModel"
PERIOD = 10_000.0
WAVES, LABELS = "level.1.weight", "label.weight"
PROJECTIONS = ("attention.enter.weight", "attention.leave.weight")
IN_TEXT = "transformer_blocks.0"
JOINED = (
    ((f"{IN_TEXT}.attn1.to_q", f"{IN_TEXT}.attn1.to_k", f"{IN_TEXT}.attn1.to_v"), "attend.mix"),
    ((f"{IN_TEXT}.attn2.to_k", f"{IN_TEXT}.attn2.to_v"), "read.answer"),
    ((f"{IN_TEXT}.attn2.to_q",), "read.ask"),
    (("to_q", "to_k", "to_v"), "attend.mix"),
)
NAMES = (
    *(("conv_in", "enter"), ("conv_norm_out", "norm"), ("conv_out", "leave"), ("class_embedding", "label")),
    *(("time_embedding.linear_1", "level.1"), ("time_embedding.linear_2", "level.3")),
    *(("time_emb_proj", "steer"), ("conv_shortcut", "skip"), ("proj_in", "enter"), ("proj_out", "leave")),
    *((f"{IN_TEXT}.norm1", "norm1"), (f"{IN_TEXT}.norm2", "norm2"), (f"{IN_TEXT}.norm3", "norm3")),
    *((f"{IN_TEXT}.attn1.to_out.0", "attend.join"), (f"{IN_TEXT}.attn2.to_out.0", "read.join")),
    *((f"{IN_TEXT}.ff.net.0.proj", "gated"), (f"{IN_TEXT}.ff.net.2", "narrow")),
    *(("group_norm", "norm"), ("to_out.0", "attend.join")),
)


@dataclass(frozen=True, kw_only=True)
class _Common:
    """The options that both classes have; a `Literal` lists the values that our network can express."""

    block_out_channels: tuple[int, ...]
    attention_head_dim: tuple[int, ...]
    sample_size: int
    center_input_sample: Literal[False] = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    layers_per_block: int = 2
    mid_block_scale_factor: Literal[1] = 1
    downsample_padding: Literal[0, 1] = 1
    dropout: float = 0.0
    act_fn: Literal["silu", "swish"] = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    class_embed_type: Literal[None] = None
    num_class_embeds: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Plain(_Common):
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[Literal["DownBlock2D", "AttnDownBlock2D"], ...]
    up_block_types: tuple[Literal["UpBlock2D", "AttnUpBlock2D"], ...]
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    downsample_type: Literal["conv"] = "conv"
    upsample_type: Literal["conv"] = "conv"
    attn_norm_num_groups: int | None = None
    add_attention: bool = True
    num_train_timesteps: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Text(_Common):
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[Literal["DownBlock2D", "CrossAttnDownBlock2D"], ...]
    up_block_types: tuple[Literal["UpBlock2D", "CrossAttnUpBlock2D"], ...]
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] = "UNetMidBlock2DCrossAttn"
    cross_attention_dim: int = 1280
    transformer_layers_per_block: Literal[1] = 1
    reverse_transformer_layers_per_block: Literal[None] = None
    use_linear_projection: bool = False
    upcast_attention: bool = False
    only_cross_attention: Literal[False] = False
    mid_block_only_cross_attention: bool | None = None
    dual_cross_attention: Literal[False] = False
    num_attention_heads: Literal[None] = None
    encoder_hid_dim: Literal[None] = None
    encoder_hid_dim_type: Literal[None] = None
    addition_embed_type: Literal[None] = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int | None = None
    resnet_skip_time_act: Literal[False] = False
    resnet_out_scale_factor: Literal[1] = 1
    time_embedding_act_fn: Literal[None] = None
    timestep_post_act: Literal[None] = None
    time_cond_proj_dim: Literal[None] = None
    conv_in_kernel: Literal[3] = 3
    conv_out_kernel: Literal[3] = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    cross_attention_norm: Literal[None] = None

    def __post_init__(self) -> None:
        if self.mid_block_only_cross_attention:
            raise ConfigError("mid_block_only_cross_attention is True; only False can be expressed")


def read_unet(folder: Path, sha256: str | None = None) -> tuple[NetSpec, UNet]:
    """The network of a folder in float32, and its spec; the weights' digest is checked against `sha256` if given.

    It is told a timestep: c in 0..999. "No class", which the peer does not know, adds nothing.
    Raises ConfigError naming an option that is unknown or has a value that cannot be expressed, and IntegrityError for
    weights that are torn, of another digest, or not those of the options.
    """
    named = class_of(folder)
    if named not in (PLAIN, TEXT):
        raise ConfigError(f"{folder / CONFIG}: _class_name is {named!r}; {suggest(named, (PLAIN, TEXT))}")
    found, tensors = read_folder(folder, named, sha256)
    settled = _settled(found)
    plain = named == PLAIN
    options = read_options(_Plain, settled, folder) if plain else read_options(_Text, settled, folder)
    try:
        spec = _spec(options)
        net: UNet = spec.build()
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    return spec, filled(net, _weights(options, tensors), folder)


def _settled(found: Mapping[str, object]) -> dict[str, object]:
    """The options with two that may be a number, a list or nothing as one type each: a number, and a list."""
    side, heads = found.get("sample_size"), found.get("attention_head_dim", 8)
    side = max(side, default=0) if isinstance(side, list) else side or 0
    heads = heads if isinstance(heads, list) else [] if heads is None else [heads]
    return {**found, "sample_size": side, "attention_head_dim": heads}


def _spec(options: _Plain | _Text) -> NetSpec:
    widths = options.block_out_channels
    attends = _levels_with_attention(options)
    if options.time_embedding_dim not in (None, 4 * widths[0]):
        raise ConfigError(f"time_embedding_dim is {options.time_embedding_dim}; only {4 * widths[0]} can be expressed")
    lopsided = options.downsample_padding == 0
    sides = sides_of(max(options.sample_size, 2 ** (len(widths) - 1)), len(widths), lopsided)  # all different
    spec = NetSpec("unet").extended(
        channels=options.in_channels,
        size=sides[0],
        classes=options.num_class_embeds or 0,
        widths=widths,
        depth=options.layers_per_block,
        attention=tuple(side for side, one in zip(sides, attends, strict=True) if one),
        groups=options.norm_num_groups,
        eps=options.norm_eps,
        film=options.resnet_time_scale_shift == "scale_shift",
        dropout=options.dropout,
        period=PERIOD,
        shift=options.freq_shift,
        lopsided=lopsided,
        out_channels=options.out_channels,
    )
    if isinstance(options, _Text):
        return spec.extended(text=options.cross_attention_dim, **_heads(options, [*attends[:-1], True]))
    return spec.extended(middle=options.add_attention, **_head_width(options))


def _levels_with_attention(options: _Plain | _Text) -> list[bool]:
    down, up = ([("Attn" in kind) for kind in kinds] for kinds in (options.down_block_types, options.up_block_types))
    if down != up[::-1] or len(down) != len(options.block_out_channels) or not down:
        raise ConfigError(
            f"down_block_types {list(options.down_block_types)} and up_block_types {list(options.up_block_types)} "
            f"must mirror each other, one for each of block_out_channels {list(options.block_out_channels)}"
        )
    return down


def _head_width(options: _Plain) -> dict[str, int]:
    """Here `attention_head_dim` is the width of a head; without it there is one head."""
    if len(options.attention_head_dim) > 1:
        raise ConfigError(f"attention_head_dim is {list(options.attention_head_dim)}; one number is wanted")
    usual = None if options.resnet_time_scale_shift == "scale_shift" else options.norm_num_groups
    groups = usual if options.attn_norm_num_groups is None else options.attn_norm_num_groups
    if options.add_attention and groups != options.norm_num_groups:
        raise ConfigError(
            f"attn_norm_num_groups is {groups}; only {options.norm_num_groups}, norm_num_groups, can be expressed"
        )
    return {"head_width": options.attention_head_dim[0]} if options.attention_head_dim else {"heads": 1}


def _heads(options: _Text, attends: list[bool]) -> dict[str, int]:
    """Here `attention_head_dim` is, against its name, how many heads there are: as many, or as wide, at every level."""
    widths, given = options.block_out_channels, options.attention_head_dim
    heads = given * len(widths) if len(given) == 1 else given
    if len(heads) != len(widths) or min(heads) < 1:
        raise ConfigError(f"attention_head_dim is {list(given)}; one number from 1, or one a level, is wanted")
    used = [(width, many) for width, many, one in zip(widths, heads, attends, strict=True) if one]
    if len({many for _, many in used}) == 1:
        return {"heads": used[0][1]}
    if any(width % many for width, many in used) or len({width // many for width, many in used}) > 1:
        raise ConfigError(
            f"attention_head_dim is {list(given)} for block_out_channels {list(widths)}; "
            "only as many heads, or heads as wide, at every level can be expressed"
        )
    return {"head_width": used[0][0] // used[0][1]}


def _weights(options: _Plain | _Text, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for parts, into in JOINED:
        tensors = joined(tensors, parts, into)
    ours = renamed(tensors, _places(options) | dict(NAMES))
    ours |= {name: tensor.flatten(1) for name, tensor in ours.items() if name.endswith(PROJECTIONS)}
    if options.flip_sin_to_cos:
        ours |= {name: tensor.roll(tensor.shape[1] // 2, 1) for name, tensor in ours.items() if name == WAVES}
    ours |= {name: F.pad(table, (0, 0, 0, 1)) for name, table in ours.items() if name == LABELS}
    return ours


def _places(options: _Plain | _Text) -> dict[str, str]:
    """Their name -> ours, of every residual block, attention and change of side."""
    levels, depth = range(len(options.block_out_channels)), options.layers_per_block
    down = [f"down_blocks.{i}.{part}" for i in levels for part in _parts("downsamplers", depth)]
    up = [f"up_blocks.{i}.{part}" for i in levels for part in _parts("upsamplers", depth + 1)]
    middle = ["mid_block.resnets.0", "mid_block.resnets.1"]
    ours: dict[str, str] = {}
    for block, places in (("down", down), ("middle", middle), ("up", up)):
        for index, place in enumerate(places):
            if "samplers" in place:
                ours[place] = f"{block}.{index}"
            else:
                ours[place] = f"{block}.{index}.residual"
                ours[place.replace("resnets", "attentions")] = f"{block}.{index}.attention"
    return ours


def _parts(resize: str, depth: int) -> list[str]:
    return [*(f"resnets.{j}" for j in range(depth)), f"{resize}.0"]
