"""Low-rank adapters: silent at first, exact to merge and to remove, few numbers, and the rest of the network frozen."""

import hashlib
import re

import pytest
import torch
from torch import nn

from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.nets.dit import DiT
from diffusion_core.nets.lora import add_lora, load_lora, lora_state, merge_lora, remove_lora
from diffusion_core.weights import read_tensors, write_tensors

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
C, COND = torch.tensor([-0.5, 1.0]), {"label": torch.tensor([1, -1])}
PATTERNS = ("blocks.*.mix", "blocks.?.mlp.0")
MAPS = ("blocks.0.mix", "blocks.0.mlp.0", "blocks.1.mix", "blocks.1.mlp.0")


def network():
    torch.manual_seed(0)
    net = DiT(3, 8, 4, width=16, depth=2, heads=2)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    return net


def trained(net, steps=3):
    """Some steps with a large rate, so that no adapter is silent any more."""
    learned = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        net(X, C, COND).square().mean().backward()
        optimizer.step()
    return net


def said(net):
    with torch.no_grad():
        return net(X, C, COND)


def digest(net):
    """SHA-256 of every tensor of the network itself, adapters left out, by the names it had before them."""
    sha = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        name = name.replace("parametrizations.weight.original", "weight")
        if "parametrizations" not in name:
            sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def test_nothing_changes_at_first_and_only_the_matched_maps_are_adapted():
    net = network()
    before = said(net)
    assert add_lora(net, PATTERNS, rank=2, alpha=4.0) == MAPS
    assert torch.equal(said(net), before)


def test_the_learned_numbers_are_few():
    """r(d + k) for each map: 16 -> 48 and 16 -> 64, twice each."""
    net = network()
    add_lora(net, PATTERNS, rank=3, alpha=1.0)
    assert sum(weight.numel() for weight in net.parameters() if weight.requires_grad) == 2 * 3 * (48 + 16 + 64 + 16)


def test_the_base_is_frozen_bit_by_bit():
    net = network()
    before = digest(net), said(net)
    add_lora(net, PATTERNS, rank=2, alpha=4.0)
    trained(net)
    assert digest(net) == before[0] and (said(net) - before[1]).abs().max() > 1e-2
    for name, weight in net.named_parameters():
        learns = name.endswith((".up", ".down"))
        assert weight.requires_grad is learns and (weight.grad is not None) is learns


def test_the_adapter_adds_alpha_over_rank_times_the_product():
    linear = nn.Sequential(nn.Linear(5, 7).double())
    add_lora(linear, ["0"], rank=2, alpha=3.0)
    state = {name: tensor.clone() for name, tensor in lora_state(linear).items()}
    state["0.up"].normal_()
    base, bias = linear[0].weight.detach().clone(), linear[0].bias.detach()
    remove_lora(linear)
    load_lora(linear, state)
    x = torch.randn(4, 5).double()
    wanted = x @ base.T + bias + 3 / 2 * (x @ state["0.down"].T) @ state["0.up"].T  # eq. 3, without a merged weight
    torch.testing.assert_close(linear(x).detach(), wanted, rtol=1e-12, atol=1e-12)


def test_merged_is_adapted_and_can_be_undone():
    net = network()
    names, before = list(net.state_dict()), (digest(net), said(net))
    add_lora(net, PATTERNS, rank=2, alpha=4.0)
    adapted = said(trained(net))
    replaced = merge_lora(net)
    assert sorted(net.state_dict()) == sorted(names)
    torch.testing.assert_close(said(net), adapted, rtol=0, atol=1e-6)
    assert digest(net) != before[0] and replaced.keys() == {f"{name}.weight" for name in MAPS}
    net.load_state_dict(replaced, strict=False)
    assert digest(net) == before[0] and torch.equal(said(net), before[1])


def test_removed_is_the_base_bit_by_bit():
    net = network()
    before = digest(net), said(net)
    add_lora(net, PATTERNS, rank=2, alpha=4.0)
    trained(net)
    remove_lora(net)
    assert sorted(net.state_dict()) == sorted(network().state_dict())
    assert digest(net) == before[0] and torch.equal(said(net), before[1])
    assert type(net.blocks[0].mix) is nn.Linear and not any(weight.requires_grad for weight in net.parameters())


def test_adapters_travel_through_a_file(tmp_path):
    net = network()
    add_lora(net, PATTERNS, rank=2, alpha=4.0)
    adapted = said(trained(net))
    write_tensors(tmp_path / "adapter.safetensors", lora_state(net))
    fresh = network()
    assert sorted(load_lora(fresh, read_tensors(tmp_path / "adapter.safetensors"))) == sorted(MAPS)
    assert torch.equal(said(fresh), adapted)
    learned = {name for name, weight in fresh.named_parameters() if weight.requires_grad}
    assert len(learned) == 2 * len(MAPS)


def test_more_maps_can_be_adapted_later_and_the_first_still_learn():
    net = network()
    add_lora(net, ["blocks.0.mix"], rank=2, alpha=4.0)
    add_lora(net, ["leave"], rank=1, alpha=1.0)
    trained(net)
    assert {name.rpartition(".")[0] for name in lora_state(net)} == {"blocks.0.mix", "leave"}
    assert all(tensor.any() for tensor in lora_state(net).values())


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest():
    net = network()
    before = digest(net)
    with pytest.raises(ConfigError, match=re.escape("'blocks.*.mlx' matches no linear map; allowed: blocks.*.join")):
        add_lora(net, ["blocks.*.mix", "blocks.*.mlx"], rank=2, alpha=1.0)
    with pytest.raises(ConfigError, match=re.escape("did you mean 'blocks.*.join'?")):
        add_lora(net, ["block.*.joint"], rank=2, alpha=1.0)
    assert digest(net) == before and all(weight.requires_grad for weight in net.parameters())


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (-1, 1.0), (2, 0.0), (2, float("nan"))])
def test_impossible_numbers_are_refused(rank, alpha):
    with pytest.raises(ConfigError, match="a rank from 1 and an alpha above 0"):
        add_lora(network(), PATTERNS, rank, alpha)


def test_a_second_adapter_on_a_map_is_refused_and_so_is_taking_off_none():
    net = network()
    for take_off in (merge_lora, remove_lora, lora_state):
        with pytest.raises(ConfigError, match="DiT has no adapter"):
            take_off(net)
    add_lora(net, PATTERNS, rank=2, alpha=1.0)
    with pytest.raises(ConfigError, match=re.escape("'blocks.0.mix' has an adapter; merge or remove it first")):
        add_lora(net, ["*.mix"], rank=2, alpha=1.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blocks.0.mixer.down": torch.zeros(2, 16)}, r"'blocks\.0\.mixer', no linear map.*'blocks\.\*\.mix'"),
        ({"blocks.0.mix.up": None}, "(?s)'blocks.0.mix' does not fit.*up"),
        ({"blocks.0.mix.down": None}, "(?s)'blocks.0.mix' does not fit.*down"),
        ({"blocks.0.mix.side": torch.zeros(1)}, "(?s)'blocks.0.mix' does not fit.*side"),
        ({"blocks.0.mix.down": torch.zeros(2, 15)}, "(?s)'blocks.0.mix' does not fit.*down"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(changes, sentence):
    net = network()
    add_lora(net, PATTERNS, rank=2, alpha=1.0)
    state = {name: tensor for name, tensor in (lora_state(net) | changes).items() if tensor is not None}
    with pytest.raises(IntegrityError, match=sentence):
        load_lora(network(), state)
