"""Codecs: shapes, the divergence by quadrature, latents of zero mean and unit variance, and what training keeps."""

import math

import pytest
import torch
from scipy import integrate, stats
from torch import nn

from diffusion_core.codec import Moments, Pixel
from diffusion_core.errors import ConfigError, DataError
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch
from diffusion_core.train import Plan, fit
from diffusion_core.vae import CodecSpec, KlVae, LdmVae, VaeLoss, kl_divergence

X = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


SMALL = {"depth": 1, "groups": 4}


def vae(seed=0):
    torch.manual_seed(seed)
    return KlVae(1, 3, (8, 16, 8)).requires_grad_(False)


def ldm_vae(seed=0, **keywords):
    """None of its weights is zero."""
    torch.manual_seed(seed)
    codec = LdmVae(1, 3, (8, 16, 8), **(SMALL | keywords))
    with torch.no_grad():
        for weight in codec.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return codec


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.3), (-2.0, 1.8)])
def test_divergence_is_the_integral(mean, std):
    p, q = stats.norm(mean, std), stats.norm()
    wanted = integrate.quad(lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z)), mean - 12 * std, mean + 12 * std)[0]
    shape = (5, 2, 3, 3)  # summed over the latent, mean over the batch
    found = kl_divergence(*(torch.full(shape, one, dtype=torch.float64) for one in (mean, 2 * math.log(std))))
    assert found.item() == pytest.approx(18 * wanted, abs=1e-9)


@pytest.mark.parametrize("widths", [(8,), (8, 8), (8, 16, 24)])
def test_shapes(widths):
    for codec in (KlVae(1, 3, widths), LdmVae(1, 3, widths, **SMALL), LdmVae(1, 3, widths, **SMALL, attention=False)):
        for x in (X[:2], X[:2, :, :8, :12]):
            moments = codec.encode(x)
            assert tuple(moments.mean.shape[1:]) == tuple(moments.std.shape[1:]) == codec.latent_shape(x.shape[1:])
            assert codec.decode(moments.mean).shape == x.shape


def test_the_published_autoencoder_has_its_published_size():
    """Stable Diffusion's: 83.65 million weights, 512x512 pictures of 3 channels as 64x64 latents of 4."""
    with torch.device("meta"):
        codec = LdmVae(3)
        assert codec.encode(torch.empty(1, 3, 512, 512)).mean.shape == (1, 4, 64, 64)
        assert codec.decode(torch.empty(1, 4, 64, 64)).shape == (1, 3, 512, 512)
    assert sum(weight.numel() for weight in codec.parameters()) == 83_653_863
    assert codec.latent_shape((3, 512, 768)) == (4, 64, 96)


@pytest.mark.parametrize("codec", [vae(), ldm_vae()])
def test_what_a_codec_cannot_take_is_refused(codec):
    with pytest.raises(ConfigError, match="16x18 cannot be divided by 4"):
        codec.latent_shape((1, 16, 18))
    with pytest.raises(ConfigError, match="18x16 cannot be divided by 4"):
        codec.encode(torch.zeros(1, 1, 18, 16))
    with pytest.raises(ConfigError, match="pictures of 3 channels; the codec takes 1"):
        codec.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConfigError, match="latents of 1 channels; the codec's have 3"):
        codec.decode(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"kind": "kl_vae", "widths": [8, 12]}, r"widths \[8, 12\].*multiple of 8"),
        ({"kind": "kl_vae", "latent": 0}, "latent 0.*at least 1"),
        ({"kind": "ldm_vae", "widths": [32, 48]}, r"widths \[32, 48\].*multiple of 32"),
        ({"kind": "ldm_vae", "widths": []}, "at least one is wanted"),
        ({"kind": "ldm_vae", "widths": [0]}, "at least one is wanted, each a multiple of 32"),
        ({"kind": "ldm_vae", "groups": 0}, "groups 0.*at least 1"),
        ({"kind": "ldm_vae", "depth": 0}, "depth 0: at least 1"),
    ],
)
def test_impossible_sizes_are_refused(keywords, sentence):
    with pytest.raises(ConfigError, match=sentence):
        CodecSpec.read(keywords, "codec").shaped(1).build()


