"""Autoencoders from folders: the peer library's outputs with its weights, and what does not fit refused by name."""

import hashlib
import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffusion_core.adapters.folder import CONFIG, WEIGHTS
from diffusion_core.adapters.vae import read_vae
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.vae import CodecSpec

SMALL = {"block_out_channels": (16, 24, 16), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 3}
ALONE = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159, "scaling_factor": 0.3611}
VARIANTS = {
    "quant": {"layers_per_block": 2, "norm_num_groups": 4},
    "no_quant": ALONE,
    "grey": {"in_channels": 1, "out_channels": 1, "mid_block_add_attention": False, "latent_channels": 2},
    "one_level": {"block_out_channels": (16,), "use_post_quant_conv": False, "latent_channels": 16, "act_fn": "swish"},
    "deep": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 3, "use_quant_conv": False},
    "statistics": {"latents_mean": (-1.6574, 1.886, -1.383), "latents_std": (8.4927, 5.9022, 6.5498)},
}


def peer(folder, **options):
    """A saved model of the peer none of whose weights is zero."""
    options = SMALL | options
    levels = len(options["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    torch.manual_seed(0)
    model = AutoencoderKL(**(types | options)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model


def changed(folder, **options):
    """The same folder with other options."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def resaved(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file({new: tensor for name, tensor in tensors.items() if (new := change(name)) is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_peer(variant, tmp_path):
    theirs = peer(tmp_path, **VARIANTS[variant])
    spec, ours = read_vae(tmp_path)
    generator = torch.Generator().manual_seed(1)
    for height, width in ((16, 16), (24, 40)):
        x = torch.randn(2, theirs.config.in_channels, height, width, generator=generator)
        with torch.no_grad():
            mean, log_var = ours.posterior(x)
            wanted = theirs.encode(x).latent_dist
            raw = torch.randn(mean.shape, generator=generator)
            torch.testing.assert_close(mean, wanted.mean, rtol=0, atol=1e-5)
            torch.testing.assert_close(log_var, wanted.logvar, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.encode(x).std / ours.scale, wanted.std, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.reconstruct(raw), theirs.decode(raw).sample, rtol=0, atol=1e-5)
        assert ours.latent_shape(x.shape[1:]) == wanted.mean.shape[1:]
    assert CodecSpec.read(spec.spec(), "codec") == spec
    assert CodecSpec.read(spec.spec(), "codec").build().state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "shift", "scale"),
    [
        ({}, [0.0, 0.0, 0.0], [0.18215, 0.18215, 0.18215]),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, [0.1159] * 3, [0.3611] * 3),
        ({"scaling_factor": 0.5, "latents_std": (2.0, 4.0, 0.5)}, [0.0, 0.0, 0.0], [0.25, 0.125, 1.0]),
        (
            {"scaling_factor": 0.5, "latents_mean": (-1.0, 2.0, 0.5), "latents_std": (2.0, 4.0, 0.5)},
            [-1.0, 2.0, 0.5],
            [0.25, 0.125, 1.0],
        ),
    ],
)
def test_the_latent_is_shifted_and_scaled_as_the_folder_says(options, shift, scale, tmp_path):
    theirs = peer(tmp_path, **options)
    _, ours = read_vae(tmp_path)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shift, scale = torch.tensor(shift)[:, None, None], torch.tensor(scale)[:, None, None]
    with torch.no_grad():
        z = (theirs.encode(x).latent_dist.mean - shift) * scale
        torch.testing.assert_close(ours.encode(x).mean, z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z / scale + shift).sample, rtol=1e-4, atol=1e-5)


def test_extreme_variances_are_clipped_as_by_the_peer(tmp_path):
    theirs = peer(tmp_path)
    theirs.quant_conv.bias[3:] = torch.tensor([-100.0, 0.0, 100.0])
    theirs.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = read_vae(tmp_path)[1].posterior(x)[1], theirs.encode(x).latent_dist.logvar
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.amin() < -20 and wanted.amax() > 15


def test_folders_of_2022_name_the_attention_otherwise(tmp_path):
    peer(tmp_path)
    _, wanted = read_vae(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    touched = []

    def aged(name):
        for now, then in old.items():
            if f".{now}." in name:
                touched.append(name)
                name = name.replace(f".{now}.", f".{then}.")
        return name

    resaved(tmp_path, aged)
    path = tmp_path / CONFIG
    kept = ("_class_name", "block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels")
    config = {
        name: value for name, value in json.loads(path.read_text()).items() if name in (*kept, "down_block_types")
    }
    path.write_text(json.dumps(config | {"up_block_types": ["UpDecoderBlock2D"] * 3, "_diffusers_version": "0.2.2"}))
    _, found = read_vae(tmp_path)
    assert len(touched) == 16
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in wanted.state_dict().items())


def test_half_precision_is_read_in_float32(tmp_path):
    theirs = peer(tmp_path)
    theirs.half().save_pretrained(tmp_path)
    _, ours = read_vae(tmp_path)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs.float().encode(x).latent_dist.mean
        torch.testing.assert_close(ours.posterior(x)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; allowed: silu, swish"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]},
            r"down_block_types\[1\] is 'AttnDownEncoderBlock2D'; allowed: DownEncoderBlock2D",
        ),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types has 2 entries; 3"),
        ({"out_channels": 1}, "out_channels is 1; 3, in_channels, is wanted"),
        ({"scaling_factor": 0}, "scaling_factor 0.0.*above 0"),
        ({"latents_std": [1, 0, 1]}, r"latents_std \(1.0, 0.0, 1.0\): numbers above 0"),
        ({"latents_mean": [0.0, 1.0]}, "latents_mean has 2 entries; 3"),
        ({"latents_mean": [0.0, 1.0, 0.0], "shift_factor": 0.0}, "shift_factor and latents_mean both"),
        ({"layers_per_blok": 2}, "layers_per_blok is unknown.*did you mean 'layers_per_block'"),
        ({"norm_num_groups": 5}, r"widths \[16, 24, 16\].*multiple of 5"),
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel'; allowed: AutoencoderKL"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(options, sentence, tmp_path):
    peer(tmp_path)
    changed(tmp_path, **options)
    with pytest.raises(ConfigError, match=sentence):
        read_vae(tmp_path)


def test_weights_of_another_digest_are_refused(tmp_path):
    peer(tmp_path)
    digest = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    read_vae(tmp_path, digest)
    with pytest.raises(IntegrityError, match=f"has SHA-256 {digest}; {'0' * 64} is wanted"):
        read_vae(tmp_path, "0" * 64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda name: None if name == "post_quant_conv.bias" else name, "decoder.enter.0.bias"),
        (
            lambda name: None if name.endswith("encoder.mid_block.attentions.0.to_v.weight") else name,
            "encoder.blocks.6.attend.mix.weight",
        ),
        (lambda name: name.replace("encoder.conv_out.bias", "encoder.conv_out.bais"), "encoder.leave.2.bais"),
        (lambda name: name.replace("quant_conv.", "old_conv."), "old_conv.weight"),
    ],
)
def test_missing_and_extra_tensors_are_refused_by_name(change, named, tmp_path):
    peer(tmp_path)
    resaved(tmp_path, change)
    with pytest.raises(IntegrityError, match=named):
        read_vae(tmp_path)


def test_weights_of_other_widths_are_refused(tmp_path):
    peer(tmp_path)
    changed(tmp_path, block_out_channels=[16, 16, 16])
    with pytest.raises(IntegrityError, match=r"size mismatch for encoder\.blocks"):
        read_vae(tmp_path)
