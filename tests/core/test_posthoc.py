"""Averages put together afterwards against those that would have been kept; the shares against brute force."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from diffusion_core.ema import PowerEma, power_exponent
from diffusion_core.errors import ConfigError, IntegrityError
from diffusion_core.posthoc import Snapshot, load, profile_error, reconstruct, save, snapshot

STORED = (0.05, 0.10)
WANTED = (0.03, 0.07, 0.15, 0.20)
STEPS = 480


class Weights(nn.Module):
    """A trajectory's place: parameters, a buffer that never changes and a counter."""

    def __init__(self, size):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.register_buffer("fixed", torch.tensor([3.0, -7e5, 1e-3], dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))


def random_walk():
    drawn = torch.randn(STEPS, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 5 + drawn.cumsum(0) / STEPS**0.5


def polynomials():
    t = torch.arange(1, STEPS + 1, dtype=torch.float64)[:, None] / STEPS
    return torch.cat([t**power for power in range(8)], 1)


def trained(path, stds, every):
    """The snapshots of each profile of `stds`, one `every` so many steps of the path."""
    module, taken = Weights(path.shape[1]), []
    emas = [PowerEma(module, std) for std in stds]
    for step, theta in enumerate(path, 1):
        with torch.no_grad():
            module.theta.copy_(theta)
            module.count += 1
        for ema in emas:
            ema.update(module)
            if step % every == 0:
                taken.append(snapshot(ema))
    return taken


@pytest.fixture(scope="module")
def walks():
    """The stored snapshots of two known paths, one every 10 steps, and the averages wanted, every 60."""
    paths = {"random walk": random_walk(), "polynomials": polynomials()}
    return {name: (path, trained(path, STORED, 10), trained(path, WANTED, 60)) for name, path in paths.items()}


def thinned(taken, count):
    return [one for one in taken if one.step % (STEPS // count) == 0]


def miss(path, taken, direct):
    """The largest error of the reconstruction, in units of how far the path goes."""
    made = reconstruct(taken, direct.std, direct.step)["theta"]
    return float((made - direct.weights["theta"]).abs().max() / (path.amax(0) - path.amin(0)).max())


@pytest.mark.parametrize("name", ["random walk", "polynomials"])
def test_the_reconstruction_is_the_average_that_would_have_been_kept(walks, name):
    """From 2 profiles every 10 of 480 steps, at every 60th step from the middle of training on."""
    path, taken, wanted = walks[name]
    for direct in wanted:
        if direct.step >= STEPS // 2:
            assert miss(path, taken, direct) < (1e-4 if direct.std in (0.07, 0.15) else 1e-3), (direct.std, direct.step)


@pytest.mark.parametrize("std", WANTED)
@pytest.mark.parametrize("name", ["random walk", "polynomials"])
def test_more_snapshots_err_less(walks, name, std):
    path, taken, wanted = walks[name]
    (direct,) = [one for one in wanted if (one.std, one.step) == (std, STEPS)]
    errors = [miss(path, thinned(taken, count), direct) for count in (3, 12, 48)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0
    profiles = [profile_error(thinned(taken, count), std, STEPS) for count in (3, 12, 48)]
    assert profiles[0] > 2 * profiles[1] > 4 * profiles[2]


@pytest.mark.parametrize("name", ["random walk", "polynomials"])
def test_the_error_is_within_cauchy_and_schwarz(walks, name):
    """|∫ (q - p)(θ - c)| <= ‖q - p‖ ‖θ - c‖ for any constant c, since both profiles have mass one."""
    path, taken, wanted = walks[name]
    for direct in wanted:
        norm = (power_exponent(direct.std) + 1) ** 2 / (2 * power_exponent(direct.std) + 1) / direct.step
        for count in (2, 4, 16):
            few = [one for one in thinned(taken, count) if one.step <= direct.step]
            if few and few[-1].step == direct.step:
                far = (path[: direct.step] - path[: direct.step].mean(0)).square().sum(0).sqrt()
                bound = profile_error(few, direct.std, direct.step) * norm**0.5 * far
                made = reconstruct(few, direct.std, direct.step)["theta"]
                assert ((made - direct.weights["theta"]).abs() <= bound + 1e-9).all()


def test_a_stored_average_comes_back(walks):
    _, taken, _ = walks["random walk"]
    for one in taken:
        made = reconstruct(taken, one.std, one.step)
        assert (made["theta"] - one.weights["theta"]).abs().max() < 1e-9
        assert profile_error(taken, one.std, one.step) < 1e-6


def test_what_never_moved_is_as_it_was(walks):
    """However poor the fit; a counter is that of the snapshot nearest in time."""
    _, taken, _ = walks["random walk"]
    made = reconstruct(thinned(taken, 2), 0.25, 250)
    assert made["fixed"].tolist() == pytest.approx([3.0, -7e5, 1e-3], rel=1e-12)
    assert made["count"] == 240 and made["count"].dtype == torch.int64


def as_unit_vectors(places):
    """Snapshots whose weights are the rows of the identity: a reconstruction is then the list of shares."""
    rows = torch.eye(len(places), dtype=torch.float64)
    return [Snapshot(step, std, {"theta": row}) for (step, std), row in zip(places, rows, strict=True)]


@pytest.mark.parametrize(("std", "step"), [(0.07, 400), (0.2, 400), (0.04, 330)])
def test_the_shares_are_the_best_there_are(std, step):
    """Against profiles on a grid of 40000 points and a general minimiser that knows no formula."""
    places = [(100, 0.05), (100, 0.1), (200, 0.1), (400, 0.05), (400, 0.1)]
    grid = (np.arange(40_000) + 0.5) / 100

    def profile(step, std):
        exponent = power_exponent(std)
        return np.where(grid < step, (exponent + 1) / step * np.minimum(grid / step, 1) ** exponent, 0)

    known, aim = np.stack([profile(*place) for place in places], 1), profile(step, std)
    found = minimize(
        lambda x: (known @ x - aim) @ (known @ x - aim) / (aim @ aim),
        np.full(len(places), 1 / len(places)),
        jac=lambda x: 2 * known.T @ (known @ x - aim) / (aim @ aim),
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    shares = reconstruct(as_unit_vectors(places), std, step)["theta"].numpy()
    assert shares == pytest.approx(found.x, abs=2e-3) and shares.sum() == pytest.approx(1, abs=1e-12)
    assert profile_error(as_unit_vectors(places), std, step) == pytest.approx(found.fun**0.5, rel=1e-3)


def test_long_runs_stay_well_conditioned():
    """256 snapshots of each profile over 10⁸ steps: a stored one is still itself and the others are near."""
    places = [(step * 390_625, std) for step in range(1, 257) for std in STORED]
    taken = as_unit_vectors(places)
    shares = reconstruct(taken, *places[-1][::-1])["theta"]
    assert (shares - torch.eye(512, dtype=torch.float64)[-1]).abs().max() < 1e-9
    assert profile_error(taken, 0.07, 10**8) < 1e-4


def test_the_dtype_is_kept_and_the_sum_is_in_float64():
    one, other = (Snapshot(100, std, {"w": torch.full((3,), 1 / 3)}) for std in STORED)
    made = reconstruct([one, other], 0.07, 100)["w"]
    assert made.dtype == torch.float32 and torch.equal(made, one.weights["w"])


def test_a_snapshot_is_a_copy():
    module = nn.Linear(2, 2)
    ema = PowerEma(module, 0.1)
    with pytest.raises(ConfigError, match="without updates"):
        snapshot(ema)
    ema.update(module)
    taken = snapshot(ema)
    nn.init.zeros_(module.weight)
    ema.update(module)
    assert taken.step == 1 and taken.std == 0.1 and not torch.equal(taken.weights["weight"], ema.average["weight"])


def test_snapshots_are_kept_on_disk(tmp_path, walks):
    _, taken, _ = walks["random walk"]
    few = thinned(taken, 4)
    places = [save(tmp_path / "kept", one) for one in few]
    assert sorted((tmp_path / "kept").iterdir()) == sorted(places) and len(places) == 8
    back = [load(place) for place in places]
    assert [(one.step, one.std) for one in back] == [(one.step, one.std) for one in few]
    once, again = reconstruct(few, 0.07, STEPS), reconstruct(back, 0.07, STEPS)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert save(tmp_path / "kept", few[0]) == places[0]  # written again, not beside
    weights = places[0] / "weights.safetensors"
    found = weights.read_bytes()
    weights.write_bytes(found[:-1] + bytes([found[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        load(places[0])


@pytest.mark.parametrize(
    ("std", "step", "says"),
    [
        (0.3, 100, r"std 0\.3: .*below 0\.2887"),
        (0.0, 100, r"std 0\.0: .*above 0"),
        (math.nan, 100, "std nan"),
        (0.1, 201, "step 201: a step from 1 to 200, that of the last snapshot, is wanted"),
        (0.1, 0, "step 0: a step from 1 to 200"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(std, step, says):
    for asked in (reconstruct, profile_error):
        with pytest.raises(ConfigError, match=says):
            asked(as_unit_vectors([(100, 0.05), (200, 0.05)]), std, step)


def test_snapshots_that_do_not_belong_together_are_refused():
    one = Snapshot(10, 0.05, {"theta": torch.zeros(3)})
    with pytest.raises(ConfigError, match="no snapshots: at least one is wanted"):
        reconstruct([], 0.05, 10)
    with pytest.raises(ConfigError, match=r"std 0\.05 at step 10 is given 2 times"):
        reconstruct([one, one], 0.05, 10)
    with pytest.raises(ConfigError, match=r"std 0\.1 at step 20 is of another network"):
        reconstruct([one, Snapshot(20, 0.1, {"theta": torch.zeros(4)})], 0.05, 10)
