"""The adapter of diffusion transformers: what the peer library says with the same weights, and what it refuses."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion_core.adapters.dit import read_dit
from diffusion_core.adapters.folder import CONFIG, WEIGHTS
from diffusion_core.errors import ConfigError, IntegrityError, RefusedError
from diffusion_core.manifest import hash_file
from diffusion_core.nets import NetSpec

SIZES = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
STEPS = torch.tensor([0, 1, 250, 998, 999])
LABELS = torch.tensor([0, 9, 10, 3, 10])  # theirs calls "no class" 10, the number of classes
OLD = {  # what the first published folders say besides
    "_class_name": "Transformer2DModel",
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
}


def written(folder, **sizes):
    """A random peer whose blocks hold copies of one embedding, as in the published weights, saved to a folder."""
    torch.manual_seed(0)
    peer = DiTTransformer2DModel(**(SIZES | sizes)).eval()
    for weight in peer.parameters():
        nn.init.normal_(weight, std=0.15)
    first, *others = peer.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    peer.save_pretrained(folder)
    return peer


def changed(folder, **options):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def rewritten(folder, change):
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "sizes",
    [
        {},  # a learned variance: 8 channels out of 4
        {"out_channels": None, "patch_size": 4},
        {"in_channels": 3, "out_channels": 6, "patch_size": 1, "norm_eps": 1e-3},
    ],
)
def test_it_says_what_the_peer_says(tmp_path, sizes):
    peer = written(tmp_path, **sizes)
    spec, net = read_dit(tmp_path)
    assert NetSpec.read(spec.spec(), "net") == spec
    x = torch.randn(5, peer.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = peer(x, STEPS, LABELS).sample
        found = net(x, STEPS.float(), {"label": torch.where(LABELS == 10, -1, LABELS)})
    assert wanted.std() > 0.5
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_timestep_is_told_to_the_last_bit(tmp_path):
    written(tmp_path)
    steps = torch.arange(1000.0)
    cosines, sines = get_timestep_embedding(steps, 256, flip_sin_to_cos=True, downscale_freq_shift=1).chunk(2, 1)
    assert torch.equal(read_dit(tmp_path)[1].level[0](steps), torch.cat((sines, cosines), 1))


def test_folders_of_the_first_published_kind_are_read(tmp_path):
    written(tmp_path)
    today = read_dit(tmp_path, sha256=hash_file(tmp_path / WEIGHTS))[1].state_dict()
    changed(tmp_path, **OLD)
    assert all(torch.equal(today[name], tensor) for name, tensor in read_dit(tmp_path)[1].state_dict().items())


def test_blocks_with_different_embeddings_are_refused(tmp_path):
    written(tmp_path)
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    rewritten(tmp_path, lambda tensors: tensors[name][7, 3].add_(1e-3))
    with pytest.raises(RefusedError, match=f"'{name}' is not what the other blocks hold.*must be one for all blocks"):
        read_dit(tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("norm_type", "ada_norm_single"),
        ("activation_fn", "geglu"),
        ("attention_bias", False),
        ("norm_elementwise_affine", True),
        ("cross_attention_dim", 768),
        ("interpolation_scale", 2.0),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, option, value):
    written(tmp_path)
    changed(tmp_path, **{option: value})
    with pytest.raises(ConfigError, match=option):
        read_dit(tmp_path)


def test_another_class_is_refused(tmp_path):
    written(tmp_path)
    changed(tmp_path, _class_name="DiTTransformer3DModel")
    with pytest.raises(ConfigError, match="'DiTTransformer3DModel'.*did you mean 'DiTTransformer2DModel'"):
        read_dit(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("transformer_blocks.1.attn1.to_v.weight"), r"blocks\.1\.mix\.weight"),
        (lambda tensors: tensors.pop("pos_embed.proj.weight"), r"enter\.weight"),
        (lambda tensors: tensors.update({"extra.bias": torch.zeros(1)}), r"extra\.bias"),
        (lambda tensors: tensors.update({"proj_out_2.weight": torch.zeros(33, 32)}), r"leave\.weight"),
        (lambda tensors: tensors.update({"pos_embed.proj.weight": torch.zeros(7)}), r"enter\.weight"),
    ],
)
def test_weights_that_do_not_fit_the_options_are_refused(tmp_path, change, named):
    written(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(IntegrityError, match=f"(?s)does not fit.*{named}"):
        read_dit(tmp_path)


def test_altered_weights_are_refused(tmp_path):
    written(tmp_path)
    digest = hash_file(tmp_path / WEIGHTS)
    rewritten(tmp_path, lambda tensors: tensors["proj_out_2.bias"].add_(1))
    with pytest.raises(IntegrityError, match="SHA-256"):
        read_dit(tmp_path, sha256=digest)
