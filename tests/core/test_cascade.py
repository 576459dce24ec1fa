"""Cascades on pictures whose law is Gaussian and whose small versions are pooled: every conditional law is a matrix.

High pictures are N(m, C) on 4x4 pixels, low ones A·high on 2x2, A average pooling. The super-resolution network is
the exact posterior mean given what it is told and nothing else: the noisy picture, the enlarged z and its number.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_core.cascade import Finer, augment, cascade
from diffusion_core.denoiser import Denoiser, Plain, Time
from diffusion_core.grid import Uniform
from diffusion_core.multistep import Multistep
from diffusion_core.nets.concatenated import Concatenated
from diffusion_core.noise import Noise, Stream
from diffusion_core.sampler import sample
from diffusion_core.schedule import VE, Cosine, Linear
from diffusion_core.target import X0

PLACES = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
MEAN = torch.sin(torch.arange(16.0)).double()
COVARIANCE = 0.8 * torch.exp(-torch.cdist(PLACES, PLACES) / 2) + 0.05 * torch.eye(16)
POOL = F.avg_pool2d(torch.eye(16).double().reshape(16, 1, 4, 4), 2).flatten(1).T  # (4, 16)
LOW_MEAN, LOW_COVARIANCE = POOL @ MEAN, POOL @ COVARIANCE @ POOL.T
COUNT, STEPS, SCHEDULE = 16_000, 60, Cosine()
SEEDS = torch.arange(COUNT)


class Posterior(nn.Module):
    """E[h | αh + σε, z]: h is N(mean, covariance) and z, if any, a·A·h + b·w with b/a told by its number."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean, self.precision = mean, torch.linalg.inv(covariance)

    def forward(self, seen, c, cond):
        x, side = seen[:, :1].flatten(1), seen.shape[-1]
        a, b = (part.item() for part in SCHEDULE((c[0] + 1) / 2))
        precision = self.precision + a**2 / b**2 * torch.eye(len(self.mean))
        pull = self.mean @ self.precision + a / b**2 * x
        if seen.shape[1] == 3:
            ratio = torch.exp(4 * seen[0, 2, 0, 0])
            a, b = 1 / torch.sqrt(1 + ratio**2), ratio / torch.sqrt(1 + ratio**2)
            precision = precision + a**2 / b**2 * POOL.T @ POOL
            pull = pull + a / b**2 * seen[:, 1, ::2, ::2].flatten(1) @ POOL
        return torch.linalg.solve(precision, pull.T).T.reshape(-1, 1, side, side)


def denoiser(net):
    return Denoiser(net, SCHEDULE, X0(), scale=Plain(), label=Time())


SEEN = ("low", "low_level")
LOW = denoiser(Posterior(LOW_MEAN, LOW_COVARIANCE))
HIGH = denoiser(Concatenated(Posterior(MEAN, COVARIANCE), SEEN))


def drawn(reader, side):
    """A sampler of pictures of a side."""

    def draw(noise, cond):
        x = noise.normal((1, side, side), Stream.START).double()
        return sample(reader, x, Uniform().levels(SCHEDULE, STEPS), Multistep(), cond=cond)

    return draw


def gain(s):
    """K of E[h | z] = m + K(z/a - A·m), z = a·low + b·w at time s."""
    a, b = (part.item() for part in SCHEDULE(torch.tensor(s)))
    return COVARIANCE @ POOL.T @ torch.linalg.inv(LOW_COVARIANCE + (b / a) ** 2 * torch.eye(4))


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("s", [0.0, 0.2, 0.5])
def test_the_chain_has_the_law_of_the_data(s):
    """Whatever the noise between: low ~ p(low), z ~ q(z | low), high ~ p(high | z) is high ~ p(high).

    Low and high go together as far as z lets through: Cov(low, high) = A·C·Aᵀ·Kᵀ; at s = 0 low is A·high itself.
    """
    lows = []

    def base(noise, cond):
        lows.append(drawn(LOW, 2)(noise, cond))
        return lows[0]

    found = cascade(base, [Finer(drawn(HIGH, 4), SCHEDULE, s)], SEEDS, {})
    low, high = lows[0].flatten(1), found.flatten(1)
    assert high.mean(0).sub(MEAN).abs().max() < 0.03
    assert relative(high.T.cov(), COVARIANCE) < 0.04
    both = torch.cat((low, high), 1).T.cov()
    assert relative(both[:4, 4:], LOW_COVARIANCE @ gain(s).T) < 0.04
    if s == 0:
        torch.testing.assert_close(high @ POOL.T, low, rtol=0, atol=1e-2)


