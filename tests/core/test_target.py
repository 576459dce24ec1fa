"""Targets against their definitions in the papers, term by term."""

import pytest
import torch

from diffusion_core.errors import ConfigError
from diffusion_core.pair import Pair, mix, unmix
from diffusion_core.schedule import VP, Schedule
from diffusion_core.target import FLOW, Karras, Target, V
from tests.core.oracle import one_of_each, say

SCHEDULES, TARGETS = one_of_each(Schedule), one_of_each(Target)
T = torch.linspace(0.0505, 0.9505, 19, dtype=torch.float64)  # within the pieces of a schedule given by a table
PAIR = Pair(*torch.randn(2, 19, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reads_what_the_literature_defines(schedule, target):
    schedule = SCHEDULES[schedule]
    found = mix(PAIR, TARGETS[target](schedule, T))
    torch.testing.assert_close(found, say(target, schedule, T, PAIR), rtol=1e-8, atol=1e-8)


def test_v_and_its_inverse():
    """v = αε - σx₀, so x₀ = αx - σv and ε = σx + αv where α² + σ² = 1 (Salimans and Ho 2022, appendix D)."""
    level = VP()(T)
    a, b = (part[:, None] for part in level)
    x, v = a * PAIR.x0 + b * PAIR.eps, a * PAIR.eps - b * PAIR.x0
    found = unmix(x, level, v, V()(VP(), T))
    for part, wanted in zip((found.x0, found.eps), (a * x - b * v, b * x + a * v), strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-13)


def test_known_identities():
    velocity = mix(PAIR, TARGETS["velocity"](SCHEDULES["linear"], T))
    torch.testing.assert_close(velocity, mix(PAIR, FLOW()(VP(), T)), msg="flow is the straight path's velocity")
    karras = mix(PAIR, Karras(1.0)(VP(), T))
    torch.testing.assert_close(karras, -mix(PAIR, V()(VP(), T)), msg="EDM's F at unit data on VP is -v")
    with pytest.raises(ConfigError, match="sigma_data"):
        Karras(0.0)
