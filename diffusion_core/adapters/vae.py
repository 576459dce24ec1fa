"""A local folder of a diffusers `AutoencoderKL` -> our `LdmVae`: the same network under other names.

The latent of a diffusion model is recorded in the folder as z = (raw - shift_factor) * scaling_factor, or, where it
holds one number a channel, as z = (raw - latents_mean) * scaling_factor / latents_std.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion_core.adapters.folder import filled, joined, read_folder, read_options, renamed
from diffusion_core.errors import ConfigError
from diffusion_core.vae import CodecSpec, LdmVae


@dataclass(frozen=True)
class Options:
    """The options of the folder with the values that a file may leave out.

    `sample_size` (for which pictures it was trained) and `force_upcast` (whether half precision overflows) do not
    change the network, which takes pictures of any size and is read in float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: Literal["silu", "swish"] = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | None = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        if self.out_channels != self.in_channels:
            raise ConfigError(f"out_channels is {self.out_channels}; {self.in_channels}, in_channels, is wanted")
        levels = len(self.block_out_channels)
        for name, types in (("down_block_types", self.down_block_types), ("up_block_types", self.up_block_types)):
            if len(types) != levels:
                raise ConfigError(f"{name} has {len(types)} entries; {levels}, as of block_out_channels, are wanted")
        for name, numbers in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if numbers is not None and len(numbers) != self.latent_channels:
                raise ConfigError(
                    f"{name} has {len(numbers)} entries; {self.latent_channels}, one a channel, are wanted"
                )
        if self.shift_factor is not None and self.latents_mean is not None:
            raise ConfigError("shift_factor and latents_mean both say what is subtracted; one of the two is wanted")
        if min((self.scaling_factor, *(self.latents_std or ()))) <= 0:
            raise ConfigError(
                f"scaling_factor {self.scaling_factor}, latents_std {self.latents_std}: numbers above 0 are wanted"
            )

    @property
    def shift(self) -> Tensor:
        """What is subtracted from the raw latent, (c, 1, 1)."""
        constant = (self.shift_factor or 0.0,) * self.latent_channels
        return torch.tensor(self.latents_mean or constant)[:, None, None]

    @property
    def scale(self) -> Tensor:
        """What the shifted latent is multiplied with, (c, 1, 1)."""
        std = torch.tensor(self.latents_std or (1.0,) * self.latent_channels)
        return (self.scaling_factor / std)[:, None, None]


def read_vae(folder: Path, sha256: str | None = None) -> tuple[CodecSpec, LdmVae]:
    """The autoencoder of a folder in float32, and its spec; the weights' digest is checked against `sha256` if given.

    Raises ConfigError naming an option that is unknown or has a value that cannot be expressed, and IntegrityError for
    weights that are torn, of another digest, or not those of the options.
    """
    found, tensors = read_folder(folder, "AutoencoderKL", sha256)
    options = read_options(Options, found, folder)
    spec = CodecSpec("ldm_vae").extended(
        channels=options.in_channels,
        latent=options.latent_channels,
        widths=options.block_out_channels,
        depth=options.layers_per_block,
        groups=options.norm_num_groups,
        attention=options.mid_block_add_attention,
        quant=options.use_quant_conv,
        post_quant=options.use_post_quant_conv,
    )
    latent = {"shift": options.shift, "scale": options.scale}
    ours = renamed(joined(tensors, ("to_q", "to_k", "to_v"), "attend.mix"), _names(options))
    return spec, filled(spec.build(), ours | latent, folder)


def _names(options: Options) -> dict[str, str]:
    """Their name -> ours, of every module with weights."""
    blocks = {f"encoder.{name}": f"encoder.blocks.{index}" for index, name in enumerate(_encoder_blocks(options))}
    blocks |= {f"decoder.{name}": f"decoder.blocks.{index}" for index, name in enumerate(_decoder_blocks(options))}
    ends = {
        **{"encoder.conv_in": "encoder.enter", "decoder.conv_in": "decoder.enter.1"},
        **{"conv_norm_out": "leave.0", "conv_out": "leave.2"},
        **{"quant_conv": "encoder.leave.3", "post_quant_conv": "decoder.enter.0"},
    }
    residual = {"norm1": "body.0", "conv1": "body.2", "norm2": "body.3", "conv2": "body.5", "conv_shortcut": "skip"}
    attention = {"group_norm": "norm", "to_out.0": "attend.join"}
    return blocks | ends | residual | attention


def _encoder_blocks(options: Options) -> Iterator[str]:
    yield from _level_blocks("down", "downsamplers", len(options.block_out_channels), options.layers_per_block)
    yield from _middle_blocks(options)


def _decoder_blocks(options: Options) -> Iterator[str]:
    yield from _middle_blocks(options)
    yield from _level_blocks("up", "upsamplers", len(options.block_out_channels), options.layers_per_block + 1)


def _level_blocks(way: str, resize: str, levels: int, count: int) -> Iterator[str]:
    for level in range(levels):
        yield from (f"{way}_blocks.{level}.resnets.{index}" for index in range(count))
        if level < levels - 1:
            yield f"{way}_blocks.{level}.{resize}.0"


def _middle_blocks(options: Options) -> Iterator[str]:
    yield "mid_block.resnets.0"
    if options.mid_block_add_attention:
        yield "mid_block.attentions.0"
    yield "mid_block.resnets.1"