@pytest.mark.parametrize("s", [0.2, 0.5])
def test_the_conditional_law_is_right_at_the_level(s):
    """Of one z: mean m + K(z/a - A·m) and covariance C - K·A·C, by Gaussian conditioning."""
    low = torch.full((1, 1, 2, 2), 1.3, dtype=torch.float64)
    told = augment(low, SCHEDULE, s, Noise(7))
    cond = {name: value.expand(COUNT, *value.shape[1:]) for name, value in told.items()}
    found = drawn(HIGH, 4)(Noise(SEEDS), cond).flatten(1)
    a = SCHEDULE(torch.tensor(s)).a
    mean = MEAN + gain(s) @ (told["low"].flatten() / a - LOW_MEAN)
    assert (found.mean(0) - mean).abs().max() < 0.03
    assert relative(found.T.cov(), COVARIANCE - gain(s) @ POOL @ COVARIANCE) < 0.05


def test_faults_of_the_base_are_forgiven_by_the_noise():
    """A base that is off by d moves the mean of the high pictures by K·d: all of d without noise, less with more."""
    fault = torch.tensor([0.6, -0.6, -0.6, 0.6], dtype=torch.float64)
    moved = []
    for s in (0.0, 0.2, 0.4, 0.6):
        stages = [Finer(drawn(HIGH, 4), SCHEDULE, s)]
        right = cascade(drawn(LOW, 2), stages, SEEDS[:50], {})
        wrong = cascade(lambda noise, cond: drawn(LOW, 2)(noise, cond) + fault.reshape(1, 2, 2), stages, SEEDS[:50], {})
        shift = (wrong - right).flatten(1)
        torch.testing.assert_close(shift.mean(0), gain(s) @ fault, rtol=0, atol=0.02)
        moved.append((POOL @ shift.mean(0)).norm() / fault.norm())
    assert moved[0] == pytest.approx(1, abs=0.01)
    assert all(more < 0.8 * less for less, more in zip(moved, moved[1:], strict=False))


@pytest.mark.parametrize("schedule", [Cosine(), Linear(), VE()], ids=str)
def test_augmentation_is_the_forward_process_of_unit_variance(schedule):
    """Each row at its own time, scaled to variance 1 for data of variance 1, told ln(σ/α)/4 between -3 and 3."""
    low = torch.tensor([[2.0], [-1.0]]).repeat_interleave(4000, 0).reshape(-1, 1, 1, 1)
    t = torch.tensor([0.3, 0.6], dtype=torch.float64).repeat_interleave(4000)
    told = augment(low, schedule, t, Noise(1, torch.arange(8000)))
    for rows, time in ((slice(4000), 0.3), (slice(4000, None), 0.6)):
        a, b = (part.item() for part in schedule(torch.tensor(time)))
        norm = (a**2 + b**2) ** 0.5
        assert told["low"][rows].mean().item() == pytest.approx(a / norm * low[rows][0].item(), abs=0.05)
        assert told["low"][rows].std().item() == pytest.approx(b / norm, rel=0.04)
        assert told["low_level"][rows].unique().item() == pytest.approx(torch.tensor(b / a).log().item() / 4, abs=1e-6)
    clean = augment(low, Cosine(), 0.0, Noise(1, torch.arange(8000)))
    assert torch.equal(clean["low"], low) and clean["low_level"].unique().tolist() == [-3.0]


def test_each_stage_and_each_picture_draws_its_own_noise():
    """A later stage never repeats an earlier one's draws, and a picture is the same alone and in a batch."""
    heard = []

    def listen(noise, cond):
        heard.append((noise.normal((1, 16, 16), Stream.START).flatten(1), cond["label"]))
        return torch.zeros(len(seeds), 1, 2, 2)

    label = {"label": torch.tensor([1, 0, 2])}
    seeds, stage = torch.tensor([5, 6, 7]), Finer(listen, Cosine(), 0.5)
    cascade(listen, [stage, stage], seeds, label)
    assert all(torch.equal(told, label["label"]) for _, told in heard)
    assert torch.cat([noise for noise, _ in heard]).corrcoef().fill_diagonal_(0).abs().max() < 0.3
    chain = [Finer(drawn(HIGH, 4), SCHEDULE, 0.2)]
    together, alone = (cascade(drawn(LOW, 2), chain, picked, {}) for picked in (seeds, seeds[1:2]))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-9)
