"""U-Nets read from diffusers folders say what the peer itself says; what cannot be expressed is refused by name."""

import hashlib
import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from diffusion_core.adapters.folder import CONFIG, WEIGHTS
from diffusion_core.adapters.unet import read_unet
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.nets import NetSpec

STEPS = torch.tensor([0, 1, 500, 999])
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABEL = torch.tensor([0, 4, 2, 4])
TEXT = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]).bool()
PLAIN = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
WORDED = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


VARIANTS = {
    "plain": (UNet2DModel, PLAIN),
    "bench": (UNet2DModel, PLAIN | {"block_out_channels": (32, 64), "attention_head_dim": 32, "layers_per_block": 1}),
    "ddpm": (
        UNet2DModel,
        {
            **PLAIN,
            **{"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
            **{"attention_head_dim": None, "sample_size": [8, 8], "out_channels": 6},
        },
    ),
    "deep": (
        UNet2DModel,
        {
            **PLAIN,
            **{"block_out_channels": (16, 32, 16, 8), "layers_per_block": 1, "add_attention": False},
            **{"down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D")},
            **{"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"), "sample_size": None},
        },
    ),
    "film": (UNet2DModel, PLAIN | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8}),
    "classes": (UNet2DModel, PLAIN | {"num_class_embeds": 5}),
    "text": (UNet2DConditionModel, WORDED),
    "text, linear": (UNet2DConditionModel, WORDED | {"use_linear_projection": True, "attention_head_dim": (2, 4, 4)}),
    "text, classes": (
        UNet2DConditionModel,
        WORDED | {"num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift", "downsample_padding": 0},
    ),
}


