"""LPIPS with made weights against the formula in numpy, its file's names and refusals; distances by kind."""

import hashlib

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import save_file
from torch import nn

from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.nets import vgg
from diffusion_core.perceptual import Lpips, MsSsim, Perceptual
from diffusion_core.similarity import ms_ssim
from diffusion_core.spec import build, spec

CONVOLUTIONS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # their places in torchvision's vgg16().features
POOLS, ENDS = (4, 9, 16, 23), (3, 8, 15, 22, 29)
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def made(widths=WIDTHS, seed=0):
    """Weights under the published names, scaled so that features stay of one size."""
    generator, weights, before = torch.Generator().manual_seed(seed), {}, 3
    for place, width in zip(CONVOLUTIONS, widths, strict=True):
        weights[f"features.{place}.weight"] = torch.randn(width, before, 3, 3, generator=generator) / (4 * before**0.5)
        weights[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
        before = width
    for level, width in enumerate(widths[i] for i in (1, 3, 6, 9, 12)):
        weights[f"lin{level}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return weights


def small():
    """A net of few channels with made weights, in float64."""
    weights = {name: tensor.double() for name, tensor in made((4, 4, 6, 6, 8, 8, 8, 8, 8, 8, 6, 6, 6)).items()}
    net = vgg.VggDistance((4, 6, 8, 8, 6)).double()
    net.load_state_dict(weights)
    return net.requires_grad_(False), {name: tensor.numpy() for name, tensor in weights.items()}


def levels(picture, weights):
    """The features of one picture (3, H, W) at each level, by numpy."""
    mean, std = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])  # as the authors' scaling layer
    x = (picture - mean[:, None, None]) / std[:, None, None]
    for place in range(30):
        if place in CONVOLUTIONS:
            windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2))
            x = np.einsum("chwij,ocij->ohw", windows, weights[f"features.{place}.weight"])
            x = x + weights[f"features.{place}.bias"][:, None, None]
        elif place in POOLS:
            x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
            x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4))
        else:
            x = np.maximum(x, 0)
        if place in ENDS:
            yield x / (np.sqrt((x**2).sum(0)) + 1e-10)


def wanted(x, y, weights):
    distance = 0.0
    for level, (a, b) in enumerate(zip(levels(x, weights), levels(y, weights), strict=True)):
        distance += np.einsum("c,chw->hw", weights[f"lin{level}.model.1.weight"][0, :, 0, 0], (a - b) ** 2).mean()
    return distance


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 37, 20)])
def test_lpips_is_the_formula(channels, height, width):
    net, weights = small()
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, channels, height, width, generator=generator, dtype=torch.float64) * 2 - 1 for _ in "xy")
    found = net(x, y)
    for row in range(2):
        pictures = (np.broadcast_to(one[row].numpy(), (3, height, width)) for one in (x, y))
        assert found[row].item() == pytest.approx(wanted(*pictures, weights), rel=1e-7)
    assert net(x, x).abs().max() == 0 < found.min()


def test_dead_features_have_a_slope_that_is_finite():
    net, _ = small()
    for module in net.features:
        if isinstance(module, nn.Conv2d):
            module.bias.fill_(-100.0)
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    net(x, torch.zeros_like(x)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 15, 40)])
def test_pictures_lpips_cannot_compare_are_refused(shape):
    with pytest.raises(ConfigError, match=f"{'x'.join(map(str, shape))}: LPIPS wants 1 or 3 channels and sides of 16"):
        small()[0](torch.zeros(1, *shape), torch.zeros(1, *shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a file of the published names and shapes."""
    place = tmp_path_factory.mktemp("lpips")
    save_file(made(), place / "lpips.safetensors")
    return place


def digest(folder):
    return hashlib.sha256((folder / "lpips.safetensors").read_bytes()).hexdigest()


def test_a_local_folder_is_read_and_frozen(folder):
    config = {"kind": "lpips", "path": str(folder), "sha256": digest(folder).upper()}
    perceptual = build(Perceptual, config, "perceptual")
    net = perceptual.build()
    assert spec(perceptual) == config | {"weight": 1.0}
    assert sum(weight.numel() for weight in net.parameters()) == 14_714_688 + 1472  # VGG16 without its classifier
    assert not any(weight.requires_grad for weight in net.parameters()) and not net.training
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    weights = {name: tensor.numpy() for name, tensor in made().items()}
    assert net(x, -x).item() == pytest.approx(wanted(x[0].numpy(), -x[0].numpy(), weights), rel=1e-3)
    assert perceptual.smallest == 16


def test_other_bytes_a_missing_file_and_other_shapes_are_refused(folder, tmp_path):
    with pytest.raises(IntegrityError, match=r"lpips.safetensors has SHA-256 [0-9a-f]{64}; 00 is wanted"):
        Lpips(str(folder), "00").build()
    with pytest.raises(ConfigError, match="lacks lpips.safetensors; it holds nothing"):
        Lpips(str(tmp_path), "00").build()
    (tmp_path / "other.txt").touch()
    with pytest.raises(ConfigError, match="it holds other.txt"):
        Lpips(str(tmp_path), "00").build()
    (tmp_path / "lpips.safetensors").write_bytes(b"torn")
    with pytest.raises(IntegrityError, match="cannot be read as safetensors"):
        Lpips(str(tmp_path), digest(tmp_path)).build()
    save_file(made((4, 4, 6, 6, 8, 8, 8, 8, 8, 8, 6, 6, 6)), tmp_path / "lpips.safetensors")
    with pytest.raises(IntegrityError, match=r"'features.0.bias' has shape \[4\]; \[64\] is wanted"):
        Lpips(str(tmp_path), digest(tmp_path)).build()


def test_ms_ssim_is_a_distance():
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = build(Perceptual, {"kind": "ms_ssim", "scales": 2, "window": 7}, "perceptual")
    assert torch.equal(config.build()(x, -x), 1 - ms_ssim(x, -x, 2, 7))
    torch.testing.assert_close(config.build()(x, x), torch.zeros(2))
    assert config.smallest == 14


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (lambda: MsSsim(scales=6), "scales 6, window 11: 1 to 5 scales and an odd window"),
        (lambda: MsSsim(window=4), "window 4"),
        (lambda: MsSsim(weight=-1.0), "weight -1.0: 0 or more"),
        (lambda: Lpips("x", "00", -1.0), "weight -1.0: 0 or more"),
        (lambda: build(Perceptual, {"kind": "lpip"}, "perceptual"), "did you mean 'lpips'"),
    ],
)
def test_impossible_values_are_refused(refused, sentence):
    with pytest.raises(ConfigError, match=sentence):
        refused()
