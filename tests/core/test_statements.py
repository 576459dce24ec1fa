"""Widespread statements that break an implementation if taken literally, each held to what is right.

Claims of others' scores, sizes and speed-ups are facts of theirs, not of this code: they appear nowhere as constants.
"""

import math

import pytest
import torch
from torch import nn

from diffusion_core import (
    CFG,
    EPS,
    VP,
    X0,
    Batch,
    CosineBetas,
    Denoiser,
    Flat,
    KarrasGrid,
    Linear,
    LinearBetas,
    MinSnr,
    Noise,
    QuadraticBetas,
    Regression,
    ScaledLinearBetas,
    UniformTimes,
    V,
    Velocity,
    ZeroTerminal,
    from_paper,
    mix,
    to_paper,
    unmix,
)
from diffusion_core.errors import RefusedError
from diffusion_core.nets import NetSpec
from diffusion_core.pair import Pair
from tests.core.oracle import Mixture, perfect

LAW = Mixture()
X = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABEL = {"label": torch.tensor([0, 1, 1, 0])}


def test_1_guidance_1_is_conditional_and_not_unconditional():
    """Two conventions: here w = 0 is unconditional and w = 1 plain conditional; the paper's counts one less."""
    model = perfect(LAW, VP(), "v")
    given, free = model(X, 0.5, LABEL).x0, model(X, 0.5).x0
    torch.testing.assert_close(CFG(model, 1.0)(X, 0.5, LABEL).x0, given, rtol=0, atol=1e-12)
    torch.testing.assert_close(CFG(model, 0.0)(X, 0.5, LABEL).x0, free, rtol=0, atol=1e-12)
    assert (from_paper(0.0), to_paper(1.0), to_paper(from_paper(6.5))) == (1.0, 0.0, 6.5)
    paper = 2.0
    wanted = (1 + paper) * given - paper * free
    torch.testing.assert_close(CFG(model, from_paper(paper))(X, 0.5, LABEL).x0, wanted, rtol=0, atol=1e-9)


