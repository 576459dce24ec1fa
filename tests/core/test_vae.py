"""Codecs: shapes, the divergence by quadrature, and latents of zero mean and unit variance."""

import math

import pytest
import torch
from scipy import integrate, stats
from torch import nn

from diffusion_core.codec import Moments, Pixel
from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch
from diffusion_core.train import Plan, fit
from diffusion_core.vae import CodecSpec, KlVae, VaeLoss, kl_divergence

X = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def vae(seed=0):
    torch.manual_seed(seed)
    return KlVae(1, 3, (8, 16, 8)).requires_grad_(False)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.3), (-2.0, 1.8)])
def test_divergence_is_the_integral(mean, std):
    p, q = stats.norm(mean, std), stats.norm()
    wanted = integrate.quad(lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z)), mean - 12 * std, mean + 12 * std)[0]
    shape = (5, 2, 3, 3)  # summed over the latent, mean over the batch
    found = kl_divergence(*(torch.full(shape, one, dtype=torch.float64) for one in (mean, 2 * math.log(std))))
    assert found.item() == pytest.approx(18 * wanted, abs=1e-9)


def test_shapes_and_refusals():
    for widths in ((8,), (8, 8), (8, 16, 24)):
        codec = KlVae(1, 3, widths)
        moments = codec.encode(X)
        assert tuple(moments.mean.shape[1:]) == tuple(moments.std.shape[1:]) == codec.latent_shape((1, 16, 16))
        assert codec.decode(moments.mean).shape == X.shape
    with pytest.raises(ConfigError, match="16x18 cannot be divided by 4"):
        KlVae(1, 3, (8, 8, 8)).latent_shape((1, 16, 18))


def test_normalized_latents_have_zero_mean_and_unit_variance():
    """Measured on drawn latents, not on the moments the numbers were computed from; decoding undoes it exactly."""
    codec = vae()
    nn.init.normal_(codec.encoder[-1].weight, std=0.5)
    raw = codec.encode(X)
    before = codec.decode(raw.mean)
    codec.normalize([Moments(*(part[:24] for part in raw)), Moments(*(part[24:] for part in raw))])
    moments = codec.encode(X)
    drawn = torch.cat([moments.draw(Noise(seed, torch.arange(40))) for seed in range(20)])
    assert drawn.mean((0, 2, 3)).abs().max() < 0.02
    assert (drawn.std((0, 2, 3)) - 1).abs().max() < 0.02
    torch.testing.assert_close(codec.decode(moments.mean), before, rtol=1e-4, atol=1e-5)
    assert {"shift", "scale"} <= codec.state_dict().keys()


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


def test_training_beats_the_mean_picture():
    """Flat pictures of random grey have one number to remember; the codec must learn to carry it."""
    torch.manual_seed(0)
    grey = torch.linspace(-1, 1, 64).reshape(64, 1, 1, 1).expand(64, 1, 8, 8)
    codec = KlVae(1, 2, (8, 8))
    plan = Plan(images=64 * 60, batch=64, lr=5e-3, warm_up=0, ema=0.0)
    fit(VaeLoss(codec, 1e-4), lambda step: Batch(grey, {}, torch.arange(64)), plan)
    with torch.no_grad():
        error = (codec.decode(codec.encode(grey).mean) - grey).square().mean()
    assert error < 0.05 * grey.var()


def test_pixels_are_the_identity():
    codec = CodecSpec.read({"kind": "pixel"}, "codec").shaped(3).build()
    assert isinstance(codec, Pixel)
    assert torch.equal(codec.decode(codec.encode(X).draw(Noise(0, torch.arange(40)))), X)
    assert codec.latent_shape((1, 5, 7)) == (1, 5, 7)


def test_no_codec_mixes_the_batch():
    for module in KlVae(1).modules():
        assert not isinstance(module, nn.modules.batchnorm._NormBase)
