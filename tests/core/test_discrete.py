"""Schedules given by betas against the chain multiplied out, the peer library and published values."""

import pickle

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from diffusion_core.discrete import (
    Betas,
    CosineBetas,
    LinearBetas,
    QuadraticBetas,
    ScaledLinearBetas,
    SigmoidBetas,
    Tabulated,
    ZeroTerminal,
)
from diffusion_core.errors import ConfigError
from diffusion_core.schedule import Schedule
from diffusion_core.spec import build, spec
from tests.core.oracle import one_of_each, time

CHAINS = one_of_each(Betas)
PEERS = {  # name: (ours, the peer's name for it)
    "linear": (LinearBetas(), "linear"),
    "scaled linear": (ScaledLinearBetas(), "scaled_linear"),
    "quadratic": (QuadraticBetas(), "scaled_linear"),
    "cosine": (CosineBetas(), "squaredcos_cap_v2"),
    "sigmoid": (SigmoidBetas(), "sigmoid"),
    "short": (LinearBetas(40, 0.01, 0.3), "linear"),
}


def betas_of(schedule, steps):
    """One less the ratio of neighbouring ᾱ, read off the schedule at its knots."""
    bar = schedule(torch.arange(steps + 1, dtype=torch.float64) / steps).a ** 2
    return 1 - bar[1:] / bar[:-1]