class Table(nn.Module):
    """One answer a class and one for none, trained by regression."""

    def __init__(self):
        super().__init__()
        self.answers = nn.Parameter(torch.zeros(3))

    def forward(self, x, c, cond=None):
        return self.answers[cond["label"]].reshape(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_2_guidance_without_a_classifier_needs_dropped_conditions_in_training(drop):
    """Never dropped, the answer without a condition stays where it was born; dropped, it becomes the mean of all."""
    net = Table()
    objective = Regression(Denoiser(net, Linear(), X0()), UniformTimes(), Flat(), drop_cond=drop)
    ids = torch.arange(64)
    labels = ids % 2
    x = (labels * 2.0 + 1.0).reshape(-1, 1, 1, 1).expand(64, 1, 2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for step in range(200):
        ((_, loss),) = objective.losses(
            Batch(x, {"label": labels}, torch.arange(64)), step, Noise(0, torch.arange(64), step)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net.answers[:2].tolist() == pytest.approx([1.0, 3.0], abs=1e-3)
    assert net.answers[2].item() == (pytest.approx(2.0, abs=0.2) if drop else 0.0)


@pytest.mark.parametrize("target", [X0(), EPS(), V()])
def test_3_min_snr_has_another_form_in_each_space(target):
    """min(SNR, γ) weighs the x₀-loss; the ε-loss divides it by SNR, the v-loss by SNR + 1."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    snr = (VP().alpha(t) / VP().sigma(t)) ** 2
    divisor = {X0(): torch.ones_like(snr), EPS(): snr, V(): snr + 1}[target]
    torch.testing.assert_close(MinSnr(5.0)(VP(), t, target(VP(), t)), snr.clamp_max(5.0) / divisor)


def test_4_chains_do_not_end_in_pure_noise_unless_made_to():
    """ᾱ_T by the published rates; only a zero terminal signal-to-noise ratio is zero, and ε cannot be said there."""
    ends = {LinearBetas(): 4.04e-5, CosineBetas(): 2.43e-9, QuadraticBetas(): 7.3e-4, ScaledLinearBetas(): 4.66e-3}
    for schedule, end in ends.items():
        assert schedule.level(1.0).row.a ** 2 == pytest.approx(end, rel=1e-2)
    rescaled = ZeroTerminal(ScaledLinearBetas())
    assert rescaled.level(1.0).row.a == 0
    with pytest.raises(RefusedError, match="cannot be inverted at t = 1"):
        Denoiser(nn.Identity(), rescaled, EPS())
    Denoiser(nn.Identity(), rescaled, V())


def test_5_a_training_schedule_and_a_sampling_grid_are_two_things():
    """The cosine schedule sampled on Karras' grid: each keeps its own law, and neither knows the other."""
    levels = KarrasGrid(rho=7.0, last=0.05).levels(CosineBetas(), 9, 0.9)
    ratios = [(level.row.b / level.row.a) ** (1 / 7) for level in levels[:-1]]
    steps = [high - low for high, low in zip(ratios, ratios[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 8, rel=1e-6)  # Karras et al. 2022, eq. 5, in the noise ratio
    bar = CosineBetas().level(0.5).row.a ** 2  # Nichol and Dhariwal 2021, eq. 17, wherever it is sampled
    angle = [(s + 0.008) / 1.008 * math.pi / 2 for s in (0.5, 0.0)]
    assert bar == pytest.approx((math.cos(angle[0]) / math.cos(angle[1])) ** 2, rel=1e-9)


def test_6_flow_papers_run_the_other_way():
    """Data at 0 and noise at 1 here; with data at 1, x_u = u·x₁ + (1-u)·z and dx/du = x₁ - z, at u = 1 - t."""
    data, z = X, torch.flip(X, (0,))
    for u in (0.1, 0.5, 0.9):
        pair, t = Pair(data, z), torch.tensor(1 - u, dtype=torch.float64)
        theirs, speed = u * data + (1 - u) * z, data - z
        torch.testing.assert_close(mix(pair, Linear()(t)), theirs, rtol=0, atol=1e-15)
        torch.testing.assert_close(mix(pair, Velocity()(Linear(), t)), -speed, rtol=0, atol=1e-15)
        back = unmix(theirs, Linear()(t), -speed, Velocity()(Linear(), t))
        for found, wanted in zip(back[:2], pair[:2], strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", NetSpec.known)
def test_7_no_denoiser_mixes_its_batch(kind):
    """Class conditioning is adaptive group or layer norm; batch norm is nowhere."""
    sizes = {"channels": 2, "size": 8, "classes": 3}
    small = {
        "unet": {"widths": [8, 8], "groups": 4, "head_width": 8},
        "edm2": {"width": 8, "multipliers": [1, 2], "head": 8, "depth": 1},
        "mmdit": {"text": 8},
    }
    net = NetSpec.read({"kind": kind, **sizes, **small.get(kind, {})}, "net").build()
    assert not [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]


def test_12_v_is_alpha_eps_minus_sigma_x0_and_turns_back():
    """x₀ = αx - σv and ε = σx + αv where α² + σ² = 1 (Salimans and Ho 2022, appendix D)."""
    t = torch.tensor(0.37, dtype=torch.float64)
    a, b = VP()(t)
    eps = torch.flip(X, (0,))
    x, v = a * X + b * eps, a * eps - b * X
    torch.testing.assert_close(mix(Pair(X, eps), V()(VP(), t)), v, rtol=0, atol=1e-15)
    torch.testing.assert_close(a * x - b * v, X, rtol=0, atol=1e-14)
    torch.testing.assert_close(b * x + a * v, eps, rtol=0, atol=1e-14)
    found = unmix(x, VP()(t), v, V()(VP(), t))
    torch.testing.assert_close(found.x0, X, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-14)
