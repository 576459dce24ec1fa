"""Inpainting: what is known stays, bit for bit; what is not comes to follow the conditional law as steps are repeated.

Four correlated Gaussian pixels, for which the denoiser and the law of two given the other two are matrix formulas.
"""

import pytest
import torch
from torch import nn

from diffusion_core.denoiser import Denoiser, Plain, Reader, Said, Time
from diffusion_core.errors import ConfigError
from diffusion_core.grid import Resampled, Uniform
from diffusion_core.guidance import CFG
from diffusion_core.inpainting import Inpaint
from diffusion_core.multistep import Multistep
from diffusion_core.nets.concatenated import Concatenated
from diffusion_core.noise import Noise, Stream
from diffusion_core.renoise import Ancestral, Full, Keep
from diffusion_core.sampler import sample
from diffusion_core.schedule import VP, Cosine, Linear, Schedule
from diffusion_core.solver import FirstOrder, Heun
from diffusion_core.target import X0
from tests.core.oracle import Mixture, one_of_each, perfect, time

SCHEDULES = one_of_each(Schedule)
MEAN = torch.tensor([0.5, -0.3, 0.2, -0.6], dtype=torch.float64)
ROOT = torch.tensor(
    [[0.9, 0.0, 0.0, 0.0], [0.6, 0.5, 0.0, 0.0], [0.5, -0.4, 0.5, 0.0], [-0.5, 0.5, 0.3, 0.4]], dtype=torch.float64
)
COVARIANCE = ROOT @ ROOT.T
KNOWN = torch.tensor([2.0, -0.9, 0.0, 0.0], dtype=torch.float64).reshape(1, 1, 2, 2)
MASK = torch.tensor([True, True, False, False]).reshape(1, 1, 2, 2)
COUNT = 3000
GAIN = COVARIANCE[2:, :2] @ torch.linalg.inv(COVARIANCE[:2, :2])
UNKNOWN_MEAN = MEAN[2:] + GAIN @ (KNOWN.flatten()[:2] - MEAN[:2])  # of two pixels given the other two
UNKNOWN_COVARIANCE = COVARIANCE[2:, 2:] - GAIN @ COVARIANCE[:2, 2:]


