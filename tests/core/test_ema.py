"""The average of weights against its definition as one explicit weighted sum."""

import pytest
import torch
from torch import nn

from diffusion_core.ema import Ema


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
