"""The table against the loop that writes it: the same numbers to rounding, for every combination that is linear."""

import pytest
import torch
from torch import nn

from diffusion_core.denoiser import Denoiser, Plain
from diffusion_core.errors import DataError
from diffusion_core.grid import Resampled, Uniform
from diffusion_core.noise import Noise
from diffusion_core.renoise import Ancestral, Full, Keep
from diffusion_core.sampler import sample
from diffusion_core.schedule import CLEAN, VP, Schedule
from diffusion_core.solver import FirstOrder, Heun
from diffusion_core.stochastic import Churn, Langevin
from diffusion_core.table import Call, Fresh, Sum, write
from diffusion_core.target import FLOW, X0, Target
from diffusion_core.walk import walk
from tests.core.oracle import one_of_each
from tests.core.paths import SOLVERS

SCHEDULES, TARGETS = one_of_each(Schedule), one_of_each(Target)
ALL = SOLVERS | {"churn": Churn(Heun(FLOW())), "langevin": Langevin(FirstOrder(), 2), "both": Churn(SOLVERS["UniPC-2"])}
CASES = [  # every rule with each solver and target, and every sort of schedule
    ("vp", Keep()),
    ("subvp", Ancestral(0.7)),
    ("edm", Full()),
    ("linear", Keep()),
    ("scaled_linear_betas", Ancestral(0.7)),
]
TIMES = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2)


class Wavy(nn.Module):
    """Something smooth that is not linear, of the size of a network's answers."""

    def forward(self, x, c, cond=None):
        return torch.tanh(x.roll(1, -1) + c.reshape(-1, 1)) / 2


def fresh(step, number, like):
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(97 * step + number))


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("target", TARGETS)
def test_table_and_loop_agree_to_rounding(target, solver):
    solver = ALL[solver]
    bound = 1e-13 if "EPS" in str(solver) else 6e-15  # noise read where there is little is amplified, by both alike
    for name, renoise in CASES:
        schedule = SCHEDULES[name]
        reader = Denoiser(Wavy(), schedule, TARGETS[target], first=0.85)
        levels = (*schedule.levels(TIMES), CLEAN)
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * levels[0].row.b

        def draw(step, number, x=x):
            return fresh(step, number, x)

        looped = walk(
            lambda y, at, reader=reader: reader(y, at.t), x, levels, solver, schedule, renoise=renoise, draw=draw
        )
        table = write(levels, solver, renoise, schedule, reader.target)
        with torch.no_grad():
            found = table.run(reader, x, None, draw)
        assert (found - looped).abs().max() <= bound * max(1, looped.abs().max()), (name, renoise)
        assert table.calls == solver.calls(len(TIMES))


def test_a_first_order_step_is_one_call_and_one_sum():
    table = write((*VP().levels(TIMES), CLEAN), FirstOrder(), Keep(), VP(), TARGETS["eps"])
    assert [type(line.task) for line in table.lines] == [Call, Sum] * len(TIMES)
    assert all(len(line.task.terms) == 2 for line in table.lines[1::2])


@pytest.mark.parametrize("solver", ["DPM-Solver++(2M)", "PNDM (PLMS)", "UniPC-3"])
def test_sums_do_not_grow_with_the_steps(solver):
    levels = Uniform().levels(VP(), 60, 0.95)
    table = write(levels, SOLVERS[solver], Ancestral(1.0), VP(), TARGETS["v"])
    assert max(len(line.task.uses()) for line in table.lines) <= 6


def test_what_goes_up_draws_noise_and_calls_nothing():
    levels = Resampled(Uniform(), jump=2, repeats=3).levels(VP(), 6)
    table = write(levels, FirstOrder(), Keep(), VP(), TARGETS["v"])
    down = sum(low.log_snr > high.log_snr for high, low in zip(levels, levels[1:], strict=False))
    assert table.calls == down and sum(isinstance(line.task, Fresh) for line in table.lines) == len(levels) - 1 - down


def test_a_gradient_flows_through_the_whole_table():
    reader = Denoiser(Wavy(), VP(), X0(), scale=Plain())
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    path = (*VP().levels(TIMES), CLEAN)
    (found,) = torch.autograd.grad(sample(reader, x, path, SOLVERS["DPM-Solver++(2M)"]).sum(), x)
    step = torch.zeros_like(x)
    step[1, 2] = 1e-6
    with torch.no_grad():
        ends = [sample(reader, x + sign * step, path, SOLVERS["DPM-Solver++(2M)"]).sum() for sign in (1, -1)]
    assert found[1, 2].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-6, rel=1e-5)


def test_a_sample_that_is_not_finite_is_named():
    reader = Denoiser(Wavy(), VP(), X0())
    x = torch.zeros(2, 4)
    x[1, 3] = torch.nan
    with pytest.raises(DataError, match=r"x holds 1 numbers that are not finite, the first at \(1, 3\): nan"):
        sample(reader, x, (*VP().levels(TIMES), CLEAN), noise=Noise(range(2)))
