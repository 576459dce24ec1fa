"""Grids against the papers' formulas and the peer library's timesteps."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest

from diffusion_core.chain import jump
from diffusion_core.discrete import LinearBetas, ScaledLinearBetas
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.grid import (
    Exponential,
    Given,
    Grid,
    Karras,
    Leading,
    Linspace,
    LogSnr,
    Resampled,
    Trailing,
    Uniform,
)
from diffusion_core.schedule import CLEAN, VE, VP, Edm, Linear, Schedule
from diffusion_core.spec import build
from tests.core.oracle import one_of_each

SCHEDULES, GRIDS = one_of_each(Schedule), one_of_each(Grid)
SPACINGS = {  # the peer's name and offset for each
    "leading": (Leading(), "leading", 0),
    "leading with an offset": (Leading(offset=1), "leading", 1),
    "trailing": (Trailing(), "trailing", 0),
    "linspace": (Linspace(), "linspace", 0),
}


def ratios(levels):
    return np.array([level.row.b / level.row.a for level in levels])


def times(levels):
    return [level.t for level in levels]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("first", [1.0, 0.93])
def test_grids_fall_from_first_and_end_clean(schedule, grid, first):
    """What does not fit is refused; only the resampled one goes up, and never above its start."""
    schedule, made, fitting = SCHEDULES[schedule], GRIDS[grid], []
    for steps in (1, 2, 3, 5, 50):
        try:
            made.check(steps)
        except RefusedError:
            with pytest.raises(RefusedError):
                made.levels(schedule, steps, first)
            continue
        fitting.append(steps)
        levels = made.levels(schedule, steps, first)
        assert levels[-1] == CLEAN and not any(level.clean for level in levels[:-1])
        assert all(level.row == pytest.approx(schedule.level(level.t).row, rel=1e-13) for level in levels[:-1])
        falls = [low.t < high.t for high, low in pairwise(levels)]
        assert sum(falls) == made.descents(steps) and len({level.t for level in levels}) == steps + 1
        assert levels[0].t == max(times(levels)) <= first
        assert levels[0].t == first or not isinstance(made, Uniform | LogSnr | Karras)
        if grid != "resampled":
            assert len(levels) == steps + 1 and all(falls)
    assert fitting == {"given": [3], "resampled": [3, 5, 50]}.get(grid, [1, 2, 3, 5, 50])


@pytest.mark.parametrize("case", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 16, 20, 25, 30, 48, 50, 77, 100, 250, 333, 400, 512, 600, 999])
def test_whole_steps_are_the_peers(case, steps):
    grid, spacing, offset = SPACINGS[case]
    peer = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    peer.set_timesteps(steps)
    found = [round(t * 1000) - 1 for t in grid.times(LinearBetas(), steps, 1.0)]
    for place, (one, other) in enumerate(zip(found, peer.timesteps.tolist(), strict=True)):
        halfway = spacing == "trailing" and 2000 * place % steps == 0 and 2000 * place // steps % 2 == 1
        assert one == other or (halfway and abs(one - other) == 1)  # there the peer's own rounding error decides


def test_the_first_step_of_a_chain_is_the_noisiest_in_one_spacing_only():
    """Lin et al. 2023, table 2: ten of a thousand steps."""
    chain = [
        [round(1000 * t) for t in grid.times(LinearBetas(), 10, 1.0)] for grid in (Leading(), Linspace(), Trailing())
    ]
    assert chain[0] == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert chain[1] == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
    assert chain[2] == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]


@pytest.mark.parametrize("made", [Leading, Trailing, Linspace])
def test_a_chain_that_starts_lower_is_a_shorter_chain(made):
    """Up to t = 0.6 of 1000 steps there are 600, spaced as those of a chain of 600."""
    found = made().times(VP(), 7, 0.6004)
    assert found == pytest.approx([0.6 * t for t in made(600).times(VP(), 7, 1.0)])


def test_even_in_log_snr():
    for grid in (LogSnr(0.05), Exponential(0.05)):
        clock = [level.log_snr for level in grid.levels(VP(), 9)[:-1]]
        assert np.allclose(np.diff(clock), (VP().level(0.05).log_snr - VP().level(1.0).log_snr) / 8, rtol=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_polyexponential_is_k_diffusions(power):
    """Its sigmas are exp(ramp (ln σmax - ln σmin) + ln σmin), with ramp = linspace(1, 0, n)^power."""
    ramp = np.linspace(1, 0, 12) ** power
    wanted = np.exp(ramp * (math.log(80) - math.log(0.002)) + math.log(0.002))
    assert np.allclose(ratios(Exponential(0.0, power).levels(VE(), 12)[:-1]), wanted, rtol=1e-9)


@pytest.mark.parametrize("schedule", [VE(), Edm()], ids=str)
def test_karras_is_eq_5(schedule):
    """Karras et al. 2022: 18 steps from 80 to 0.002, and then the picture."""
    i = np.arange(18)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels = Karras(7.0, last=0.0).levels(schedule, 18)
    assert np.allclose(ratios(levels[:-1]), wanted, rtol=1e-9) and levels[18] == CLEAN


@pytest.mark.parametrize(("grid", "option"), [(Karras, "use_karras_sigmas"), (LogSnr, "use_exponential_sigmas")])
def test_noise_ratios_are_the_peers(grid, option):
    """Between the same two ends, on Stable Diffusion's chain; the peer works in float32."""
    peer = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **{option: True}
    )
    peer.set_timesteps(15)
    found = ratios(grid(last=0.001).levels(ScaledLinearBetas(), 15))
    assert np.allclose(found, peer.sigmas, rtol=1e-3)


