"""Conditions as channels: what the network inside is given, and a network that inpaints by them."""

import pytest
import torch
from torch import nn

from diffusion_core.cascade import augment
from diffusion_core.denoiser import Denoiser
from diffusion_core.errors import ConfigError
from diffusion_core.nets.concatenated import Concatenated
from diffusion_core.nets.dit import DiT
from diffusion_core.noise import Noise
from diffusion_core.schedule import Cosine
from diffusion_core.target import V


class Told(nn.Module):
    """Keeps what it is given."""

    def forward(self, x, c, cond):
        self.seen, self.cond = x, cond
        return x[:, :1]


def test_pictures_are_repeated_numbers_are_planes_and_the_rest_is_passed_on():
    net = Told()
    x, c = torch.arange(32.0).reshape(2, 1, 4, 4), torch.zeros(2)
    small = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).expand(2, 1, 2, 2)
    cond = {"label": torch.tensor([1, 2]), "low": small, "low_level": torch.tensor([0.5, -3.0]), "mask": x > 3}
    assert torch.equal(Concatenated(net, ("mask", "low", "low_level"))(x, c, cond), x)
    assert torch.equal(net.seen[:, :1], x)
    assert torch.equal(net.seen[:, 1:2], (x > 3).float())
    assert net.seen[1, 2].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert net.seen[0, 3].unique().item() == 0.5 and net.seen[1, 3].unique().item() == -3
    assert list(net.cond) == ["label"] and net.seen.dtype == torch.float32


def test_any_network_of_enough_channels_can_be_used():
    """Color pictures of twice the size, with classes: the small picture, its level and the class all count."""
    torch.manual_seed(0)
    net = DiT(channels=3 + 3 + 1, size=8, classes=2, width=16, depth=1, heads=2, out_channels=3)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    reader = Denoiser(Concatenated(net, ("low", "low_level")), Cosine(), V())
    x, low = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    cond = {"label": torch.tensor([0, 1]), **augment(low, Cosine(), 0.3, Noise([1, 2]))}
    found = reader(x, 0.5, cond).x0
    for other in ({"label": 1 - cond["label"]}, {"low": -cond["low"]}, {"low_level": cond["low_level"] + 1}):
        assert not torch.allclose(reader(x, 0.5, cond | other).x0, found, atol=1e-3)
    with pytest.raises(ConfigError, match=r"\['label'\] lacks low, low_level"):
        reader(x, 0.5, {"label": cond["label"]})
    with pytest.raises(ConfigError, match=r"'low' \(2, 3, 3, 3\) does not fit x of 8x8"):
        reader(x, 0.5, cond | {"low": low[:, :, :3, :3]})
    with pytest.raises(ConfigError, match="no names"):
        Concatenated(net, ())
