"""Averages of weights against their definitions, each as one explicit weighted sum."""

import math

import pytest
import torch
from scipy.integrate import quad
from torch import nn

from diffusion_core.ema import Ema, PowerEma, power_exponent
from diffusion_core.errors import ConfigError


def visit(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_is_the_weighted_sum_of_all_it_saw(decay):
    """Σ θₖ (1 - dₖ) Π_{j>k} dⱼ with dₙ = min(decay, (1 + n)/(10 + n)); the weights sum to one."""
    module, values = nn.Linear(2, 1), [3.0, -1.0, 4.0, 1.0, -5.0, 9.0]
    visit(module, values[0])
    ema = Ema(module.double(), decay)
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, len(values))]
    for value in values[1:]:
        visit(module, value)
        ema.update(module)
    tail = [float(torch.tensor(decays[k:], dtype=torch.float64).prod()) for k in range(len(values))]
    weights = [tail[0], *((1 - d) * rest for d, rest in zip(decays, tail[1:], strict=True))]
    assert sum(weights) == pytest.approx(1)
    wanted = sum(w * value for w, value in zip(weights, values, strict=True))
    assert ema.average["weight"].flatten().tolist() == pytest.approx([wanted] * 2, rel=1e-12)


def test_counters_are_copied_and_the_module_is_not_touched():
    module = nn.Linear(1, 1)
    module.register_buffer("seen", torch.tensor(0))
    visit(module, 1.0)
    ema = Ema(module, 0.9)
    visit(module, 2.0)
    module.seen += 7
    ema.update(module)
    assert ema.average["seen"] == 7
    assert module.weight.item() == 2.0 and ema.average["weight"].item() != 2.0
    ema.copy_to(module)
    assert torch.equal(module.weight, ema.average["weight"])


def test_going_on_from_a_saved_average_is_not_starting_again():
    module = nn.Linear(3, 3)
    kept, resumed = Ema(module, 0.99), Ema(module, 0.99)
    for step in range(8):
        visit(module, float(step))
        kept.update(module)
        if step == 4:
            resumed.restore(kept.average, kept.updates)
        if step > 4:
            resumed.update(module)
    assert torch.equal(kept.average["weight"], resumed.average["weight"])
    assert resumed.updates == 8


def test_the_classic_average_is_pinned_to_the_bit():
    """Each update is one `lerp_` by 1 - d, and nothing else: a saved run goes on unchanged."""
    torch.manual_seed(0)
    module = nn.Linear(5, 7)
    ema, wanted = Ema(module, 0.7), module.weight.detach().clone()
    for n in range(1, 9):
        visit(module, float(torch.randn(())))
        ema.update(module)
        wanted.lerp_(module.weight.detach(), 1 - min(0.7, (1 + n) / (10 + n)))
        assert torch.equal(ema.average["weight"], wanted)


@pytest.mark.parametrize(("std", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_published(std, exponent):
    assert power_exponent(std) == pytest.approx(exponent, abs=0.005)


@pytest.mark.parametrize("std", [0.001, 0.01, 0.05, 0.15, 0.25, 0.2886])
def test_the_profile_has_the_standard_deviation_asked_for(std):
    """By quadrature: under the density (γ+1)τ^γ on [0, 1], u = -(γ+1) ln τ is exponential."""
    rate = power_exponent(std) + 1
    mean = quad(lambda u: math.exp(-u - u / rate), 0, math.inf)[0]
    variance = quad(lambda u: math.exp(-u) * (math.exp(-u / rate) - mean) ** 2, 0, math.inf)[0]
    assert variance**0.5 == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("std", [0.0, -0.1, 12**-0.5, 0.3, math.nan])
def test_profiles_that_do_not_exist_are_refused(std):
    with pytest.raises(ConfigError, match=r"std .*above 0 and below 0\.2887"):
        PowerEma(nn.Linear(1, 1), std)


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.25])
def test_the_power_average_is_the_integral_of_its_profile(std):
    """θ is constant during step k, so its weight is ∫ over ((k-1)/n, k/n) of (γ+1)τ^γ; the start has none."""
    torch.manual_seed(0)
    module, values = nn.Linear(2, 1).double(), torch.randn(40, dtype=torch.float64)
    visit(module, 1e6)
    ema = PowerEma(module, std)
    for value in values:
        visit(module, float(value))
        ema.update(module)
    edges = [(k / len(values)) ** (power_exponent(std) + 1) for k in range(len(values) + 1)]
    wanted = sum((b - a) * float(value) for a, b, value in zip(edges, edges[1:], values, strict=False))
    assert ema.average["weight"].flatten().tolist() == pytest.approx([wanted] * 2, rel=1e-12)


def test_a_power_average_goes_on_where_it_was_saved():
    module = nn.Linear(3, 3)
    kept, resumed = PowerEma(module, 0.1), PowerEma(module, 0.1)
    for step in range(8):
        visit(module, float(step))
        kept.update(module)
        if step == 4:
            resumed.restore(kept.average, kept.updates)
        if step > 4:
            resumed.update(module)
    assert torch.equal(kept.average["weight"], resumed.average["weight"])
    resumed.copy_to(module)
    assert torch.equal(module.weight, kept.average["weight"]) and resumed.updates == 8
