"""Two readings give the pair, any third follows: exact over every schedule, target and time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.pair import Numbers, Pair, determinant, mix, unmix
from diffusion_core.schedule import Schedule
from diffusion_core.target import Target
from tests.core.oracle import one_of_each, time

SCHEDULES, TARGETS = one_of_each(Schedule), one_of_each(Target)
numbers = st.floats(-1, 1)
times = st.floats(0.02, 0.9)


def size(row):
    return math.hypot(row.a.item(), row.b.item())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=30)
@given(x0=numbers, eps=numbers, t=times)
def test_round_trip(schedule, target, x0, eps, t):
    schedule, target, t = SCHEDULES[schedule], TARGETS[target], time(t)
    pair, level, said = Pair(time(x0), time(eps)), schedule(t), target(schedule, t)
    found = unmix(mix(pair, level), level, mix(pair, said), said)
    assert abs(found.x0.item() - x0) < 1e-12
    assert abs(found.eps.item() - eps) < 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=10)
@given(x0=numbers, eps=numbers, t=times)
def test_round_trip_between_any_two_targets(schedule, x0, eps, t):
    """Said as one target, read as another and said as the first again.

    The error is relative to the target's row: at σ = 0.002 a score is 500 times as large as the noise it names.
    """
    schedule, t = SCHEDULES[schedule], time(t)
    level, rows = schedule(t), {name: target(schedule, t) for name, target in TARGETS.items()}
    x = mix(Pair(time(x0), time(eps)), level)
    for one in rows.values():
        said = mix(Pair(time(x0), time(eps)), one)
        for other in rows.values():
            turned = mix(unmix(x, level, said, one), other)
            back = mix(unmix(x, level, turned, other), one)
            assert abs(back.item() - said.item()) < 1e-12 * max(1, size(one))


@given(at=st.tuples(numbers, numbers), of=st.tuples(numbers, numbers), x0=numbers, eps=numbers)
def test_is_the_solution_of_two_equations(at, of, x0, eps):
    matrix = np.array([at, of])
    if abs(np.linalg.det(matrix)) < 1e-3:
        return
    readings = matrix @ [x0, eps]
    assert mix(Pair(time(x0), time(eps)), Numbers(*at)).item() == pytest.approx(readings[0], abs=1e-15)
    found = unmix(time(readings[0]), Numbers(*at), time(readings[1]), Numbers(*of))
    assert np.allclose([found.x0, found.eps], np.linalg.solve(matrix, readings), rtol=0, atol=1e-9)
    assert determinant(Numbers(*at), Numbers(*of)) == pytest.approx(np.linalg.det(matrix), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_row_a_sample_and_the_dtype_of_the_pair(dtype):
    pair = Pair(torch.ones(3, 2, 4, 4, dtype=dtype), torch.full((3, 2, 4, 4), 2.0, dtype=dtype))
    mixed = mix(pair, Schedule.kinds()["linear"]()(time(0.0, 0.5, 1.0)))
    assert mixed.dtype == dtype
    assert mixed[:, 0, 0, 0].tolist() == [1.0, 1.5, 2.0]