def saved(folder, made, options):
    """A saved model of the peer none of whose weights is zero."""
    torch.manual_seed(0)
    model = made(**options).eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.1 * torch.randn_like(weight) * (weight.std() if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    return model


def changed(folder, **options):
    """The same folder with other options."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs_are_those_of_the_peer(variant, tmp_path):
    made, options = VARIANTS[variant]
    theirs = saved(tmp_path, made, options)
    spec, ours = read_unet(tmp_path)
    told, cond = {}, {}
    if "num_class_embeds" in options:
        told |= {"class_labels": LABEL}
        cond |= {"label": LABEL}
    if "cross_attention_dim" in options:
        told |= {"encoder_hidden_states": TEXT, "encoder_attention_mask": MASK}
        cond |= {"text": TEXT, "mask": MASK}
    for x in (X, X.repeat(1, 1, 2, 3)):  # another size than that of the folder
        wanted = theirs(x, STEPS, **told).sample
        assert wanted.std() > 0.1
        torch.testing.assert_close(ours(x, STEPS.float(), cond), wanted, rtol=0, atol=1e-5)
    assert NetSpec.read(spec.spec(), "net") == spec
    assert spec.build().state_dict().keys() == ours.state_dict().keys()


@torch.no_grad()
def test_text_without_a_mask_is_all_real(tmp_path):
    theirs = saved(tmp_path, UNet2DConditionModel, WORDED)
    _, ours = read_unet(tmp_path)
    wanted = theirs(X, STEPS, encoder_hidden_states=TEXT).sample
    torch.testing.assert_close(ours(X, STEPS.float(), {"text": TEXT}), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_class_adds_nothing(tmp_path):
    theirs = saved(tmp_path, UNet2DModel, VARIANTS["classes"][1])
    _, ours = read_unet(tmp_path)
    theirs.class_embedding.weight.zero_()
    wanted = theirs(X, STEPS, class_labels=LABEL).sample
    torch.testing.assert_close(ours(X, STEPS.float()), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_names_of_old_attention_weights_are_read(tmp_path):
    """Folders written before 2023 call the maps of a self-attention query, key, value and proj_attn."""
    theirs = saved(tmp_path, UNet2DModel, PLAIN)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(tmp_path / WEIGHTS)
    for now, then in old.items():
        tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    _, ours = read_unet(tmp_path)
    torch.testing.assert_close(ours(X, STEPS.float()), theirs(X, STEPS).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "options", "words"),
    [
        ("plain", {"center_input_sample": True}, "center_input_sample is True; allowed: False"),
        ("plain", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'; allowed: positional"),
        ("plain", {"act_fn": "gelu"}, "act_fn is 'gelu'; allowed: silu, swish"),
        ("plain", {"downsample_type": "resnet"}, "downsample_type is 'resnet'; allowed: conv"),
        ("plain", {"mid_block_type": None}, "mid_block_type is None; allowed: UNetMidBlock2D"),
        ("plain", {"time_embedding_dim": 32}, "time_embedding_dim is 32; only 64 can be expressed"),
        ("plain", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; allowed: None"),
        ("plain", {"norm_num_group": 8}, "norm_num_group is unknown; .*did you mean 'norm_num_groups'"),
        ("plain", {"norm_num_groups": 7}, "groups 7: groups must divide every width"),
        ("plain", {"attention_head_dim": 5}, "head_width 5: it must divide the width 32"),
        ("plain", {"attention_head_dim": [8, 8]}, r"attention_head_dim is \[8, 8\]; one number is wanted"),
        ("plain", {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "down_block_types .* must mirror each other"),
        (
            "plain",
            {"down_block_types": ["DownBlock2D", "ResnetDownsampleBlock2D"]},
            r"down_block_types\[1\] is 'Resnet",
        ),
        ("plain", {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups is None; only 8"),
        ("plain", {"_class_name": "UNet1DModel"}, "_class_name is 'UNet1DModel'; .*did you mean 'UNet2DModel'"),
        ("text", {"attention_head_dim": [2, 8, 4]}, "only as many heads, or heads as wide, at every level"),
        ("text", {"attention_head_dim": [2, 8]}, "one number from 1, or one a level, is wanted"),
        ("text", {"transformer_layers_per_block": 2}, "transformer_layers_per_block is 2; allowed: 1"),
        ("text", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'; allowed: None"),
        ("text", {"cross_attention_dim": [12, 12, 12]}, r"cross_attention_dim is \[12, 12, 12\] \(list\)"),
        ("text", {"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention is True; only False"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(variant, options, words, folders):
    changed(folder := folders(variant), **options)
    with pytest.raises(ConfigError, match=words) as caught:
        read_unet(folder)
    assert str(folder / CONFIG) in str(caught.value)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """One saved folder a variant, made when it is first asked for."""
    made = {}

    def folder(variant):
        if variant not in made:
            saved(made.setdefault(variant, tmp_path_factory.mktemp("unet")), *VARIANTS[variant])
        return made[variant]

    return folder


@pytest.fixture
def folders(once, tmp_path):
    """A copy of the saved folder of a variant."""
    return lambda variant: shutil.copytree(once(variant), tmp_path / "copy")


def test_the_digest_is_checked(folders):
    folder = folders("plain")
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    read_unet(folder, digest)
    read_unet(folder, digest.upper())
    with pytest.raises(IntegrityError, match=f"has SHA-256 {digest}; {'0' * 64} is wanted"):
        read_unet(folder, "0" * 64)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(name, folders):
    (folder := folders("plain")).joinpath(name).unlink()
    with pytest.raises(ConfigError, match=f"copy lacks {name}; it holds "):
        read_unet(folder)
    with pytest.raises(ConfigError, match="none lacks config.json; it holds nothing"):
        read_unet(folder / "none")


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[1]", "holds a list; an object of options")])
def test_options_that_are_none_are_refused(text, words, folders):
    (folder := folders("plain")).joinpath(CONFIG).write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_unet(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers_per_block": 3}, "it lacks down.2.residual.norm1.weight, .* and 52 more; "),
        (
            {"layers_per_block": 1},
            "it holds the unknown down_blocks.0.resnets.1.conv1.bias, .*; it has a size mismatch",
        ),
        ({"in_channels": 1}, "it has a size mismatch for enter.weight$"),
    ],
)
def test_weights_of_another_network_are_refused(options, words, folders):
    changed(folder := folders("plain"), **options)
    with pytest.raises(IntegrityError, match=f"{WEIGHTS} does not fit its {CONFIG}: .*{words}"):
        read_unet(folder)