def test_pure_noise_has_no_ratio_but_a_place_on_every_grid():
    for grid in (LogSnr(), Karras(), Exponential(power=2.0)):
        found = times(grid.levels(Linear(), 6))
        assert found[0] == 1 and 0.9 < found[1] < 1 and found[5] == pytest.approx(0.02)


def test_given_times_are_kept():
    levels = Given((0.9, 0.41, 0.2)).levels(VP(), 3)
    assert times(levels) == [0.9, 0.41, 0.2, 0.0]
    assert times(Given((0.5, 0.0)).levels(VE(), 2)) == [0.5, 0.0, 0.0]  # its t = 0 has noise left
    assert build(Grid, {"kind": "given", "at": [0.9, 0.41]}, "g") == Given((0.9, 0.41))


class TestResampled:
    """RePaint's path is that of the peer's scheduler, whose timesteps count the levels from the clean end."""

    @pytest.mark.parametrize(
        ("steps", "jump", "repeats"),
        [(10, 3, 4), (25, 10, 10), (9, 2, 3), (8, 1, 2), (5, 4, 2), (6, 3, 1), (250, 10, 10)],
    )
    def test_path(self, steps, jump, repeats):
        peer = diffusers.RePaintScheduler(num_train_timesteps=steps)
        peer.set_timesteps(steps, jump, repeats)
        climbing = peer.timesteps.tolist()  # it goes up a level at a time: the same law as one jump
        wanted = [
            t
            for before, t, after in zip([steps, *climbing], climbing, [*climbing[1:], -1], strict=False)
            if not before < t < after
        ]
        grid = Resampled(Uniform(), jump, repeats)
        levels = grid.levels(VP(), steps)
        once = times(Uniform().levels(VP(), steps))
        assert times(levels) == [once[steps - 1 - t] for t in wanted] + [0.0]
        assert grid.descents(steps) == sum(low.t < high.t for high, low in pairwise(levels))

    def test_legs_up_are_forward_jumps(self):
        levels = Resampled(LogSnr(), 2, 2).levels(SCHEDULES["zero_terminal"], 7)
        up = [(low, high) for low, high in pairwise(levels) if high.t > low.t]
        assert len(up) == 3
        for low, high in up:
            kept, std = jump(low, high)
            assert (kept * low.row.b) ** 2 + std**2 == pytest.approx(high.row.b**2)


REFUSED = {
    "no steps": (lambda: Uniform().levels(VP(), 0), ConfigError, "steps 0: at least 1"),
    "more than the chain": (lambda: Trailing(10).check(11), RefusedError, "Trailing.* 11 steps.*1..10"),
    "more than what is left of the chain": (lambda: Leading(10).levels(VP(), 6, 0.5), RefusedError, "6 steps.*1..5"),
    "an offset beyond the chain": (lambda: Leading(10, offset=1).check(10), RefusedError, "do not fit"),
    "no chain": (lambda: Linspace(0), ConfigError, "count 0"),
    "an offset below the chain": (lambda: Leading(10, offset=-1), ConfigError, "offset -1"),
    "last above 1": (lambda: LogSnr(1.0), ConfigError, "last 1.0"),
    "last in the clean picture": (lambda: LogSnr(0.0).levels(VP(), 3), RefusedError, "some noise"),
    "last above first": (lambda: Karras(last=0.5).levels(VP(), 3, 0.4), RefusedError, "below t = 0.4"),
    "power": (lambda: Exponential(power=0.0), ConfigError, "power 0"),
    "rho": (lambda: Karras(rho=-1.0), ConfigError, "rho -1"),
    "rising": (lambda: Given((0.5, 0.7)), ConfigError, "falling"),
    "twice the same": (lambda: Given((0.5, 0.5)), ConfigError, "falling"),
    "beyond the clean end": (lambda: Given((0.5, -0.1)), ConfigError, "falling"),
    "a call on the clean picture": (lambda: Given((0.5, 0.0)).levels(VP(), 2), RefusedError, "noise alone"),
    "above noise": (lambda: Given((1.1, 0.5)), ConfigError, "falling times in \\[0, 1\\]"),
    "nothing given": (lambda: Given(()), ConfigError, "falling"),
    "other steps": (lambda: Given((0.9, 0.5)).check(3), RefusedError, "steps 3: .* has 2"),
    "given above first": (lambda: Given((0.9, 0.5)).levels(VP(), 2, 0.8), RefusedError, "from t = 0.8"),
    "no jump": (lambda: Resampled(Uniform(), 0), ConfigError, "jump 0"),
    "no repeat": (lambda: Resampled(Uniform(), 2, 0), ConfigError, "repeats 0"),
    "a jump as long as the grid": (lambda: Resampled(Uniform(), 5).check(5), RefusedError, "at least 6 steps"),
    "what the inner grid refuses": (lambda: Resampled(Trailing(10), 2).check(11), RefusedError, "1..10"),
    "twice resampled": (lambda: Resampled(Resampled(Uniform())), ConfigError, "only falls"),
}


@pytest.mark.parametrize(("refused", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(refused, error, words):
    with pytest.raises(error, match=words):
        refused()


@pytest.mark.parametrize("kind", ["uniform", "leading", "trailing", "linspace", "log_snr", "karras", "exponential"])
def test_a_user_names_a_grid_by_its_kind(kind):
    assert len(build(Grid, {"kind": kind}, "sampling.grid").levels(VP(), 4)) == 5
