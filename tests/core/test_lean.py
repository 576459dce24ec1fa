"""The lean U-Net: silent at birth, moved by what it is told, few operators for as many weights as the peer's."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_core.errors import ConfigError
from diffusion_core.nets.lean import Block, Lean

C = torch.tensor([-1.0, 0.0, 0.5, 2.0])
LABEL = torch.tensor([0, 4, -1, 2])


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


X = normal(4, 3, 8, 8)


def awake(net):
    """The network with none of its weights zero."""
    torch.manual_seed(0)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    return net


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({}, (8, 8)),
        ({"widths": (8,), "groups": 2, "out_channels": 6, "size": 7}, (7, 5)),
        ({"widths": (8, 16, 24, 32), "heads": 2, "classes": 3}, (16, 24)),
    ],
)
def test_the_shape_is_kept_and_the_first_word_is_zero(changes, side):
    net = Lean(**({"channels": 3, "size": 8} | changes))
    x = normal(2, 3, *side)
    out = net(x, C[:2])
    assert out.shape == (2, changes.get("out_channels", 3), *side) and not out.any()
    assert not net.steer(normal(2, net.steer.in_features)).any()  # FiLM's γ and β, so that it changes nothing
    assert awake(net)(x, C[:2]).abs().min() > 0
    block, said = Block(8, 2), normal(2, 16, 1, 1)
    assert torch.equal(block(normal(2, 8, 4, 4), said), normal(2, 8, 4, 4))


@torch.no_grad()
def test_it_hears_noise_level_class_and_place_one_row_at_a_time():
    net = awake(Lean(3, 8, classes=5, widths=(8, 16), groups=4))
    out = net(X, C, {"label": LABEL})
    moved = [
        net(X, C + 0.1, {"label": LABEL}) - out,
        net(X, C, {"label": torch.tensor([1, 3, 0, -1])}) - out,
        net(X.roll(1, -1), C, {"label": LABEL}).roll(-1, -1) - out,
    ]
    assert min(one.abs().amax((1, 2, 3)).min() for one in moved) > 1e-3
    assert torch.equal(net(X, C), net(X, C, {"label": torch.full((4,), -1)}))
    alone = torch.cat([net(X[i : i + 1], C[i : i + 1], {"label": LABEL[i : i + 1]}) for i in range(4)])
    torch.testing.assert_close(alone, out, rtol=1e-5, atol=1e-5 * out.abs().max().item())


class Counted(TorchDispatchMode):
    """How many operators run, not counting those that only look at memory in another way."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_it_is_few_operators_and_as_many_weights_as_the_peer():
    peer = UNet2DModel(
        **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64)},
        **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        **{"norm_num_groups": 8, "attention_head_dim": 32},
    )
    ours = Lean(1, 8)
    ran = []
    for said in (lambda x: peer(x, C).sample, lambda x: ours(x, C)):
        with Counted() as counted:
            said(normal(4, 1, 8, 8)).square().mean().backward()
        ran.append(counted.count)
    weights = [sum(weight.numel() for weight in net.parameters()) for net in (peer, ours)]
    assert ran[1] < ran[0] / 2
    assert weights[1] == pytest.approx(weights[0], rel=0.15)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": 5}, "groups 5: groups must divide every width"),
        ({"widths": ()}, "groups must divide every width"),
        ({"size": 6}, "size 6: a multiple of 4 is wanted for 3 levels"),
        ({"heads": 3}, "heads 3: it must divide the last width 128"),
        ({"channels": 0}, "channels 0"),
        ({"classes": -1}, "classes -1"),
    ],
)
def test_impossible_numbers_are_refused_when_built(changes, words):
    with pytest.raises(ConfigError, match=words):
        Lean(**({"channels": 3, "size": 8} | changes))


@pytest.mark.parametrize(
    ("shape", "words"),
    [((4, 4, 8, 8), "x has 4 channels; this network takes 3"), ((4, 3, 8, 6), "x is 8x6; .* multiples of 4")],
)
def test_pictures_that_do_not_fit_are_refused(shape, words):
    with pytest.raises(ConfigError, match=words):
        Lean(3, 8)(normal(*shape), C)
