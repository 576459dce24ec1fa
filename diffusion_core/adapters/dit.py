"""Diffusion transformers in the diffusers format: `DiTTransformer2DModel`, until 2024 `Transformer2DModel`.

Each of their blocks owns an embedding of timestep and class; in the published weights (Peebles and Xie 2023,
arXiv 2212.09748) they are copies of one. Ours has that one, so folders whose copies differ are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion_core.adapters.folder import WEIGHTS, class_of, filled, joined, read_folder, read_options, renamed
from diffusion_core.errors import ConfigError, RefusedError, suggest
from diffusion_core.nets import NetSpec
from diffusion_core.nets.dit import STEP_WAVES, DiT

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
NAMES = (
    ("pos_embed.proj", "enter"),
    ("timestep_embedder.linear_1", "level.1"),
    ("timestep_embedder.linear_2", "level.3"),
    ("class_embedder.embedding_table", "label"),
    ("transformer_blocks", "blocks"),
    ("norm1.linear", "steer"),
    ("attn1.to_out.0", "join"),
    ("ff.net.0.proj", "mlp.0"),
    ("ff.net.2", "mlp.2"),
    ("proj_out_1", "steer"),
    ("proj_out_2", "leave"),
)


@dataclass(frozen=True)
class Options:
    """The options of both classes; a `Literal` is the only value that a published transformer has."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    attention_bias: Literal[True] = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = 1e-5
    cross_attention_dim: Literal[None] = None
    num_vector_embeds: Literal[None] = None
    only_cross_attention: Literal[False] = False
    use_linear_projection: Literal[False] = False


def read_dit(folder: Path, sha256: str | None = None) -> tuple[NetSpec, DiT]:
    """The network of a folder and its spec; the weights' digest is checked against `sha256` if given.

    It is told a timestep: c in 0..999. Where the folder says so the output has 2C channels, the second half for a
    learned variance.
    Raises ConfigError for an option that cannot be expressed, IntegrityError for weights that are torn, altered or do
    not fit the options, RefusedError if the blocks' embeddings differ.
    """
    named = class_of(folder)
    if named not in CLASSES:
        raise ConfigError(f"{folder}: _class_name is {named!r}; {suggest(named, CLASSES)}")
    given, tensors = read_folder(folder, named, sha256)
    options = read_options(Options, given, folder)
    spec = NetSpec("dit").extended(
        channels=options.in_channels,
        size=options.sample_size,
        classes=options.num_embeds_ada_norm,
        patch=options.patch_size,
        width=options.num_attention_heads * options.attention_head_dim,
        depth=options.num_layers,
        heads=options.num_attention_heads,
        out_channels=options.out_channels,
        period=10_000.0,
        shift=1.0,
        columns_first=True,
        eps=1e-6,
        mlp_eps=options.norm_eps,
    )
    net: DiT = spec.build()
    parts = joined(_one_embedding(tensors, folder), ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "mix")
    ours = renamed(parts, dict(NAMES))
    ours |= {name: kernel.flatten(1) for name, kernel in ours.items() if kernel.ndim == 4}  # a map of patches
    filled(net, ours, folder)
    state = net.state_dict()  # the same memory; rearranged only now that every shape is known to fit
    state["level.1.weight"].copy_(state["level.1.weight"].roll(STEP_WAVES // 2, 1))  # theirs reads cosines first
    for name in ("leave.weight", "leave.bias"):
        rows = state[name].unflatten(0, (options.patch_size, options.patch_size, -1))  # theirs is (p, p, C)
        state[name].copy_(rows.movedim(2, 0).flatten(0, 2))
    return spec, net


def _one_embedding(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors with one embedding, named without its block; raises RefusedError if two blocks' differ."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        _, inside, part = name.partition(".norm1.emb.")
        shared = kept.setdefault(part if inside else name, tensor)
        if inside and not torch.equal(shared, tensor):
            raise RefusedError(
                f"{folder / WEIGHTS}: '{name}' is not what the other blocks hold; the embedding of timestep and class "
                "must be one for all blocks, as in the published weights"
            )
    return kept