def test_checkpointing_changes_memory_and_no_bit():
    """The bytes kept for the backward pass, counted by the hooks through which autograd keeps them."""
    losses, gradients, kept = [], [], []
    for checkpointing in (False, True):
        codec, sizes = ldm_vae(checkpointing=checkpointing), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            ((_, loss),) = VaeLoss(codec, 0.1).losses(Batch(X, {}, torch.arange(40)), 0, Noise(1, torch.arange(40)))
        loss.backward()
        losses.append(loss)
        gradients.append([weight.grad for weight in codec.parameters()])
        kept.append(sum(sizes))
        with torch.inference_mode():
            assert codec.decode(codec.encode(X).mean).shape == X.shape
    assert torch.equal(*losses)
    assert all(gradient.any() and torch.equal(gradient, other) for gradient, other in zip(*gradients, strict=True))
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize("codec", [vae(), ldm_vae().requires_grad_(False)])
def test_normalized_latents_have_zero_mean_and_unit_variance(codec):
    """Measured on drawn latents, not on the moments the numbers were computed from; decoding undoes it exactly."""
    last = [module for module in codec.encoder.modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.normal_(last.weight, std=0.5)
    raw = codec.encode(X)
    before = codec.decode(raw.mean)
    codec.normalize([Moments(*(part[:24] for part in raw)), Moments(*(part[24:] for part in raw))])
    moments = codec.encode(X)
    drawn = torch.cat([moments.draw(Noise(seed, torch.arange(40))) for seed in range(20)])
    assert drawn.mean((0, 2, 3)).abs().max() < 0.02
    assert (drawn.std((0, 2, 3)) - 1).abs().max() < 0.02
    torch.testing.assert_close(codec.decode(moments.mean), before, rtol=1e-4, atol=1e-5)
    assert {"shift", "scale"} <= codec.state_dict().keys()


def test_normalizing_again_forgets_what_was_before():
    codec, other = vae(), vae()
    other.shift.fill_(3.0)
    other.scale.fill_(7.0)
    for one in (codec, other):
        one.normalize(one.raw(x) for x in X.split(16))
    assert torch.equal(codec.shift, other.shift) and torch.equal(codec.scale, other.scale)


def test_a_channel_that_says_nothing_is_refused():
    constant = Moments(torch.ones(4, 3, 2, 2), torch.tensor([1.0, 0.0, 1.0])[:, None, None].expand(4, 3, 2, 2))
    with pytest.raises(DataError, match=r"channels \[1\] of the latent are constant"):
        vae().normalize([constant])


def test_a_latent_is_drawn_by_its_own_noise():
    moments = Moments(torch.zeros(4, 3, 2, 2), torch.full((4, 3, 2, 2), 2.0))
    together = moments.draw(Noise(1, torch.arange(4)))
    alone = Moments(moments.mean[2:3], moments.std[2:3]).draw(Noise(1, torch.tensor([2])))
    assert torch.equal(together[2:3], alone)
    assert together.std() == pytest.approx(2, rel=0.3)


def test_the_loss_is_error_plus_divergence_a_pixel():
    codec, noise = vae(), Noise(1, torch.arange(40))
    losses = {}
    for kl in (0.0, 1.0):
        ((name, loss),) = VaeLoss(codec, kl).losses(Batch(X, {}, torch.arange(40)), 0, noise)
        losses[kl] = loss.item()
    assert name == "vae"
    mean, log_var = codec.encoder(X).chunk(2, 1)
    free = torch.distributions.Normal(mean, (log_var / 2).exp())
    wanted = torch.distributions.kl_divergence(free, torch.distributions.Normal(0.0, 1.0)).sum() / X.numel()
    assert losses[1.0] - losses[0.0] == pytest.approx(wanted.item(), rel=1e-4)
    with pytest.raises(ConfigError, match="kl -1"):
        VaeLoss(codec, -1.0)


@pytest.mark.parametrize("kind", [{"kind": "kl_vae"}, {"kind": "ldm_vae", **SMALL, "checkpointing": True}])
def test_training_beats_the_mean_picture(kind):
    """Flat pictures of random grey have one number to remember; the codec must learn to carry it."""
    torch.manual_seed(0)
    grey = torch.linspace(-1, 1, 64).reshape(64, 1, 1, 1).expand(64, 1, 8, 8)
    codec = CodecSpec.read(kind | {"latent": 2, "widths": [8, 8]}, "codec").shaped(1).build()
    plan = Plan(images=64 * 100, batch=64, lr=5e-3, warm_up=0, ema=0.0)
    fit(VaeLoss(codec, 1e-4), lambda step: Batch(grey, {}, torch.arange(64)), plan)
    with torch.no_grad():
        error = (codec.decode(codec.encode(grey).mean) - grey).square().mean()
    assert error < 0.05 * grey.var()


def test_pixels_are_the_identity():
    codec = CodecSpec.read({"kind": "pixel"}, "codec").shaped(3).build()
    assert isinstance(codec, Pixel)
    assert torch.equal(codec.decode(codec.encode(X).draw(Noise(0, torch.arange(40)))), X)
    assert codec.latent_shape((1, 5, 7)) == (1, 5, 7)


@pytest.mark.parametrize("codec", [vae(), ldm_vae().requires_grad_(False)])
def test_no_codec_mixes_the_batch(codec):
    together = codec.encode(X).mean
    for row in (0, 7, 39):
        torch.testing.assert_close(codec.encode(X[row : row + 1]).mean, together[row : row + 1], rtol=1e-5, atol=1e-6)
    for module in codec.modules():
        assert not isinstance(module, nn.modules.batchnorm._NormBase)