def peer(schedule, name, **more):
    ends = {} if name == "squaredcos_cap_v2" else {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return DDPMScheduler(num_train_timesteps=schedule.steps, beta_schedule=name, **ends, **more)


@pytest.mark.parametrize("case", PEERS)
def test_betas_are_those_of_the_peer(case):
    schedule, name = PEERS[case]
    wanted = peer(schedule, name).betas.double()
    torch.testing.assert_close(torch.from_numpy(schedule.table()), wanted, rtol=0, atol=1e-7)
    torch.testing.assert_close(betas_of(schedule, schedule.steps), wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", PEERS)
def test_zero_terminal_is_the_peers(case):
    """The peer's own function in float64, and its scheduler in float32."""
    inner, name = PEERS[case]
    wanted = rescale_zero_terminal_snr(torch.from_numpy(inner.table()))
    torch.testing.assert_close(betas_of(ZeroTerminal(inner), inner.steps), wanted, rtol=0, atol=1e-10)
    knots = torch.arange(1, inner.steps + 1, dtype=torch.float64) / inner.steps
    single = peer(inner, name, rescale_betas_zero_snr=True).alphas_cumprod.double()
    torch.testing.assert_close(ZeroTerminal(inner)(knots).a ** 2, single, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (LinearBetas(), 4.04e-5),
        (CosineBetas(), 2.43e-9),
        (QuadraticBetas(), 7.3e-4),
        (ScaledLinearBetas(), 4.66e-3),
        (ZeroTerminal(ScaledLinearBetas()), 0.0),
    ],
    ids=str,
)
def test_published_ends(schedule, wanted):
    level = schedule.level(1.0)
    assert level.row.a**2 == pytest.approx(wanted, rel=5e-3)
    assert level.row.a**2 + level.row.b**2 == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("name", CHAINS)
def test_every_step_is_the_product_so_far(name):
    """A step at a time in plain Python, signal and noise by a unit of variance shared between them."""
    schedule, bar, noise = CHAINS[name], 1.0, 0.0
    betas = schedule.table()
    assert schedule.level(0.0).row == (1, 0)
    for i, beta in enumerate(betas.tolist(), 1):
        bar, noise = bar * (1 - beta), (1 - beta) * noise + beta
        if i in (1, 2, len(betas) // 2, len(betas)):
            level = schedule.level(i / len(betas))
            assert level.row.a**2 == pytest.approx(bar, rel=1e-12)
            assert level.row.b**2 == pytest.approx(noise, rel=1e-12)


@pytest.mark.parametrize("name", CHAINS)
def test_between_two_steps_the_logarithm_is_a_line(name):
    schedule = CHAINS[name]
    count = len(schedule.table())
    for i in (0, 1, count // 3, count - 1):
        low, high = (schedule(time((i + one) / count)).a.log() for one in (0, 1))
        for share in (0.25, 0.5, 0.9):
            a, b = schedule(time((i + share) / count))
            assert a.log().item() == pytest.approx(((1 - share) * low + share * high).item(), rel=1e-9, abs=1e-14)
            assert (a**2 + b**2).item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("inner", CHAINS.values(), ids=CHAINS)
def test_zero_terminal_keeps_the_first_step_and_loses_the_last(inner):
    """Lin et al. 2023, algorithm 1: √ᾱ moved by its last value, scaled back to its first."""
    schedule, count = ZeroTerminal(inner), len(inner.table())
    knots = torch.arange(1, count + 1, dtype=torch.float64) / count
    (old, _), (new, noise) = inner(knots), schedule(knots)
    assert new[0].item() == pytest.approx(old[0].item(), rel=1e-12)
    assert (new[-1], noise[-1]) == (0, 1)
    shape = (old - old[-1]) / (old[0] - old[-1])
    torch.testing.assert_close(new, shape * old[0], rtol=1e-9, atol=1e-12)
    inside = time(1 - 0.75 / count, 1 - 0.5 / count, 1 - 0.25 / count)  # the last step falls on a straight line
    a, b = schedule(inside)
    torch.testing.assert_close(a, new[-2] * time(0.75, 0.5, 0.25), rtol=1e-9, atol=0)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a), rtol=0, atol=1e-14)


def test_the_rate_of_a_step_is_its_beta():
    """On step i, d ln ᾱ/dt = T ln(1 - βᵢ), so α' = α T ln(1 - βᵢ)/2, and σ' = -αα'/σ."""
    schedule = LinearBetas(10, 0.05, 0.5)
    t = torch.arange(10, dtype=torch.float64) / 10 + 0.03
    (a, b), rate = schedule(t), schedule.rate(t)
    slope = a * 10 * torch.log1p(-torch.linspace(0.05, 0.5, 10, dtype=torch.float64)) / 2
    torch.testing.assert_close(rate.a, slope)
    torch.testing.assert_close(rate.b, -a * slope / b)
    last = ZeroTerminal(schedule).rate(time(0.99)).a  # the last step ends in nothing after a tenth of the time
    assert last.item() == pytest.approx(-10 * ZeroTerminal(schedule)(time(0.9)).a.item())


@pytest.mark.parametrize("schedule", [*CHAINS.values(), ZeroTerminal(LinearBetas(5))], ids=str)
def test_a_chain_is_a_value(schedule):
    """What it has computed is no part of it, and outlives every mode it was first computed in."""
    again = build(Schedule, spec(schedule), "s")
    with torch.inference_mode():
        schedule.level(0.5)
    copy = pickle.loads(pickle.dumps(schedule))
    assert schedule == copy == again and hash(schedule) == hash(copy) == hash(again)
    t = time(0.3, 0.8).requires_grad_()
    (gradient,) = torch.autograd.grad(again.alpha(t).sum() + copy.alpha(t).sum(), t)
    torch.testing.assert_close(gradient, 2 * schedule.rate(t.detach()).a)
    batched = torch.func.vmap(again.sigma)(torch.rand(4, 3, dtype=torch.float64))
    assert batched.shape == (4, 3) and batched.isfinite().all()


REFUSED = {
    "no steps": lambda: LinearBetas(0),
    "negative steps": lambda: SigmoidBetas(-3),
    "falling": lambda: ScaledLinearBetas(10, 0.02, 0.01),
    "beta of 0": lambda: QuadraticBetas(10, 0.0, 0.01),
    "beta of 1": lambda: LinearBetas(10, 0.5, 1.0),
    "no cosine": lambda: CosineBetas(0),
    "shift": lambda: CosineBetas(10, shift=1.0),
    "clip": lambda: CosineBetas(10, clip=1.0),
    "no betas": lambda: Tabulated(()),
    "one beta too large": lambda: Tabulated((0.1, 1.0)),
    "not a number": lambda: Tabulated((0.1, float("nan"))),
    "nothing to keep": lambda: ZeroTerminal(Tabulated((0.1,))),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_impossible_numbers_are_refused(refused):
    with pytest.raises(ConfigError, match="wanted"):
        refused()


def test_only_a_chain_has_a_last_step_to_rescale():
    with pytest.raises(ConfigError, match="s.inner.kind is 'cosine'.*did you mean 'cosine_betas'"):
        build(Schedule, {"kind": "zero_terminal", "inner": {"kind": "cosine"}}, "s")
