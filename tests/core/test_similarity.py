"""PSNR, SSIM and MS-SSIM against scipy's filters, and where they must be 1."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from diffusion_core.errors import ConfigError
from diffusion_core.similarity import ms_ssim, psnr, smallest_side, ssim

POWERS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])


def pair(seed, *shape, distance=0.3):
    """Smooth pictures and noisy ones, float64 in [-1, 1]."""
    generator = np.random.default_rng(seed)
    x = ndimage.gaussian_filter(generator.normal(size=shape), (0, 0, 2, 2)) * 3
    y = x + distance * generator.normal(size=shape)
    return np.clip(x, -1, 1), np.clip(y, -1, 1)


def maps(x, y, radius):
    """l and cs of one channel in [0, 1] where the window is whole; scipy's Gaussian cut at `radius` pixels."""

    def mean(z):
        return ndimage.gaussian_filter(z, 1.5, truncate=radius / 1.5 + 1e-9)[radius:-radius, radius:-radius]

    ux, uy = mean(x), mean(y)
    covariance = mean(x * y) - ux * uy
    luminance = (2 * ux * uy + 1e-4) / (ux**2 + uy**2 + 1e-4)
    return luminance, (2 * covariance + 9e-4) / (mean(x * x) - ux**2 + mean(y * y) - uy**2 + 9e-4)


def halved(z):
    return ndimage.uniform_filter(z, 2, origin=-1)[: z.shape[0] // 2 * 2 : 2, : z.shape[1] // 2 * 2 : 2]


def wanted_ms_ssim(x, y, scales, radius):
    """One number a picture, by scipy."""
    powers = POWERS[:scales] / POWERS[:scales].sum()
    found = []
    for picture, other in zip((x + 1) / 2, (y + 1) / 2, strict=True):
        channels = []
        for a, b in zip(picture, other, strict=True):
            product = 1.0
            for scale, power in enumerate(powers):
                luminance, contrast = maps(a, b, radius)
                product *= ((luminance * contrast) if scale == scales - 1 else contrast).mean() ** power
                a, b = halved(a), halved(b)
            channels.append(product)
        found.append(np.mean(channels))
    return np.array(found)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 24, 40), (3, 33, 27)])
def test_ssim_is_that_of_scipy(channels, height, width):
    x, y = pair(0, 3, channels, height, width)
    wanted = []
    for picture, other in zip((x + 1) / 2, (y + 1) / 2, strict=True):
        parts = [maps(a, b, 5) for a, b in zip(picture, other, strict=True)]
        wanted.append(np.mean([(luminance * contrast).mean() for luminance, contrast in parts]))
    np.testing.assert_allclose(ssim(torch.from_numpy(x), torch.from_numpy(y)).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize(("scales", "window", "side"), [(5, 11, 176), (3, 7, 45), (2, 5, 12), (1, 11, 16)])
def test_ms_ssim_is_that_of_scipy(scales, window, side):
    x, y = pair(1, 2, 2, side, side + 4)
    found = ms_ssim(torch.from_numpy(x), torch.from_numpy(y), scales, window)
    np.testing.assert_allclose(found.numpy(), wanted_ms_ssim(x, y, scales, window // 2), rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 30), st.integers(4, 30))
def test_equal_pictures_are_alike_and_others_less_in_both_directions(seed, height, width):
    x, y = (torch.from_numpy(one) for one in pair(seed, 2, 1, height, width))
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert (ssim(x, y) < 1).all() and torch.allclose(ssim(x, y), ssim(y, x))


def test_the_slope_is_finite_even_for_opposite_pictures():
    """There the mean cs is negative, and a power of 0.04 would have no slope at all."""
    x = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    y = (-x).requires_grad_()
    ms_ssim(x, y, 2, 7).sum().backward()
    assert y.grad.isfinite().all()


def test_half_precision_outside_leaves_the_variances_exact():
    x, y = (torch.from_numpy(one).float() for one in pair(2, 2, 1, 24, 24, distance=0.02))
    with torch.autocast("cpu", torch.bfloat16):
        found = ssim(x, y)
    torch.testing.assert_close(found, ssim(x, y), rtol=0, atol=1e-6)


def test_pictures_without_a_whole_window_at_the_coarsest_scale_are_refused():
    assert smallest_side(5, 11) == 176
    with pytest.raises(ConfigError, match="175x200: MS-SSIM over 5 scales with a window of 11 wants sides of 176"):
        ms_ssim(torch.zeros(1, 1, 175, 200), torch.zeros(1, 1, 175, 200))


def test_psnr_is_in_decibels_of_the_whole_range():
    assert psnr(4.0) == 0 and psnr(0.04) == pytest.approx(20) and psnr(4e-3) == pytest.approx(30)
    assert psnr(0.0) == pytest.approx(10 * math.log10(4e12))