class Exact(Reader):
    """E[x₀ | x] = m + αC(α²C + σ²)⁻¹(x - αm) of the four pixels."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.target, self.first = schedule, X0(), 1.0

    def read(self, x, t, cond):
        a, b = (part.item() for part in self.schedule(torch.as_tensor(t)))
        gain = a * COVARIANCE @ torch.linalg.inv(a**2 * COVARIANCE + b**2 * torch.eye(4))
        return Said((MEAN + (x.flatten(1).double() - a * MEAN) @ gain.T).reshape(x.shape).to(x.dtype))


class Told(nn.Module):
    """A network that sees x, what is known and where, and says the exact conditional mean of the rest."""

    def forward(self, seen, c, cond):
        a, b = (part.item() for part in Linear()((c[0] + 1) / 2))
        x, known, mask = seen.flatten(2).unbind(1)
        assert mask[0].tolist() == [1, 1, 0, 0]
        mean = MEAN[2:] + (known[:, :2] - MEAN[:2]) @ GAIN.T
        gain = a * UNKNOWN_COVARIANCE @ torch.linalg.inv(a**2 * UNKNOWN_COVARIANCE + b**2 * torch.eye(2))
        unknown = mean + (x[:, 2:] - a * mean) @ gain.T
        return torch.cat((known[:, :2], unknown), 1).reshape(-1, 1, 2, 2)


def distance(one, other):
    return (one - other).norm().item()


def inpaint(guide, grid, steps, solver, renoise, *, count, dtype, cond=None):
    noise, levels = Noise(0, torch.arange(count)), grid.levels(guide.schedule, steps)
    x = noise.normal((1, 2, 2), Stream.START).to(dtype) * levels[0].row.b
    return sample(guide, x, levels, solver, renoise=renoise, cond=cond, noise=noise)


@pytest.mark.parametrize("schedule", [Cosine(), Linear()], ids=str)
def test_the_unknown_part_comes_to_follow_its_conditional_law(schedule):
    """RePaint: repeated twice, 4 and 8 times, mean and covariance come nearer to x_u | x_k by Gaussian conditioning."""
    guide, errors = Inpaint(Exact(schedule), KNOWN, MASK), []
    for times in (1, 2, 4, 8):
        grid = Resampled(Uniform(), 1, times)
        found = inpaint(guide, grid, 60, FirstOrder(), Ancestral(), count=COUNT, dtype=torch.float64)
        assert torch.equal(found[:, :, 0], KNOWN[:, :, 0].expand(COUNT, 1, 2))
        unknown = found.flatten(1)[:, 2:]
        errors.append((distance(unknown.mean(0), UNKNOWN_MEAN), distance(unknown.T.cov(), UNKNOWN_COVARIANCE)))
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine[0] < 0.8 * coarse[0] and fine[1] < coarse[1]
    assert errors[-1][0] < 0.35 * errors[0][0] and errors[-1][1] < 0.5 * errors[0][1]


def test_a_network_that_is_told_the_known_part_needs_no_repeats():
    """The mask-channel model: its unknown part has the conditional law at once, and the guide keeps the rest exact."""
    net = Concatenated(Told(), ("known", "known_mask"))
    reader = Denoiser(net, Linear(), X0(), scale=Plain(), label=Time())
    cond = {"known": (KNOWN * MASK).expand(9000, 1, 2, 2), "known_mask": MASK.expand(9000, 1, 2, 2)}
    kept = Inpaint(reader, KNOWN, MASK)
    found = inpaint(kept, Uniform(), 60, Multistep(), Keep(), count=9000, dtype=torch.float64, cond=cond)
    assert torch.equal(found[:, :, 0], KNOWN[:, :, 0].expand(9000, 1, 2))
    unknown = found.flatten(1)[:, 2:]
    assert distance(unknown.mean(0), UNKNOWN_MEAN) < 0.03
    assert distance(unknown.T.cov(), UNKNOWN_COVARIANCE) < 0.02


@pytest.mark.parametrize("renoise", [Keep(), Ancestral(0.5), Ancestral(), Full()], ids=str)
@pytest.mark.parametrize("solver", [FirstOrder(), Heun(X0()), Multistep()], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_known_part_is_kept_bit_for_bit(schedule, solver, renoise):
    known = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    guide = Inpaint(Exact(SCHEDULES[schedule]), known, MASK)
    found = inpaint(guide, Resampled(Uniform(), 2, 2), 5, solver, renoise, count=3, dtype=torch.float32)
    assert torch.equal(found[:, :, 0], known[:, :, 0])
    assert not torch.isclose(found[:, :, 1], known[:, :, 1]).any()


def test_solvers_that_hold_noise_keep_it_up_to_rounding():
    guide = Inpaint(Exact(VP()), KNOWN.float(), MASK)
    found = inpaint(guide, Uniform(), 5, Heun(), Keep(), count=3, dtype=torch.float32)
    torch.testing.assert_close(found[:, :, 0], KNOWN[:, :, 0].float().expand(3, 1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_noise_read_is_what_the_known_part_leaves(schedule):
    """ε = (x - α·known)/σ under the mask; elsewhere the pair of the reader itself."""
    inner = perfect(Mixture(), SCHEDULES[schedule], "v")
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t = time(0.1, 0.5, 0.9)
    a, b = (part.reshape(-1, 1, 1, 1) for part in inner.schedule(t))
    guide = Inpaint(inner, KNOWN, MASK)
    found, plain = guide(x, t), inner(x, t)
    assert torch.equal(found.x0, torch.where(MASK, KNOWN, plain.x0))
    torch.testing.assert_close(found.eps, torch.where(MASK, (x - a * KNOWN) / b, plain.eps), rtol=1e-9, atol=1e-9)
    for row in range(3):
        one = guide(x[row : row + 1], t[row].item())
        torch.testing.assert_close(one.eps, found.eps[row : row + 1], rtol=1e-9, atol=1e-9)


def test_the_known_part_follows_the_posterior_given_the_picture():
    """One ancestral step under the mask: N(E, V) of xₛ given xₜ and x₀, by conditioning of the joint Gaussian."""
    schedule = Cosine()
    levels = schedule.level(0.7), schedule.level(0.4)
    (a, b), (c, d) = (level.row for level in levels)
    kept = a / c  # x_t = kept x_s + noise; x_s = c x0 + d z
    spread = b**2 - (kept * d) ** 2
    gain = kept * d**2 / ((kept * d) ** 2 + spread)
    x = torch.full((20_000, 1, 2, 2), 0.8, dtype=torch.float64)
    noise = Noise(3, torch.arange(len(x)))
    found = sample(Inpaint(Exact(schedule), KNOWN, MASK), x, levels, renoise=Ancestral(), noise=noise)[:, 0, 0]
    known = KNOWN[0, 0, 0]
    torch.testing.assert_close(found.mean(0), c * known + gain * (0.8 - kept * c * known), rtol=0, atol=0.01)
    torch.testing.assert_close(found.var(0), torch.full((2,), d**2 * (1 - gain * kept)).double(), rtol=0.04, atol=0)


def test_goes_around_other_guides_and_refuses_what_does_not_fit():
    label = {"label": torch.tensor([0, 1, 1])}
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    guided = CFG(perfect(Mixture(), VP(), "eps"), 3.0)
    found = Inpaint(guided, x.flip(0), MASK)(x, 0.5, label).x0
    assert torch.equal(found, torch.where(MASK, x.flip(0), guided(x, 0.5, label).x0))
    with pytest.raises(ConfigError, match="float32; torch.bool is wanted"):
        Inpaint(guided, KNOWN, MASK.float())
    with pytest.raises(ConfigError, match=r"mask \(1, 1, 3, 2\) does not fit the known picture \(1, 1, 2, 2\)"):
        Inpaint(guided, KNOWN, torch.ones(1, 1, 3, 2, dtype=torch.bool))
