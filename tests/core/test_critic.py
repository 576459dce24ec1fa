"""The critic of patches: its shapes and field of view, the hinge by hand, and the balance of the two gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_core.critic import Adversarial, Patch, balance, codec_loss, critic_loss
from diffusion_core.errors import ConfigError
from diffusion_core.nets.critic import PatchCritic
from diffusion_core.spec import build, spec


def pictures(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def critic(**keywords):
    torch.manual_seed(0)
    made = PatchCritic(**({"channels": 1, "width": 8, "layers": 2} | keywords)).double()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.3)
    return made


def test_the_papers_critic_has_its_size_and_sees_70_pixels():
    """2.77 million weights on three channels; the centre of what it says depends on 70x70 pixels and no more."""
    made = PatchCritic(3, norm="none")
    sizes = [3 * 64, 64 * 128, 128 * 256, 256 * 512, 512]
    assert sum(weight.numel() for weight in made.parameters()) == 16 * sum(sizes) + 64 + 128 + 256 + 512 + 1
    narrow = critic(layers=3, norm="none")
    x = pictures(0, 1, 1, 128, 128).requires_grad_()
    said = narrow(x)
    assert said.shape == (1, 1, 14, 14)
    said[0, 0, 7, 7].backward()
    seen = x.grad[0, 0].nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


@pytest.mark.parametrize(("layers", "side", "patches"), [(1, 6, 1), (2, 12, 1), (2, 32, 6), (3, 24, 1)])
def test_pictures_down_to_the_smallest_side_are_taken(layers, side, patches):
    assert critic(layers=layers)(pictures(0, 2, 1, side, side)).shape == (2, 1, patches, patches)
    smallest = Patch(layers=layers).smallest
    assert smallest == critic(layers=layers).smallest == 3 * 2**layers
    with pytest.raises(ConfigError, match=f"{smallest - 1}x99: this critic of patches wants sides of {smallest} or"):
        critic(layers=layers)(pictures(0, 2, 1, smallest - 1, 99))


@pytest.mark.parametrize("norm", ["group", "none"])
def test_no_sample_sees_another(norm):
    made, x = critic(norm=norm), pictures(0, 5, 1, 16, 16)
    torch.testing.assert_close(made(x[3:4]), made(x)[3:4], rtol=1e-12, atol=1e-12)
    assert not any(isinstance(module, nn.modules.batchnorm._NormBase) for module in made.modules())
    assert any(isinstance(module, nn.GroupNorm) for module in made.modules()) == (norm == "group")


def test_losses_are_the_hinge_and_its_mirror():
    made, real, fake = critic(), pictures(1, 3, 1, 16, 16), pictures(2, 3, 1, 16, 16).requires_grad_()
    on_real, on_fake = (made(one).detach().numpy() for one in (real, fake))
    loss = critic_loss(made, real, fake)
    wanted = np.maximum(0, 1 - on_real).mean() + np.maximum(0, 1 + on_fake).mean()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    loss.backward()
    assert fake.grad is None and all(weight.grad.any() for weight in made.parameters())
    made.zero_grad()
    loss = codec_loss(made, fake)
    assert loss.item() == pytest.approx(-on_fake.mean(), rel=1e-12)
    loss.backward()
    assert fake.grad.any() and all(weight.grad is None for weight in made.parameters())


def test_the_balance_is_the_ratio_of_the_gradients_norms():
    """Two losses linear in a layer have gradients that are known: here of norms 5 and 0.5."""
    layer = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    ours, theirs = (layer * torch.tensor([3.0, 4.0])).sum(), layer[0] * 0.5
    found = balance(ours, theirs, layer)
    assert found.item() == pytest.approx(5 / (0.5 + 1e-6)) and not found.requires_grad
    assert layer.grad is None
    assert balance(ours, (layer * 0).sum(), layer).item() == 1e4  # a critic without a slope
    with torch.no_grad():
        assert balance((layer * 1).sum(), (layer * 1).sum(), layer).item() == 1


def test_a_critic_is_plain_data():
    config = {"kind": "patch", "weight": 0.8, "start_images": 100, "width": 16, "layers": 2, "norm": "none"}
    adversarial = build(Adversarial, config, "adversarial")
    assert spec(adversarial) == config
    assert adversarial.build(3)(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (lambda: Patch(weight=-1.0), "weight -1.0"),
        (lambda: Patch(start_images=-1), "start_images -1"),
        (lambda: PatchCritic(1, 12), "width 12.*8, the norm's groups"),
        (lambda: PatchCritic(1, 8, 0), "layers 0"),
        (lambda: build(Adversarial, {"kind": "patches"}, "adversarial"), "did you mean 'patch'"),
    ],
)
def test_impossible_values_are_refused(refused, sentence):
    with pytest.raises(ConfigError, match=sentence):
        refused()
