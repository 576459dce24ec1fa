"""SDEdit: strength 0 is the picture, 1 is unconditional, and what lies between has a closed form for a Gaussian."""

import pytest
import torch

from diffusion_core.edit import partial
from diffusion_core.errors import ConfigError
from diffusion_core.grid import Uniform
from diffusion_core.multistep import Multistep
from diffusion_core.noise import Noise, Stream
from diffusion_core.renoise import Ancestral
from diffusion_core.sampler import sample
from diffusion_core.schedule import CLEAN, VE, VP, Cosine, Linear
from tests.core.oracle import Gaussian, perfect, time

LAW = Gaussian(mean=0.7, std=0.4)
COUNT = 4000
NOISE = Noise(4, torch.arange(COUNT))
PICTURES = torch.full((COUNT, 1, 2, 2), -1.5, dtype=torch.float64)
SCHEDULES = [VP(), Cosine(), Linear(), VE()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_strength_zero_is_the_picture_itself(schedule):
    x0 = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for strength in (0.0, 0.09):  # the lowest noisy level of this grid is at 0.1
        x, levels = partial(x0, Uniform().levels(schedule, 10), strength, Noise(0, torch.arange(3)))
        assert levels == (CLEAN,)
        assert torch.equal(sample(perfect(LAW, schedule, "v"), x, levels), x0)
    unclean = schedule.level(1.0), VE().level(0.0)  # a grid that stops at the noise its schedule ends with
    assert partial(x0, unclean, 0.0, Noise(0, torch.arange(3))) == (x0, (CLEAN,))


@pytest.mark.parametrize("schedule", [Cosine(), Linear()], ids=str)
def test_strength_one_is_unconditional(schedule):
    """Bit for bit the start of unconditional sampling, whatever the picture, where the schedule ends in noise."""
    grid = Uniform().levels(schedule, 10)
    noise = Noise(torch.arange(3))
    for value in (0.0, 0.9, -3.0):
        x, levels = partial(torch.full((3, 1, 4, 4), value), grid, 1.0, noise)
        assert levels == grid
        assert torch.equal(x, noise.normal((1, 4, 4), Stream.START) * grid[0].row.b)


def test_starts_at_the_first_level_at_or_below_the_strength():
    grid = Uniform().levels(Linear(), 10, 0.8)
    for strength, t in ((1.0, 0.8), (0.8, 0.8), (0.79, 0.72), (0.1, 0.08)):
        levels = partial(PICTURES[:2], grid, strength, Noise([1, 2]))[1]
        assert levels[0].t == pytest.approx(t) and levels == grid[-len(levels) :]
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="strength"):
            partial(PICTURES, grid, strength, NOISE)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_what_lies_between_has_the_law_of_the_formula(schedule, strength):
    """x_t ~ N(αc, σ²) of a picture c is carried by the flow, an affine map: the edit is N(m + kα(c - m), k²σ²),
    k = s/√(α²s² + σ²)."""
    level = schedule.level(strength)
    (mean,), std = LAW.means, LAW.std
    a, b = level.row
    k = std / (a**2 * std**2 + b**2) ** 0.5
    wanted = mean + k * a * (-1.5 - mean), k * b
    levels = [schedule.level(strength * (1 - step / 40)) for step in range(40)] + [CLEAN]
    x, levels = partial(PICTURES, levels, strength, NOISE)
    assert len(levels) == 41
    found = sample(perfect(LAW, schedule, "v"), x, levels, Multistep())
    assert found.mean().item() == pytest.approx(wanted[0], abs=0.01)
    assert found.std().item() == pytest.approx(wanted[1], rel=0.015)
    torch.testing.assert_close(found, LAW.flow(x, (time(a), time(b)), (time(1.0), time(0.0))), rtol=0, atol=0.02)


@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_fresh_noise_on_the_way_forgets_more_of_the_picture(strength):
    """Ancestral sampling draws from p(x₀ | x_t): mean m + g(x_t - αm) and variance s² - gαs², g = αs²/(α²s² + σ²)."""
    schedule = Cosine()
    a, b = schedule.level(strength).row
    (mean,), var = LAW.means, LAW.std**2
    gain = a * var / (a**2 * var + b**2)
    levels = [schedule.level(strength * (1 - step / 200)) for step in range(200)] + [CLEAN]
    x, levels = partial(PICTURES, levels, strength, NOISE)
    found = sample(perfect(LAW, schedule, "v"), x, levels, renoise=Ancestral(), noise=NOISE)
    assert found.mean().item() == pytest.approx(mean + gain * a * (-1.5 - mean), abs=0.01)
    assert found.var().item() == pytest.approx(var - gain * a * var + (gain * b) ** 2, rel=0.03)
