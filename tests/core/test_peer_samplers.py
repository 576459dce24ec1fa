"""Trajectories against diffusers' schedulers, on grids which both define: the same network, times and noise.

The peer takes the sample at the next *training* step for the next grid point, t - T//n, which is one only where n
divides T and the spacing leads; those grids are used.
"""

import diffusers
import pytest
import torch
from torch import nn

from diffusion_core.denoiser import Denoiser, Plain, StepNumber
from diffusion_core.discrete import LinearBetas, ScaledLinearBetas
from diffusion_core.multistep import Multistep, UniPC
from diffusion_core.renoise import Ancestral, Keep
from diffusion_core.schedule import CLEAN
from diffusion_core.solver import FirstOrder, Heun
from diffusion_core.table import write
from diffusion_core.target import EPS, X0
from tests.core.oracle import Mixture

SHAPE = (2, 3, 8, 8)
T = 1000
LEADING = {"timestep_spacing": "leading", "num_train_timesteps": T}
PLMS = Multistep(EPS(), "step", 4, start="heun")
DRAWING = ("scheduling_ddpm", "scheduling_euler_ancestral_discrete", "scheduling_dpmsolver_multistep")
CASES = {  # name: (peer, its options, our solver, our renoise, step counts)
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, FirstOrder(), Ancestral(1.0), (10, 50)),
    "ddim": ("DDIMScheduler", {"clip_sample": False}, FirstOrder(), Keep(), (5, 20, 50)),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, PLMS, Keep(), (5, 20, 50)),
    "euler": ("EulerDiscreteScheduler", {}, FirstOrder(), Keep(), (5, 20, 50)),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, FirstOrder(), Ancestral(1.0), (10, 50)),
    "heun": ("HeunDiscreteScheduler", {}, Heun(EPS()), Keep(), (5, 20, 50)),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}, Multistep(X0(), "log_snr", 2), Keep(), (5, 20, 50)),
    "dpm++ 2m exact": (
        "DPMSolverMultistepScheduler",
        {"solver_type": "heun"},
        Multistep(X0(), "log_snr", 2, exact=True),
        Keep(),
        (5, 20),
    ),
    "dpm++ 2m sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        Multistep(X0(), "log_snr", 2),
        Ancestral(1.0),
        (10, 20),  # with 50 the peer's own rounding is 7e-5, ours 5e-6, both against float64
    ),
    "unipc": ("UniPCMultistepScheduler", {}, UniPC(2), Keep(), (5, 20, 50)),
    "lms": ("LMSDiscreteScheduler", {}, Multistep(EPS(), "ratio", 4), Keep(), (20,)),
}


class Perfect(nn.Module):
    """The exact noise in a mixture's noisy sample at whole steps: far from linear, and as tame as a real network."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.law = schedule, Mixture()

    def forward(self, x, c, cond=None):
        level = self.schedule((c.double() + 1) / T)
        return self.law.pair(x.double(), level).eps.float()


def theirs(name, options, schedule, steps, x):
    """The peer's loop as its documentation shows it: where it lands, the times it asks for, how it scales the start."""
    betas = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    betas["beta_schedule"] = "linear" if type(schedule) is LinearBetas else "scaled_linear"
    peer = getattr(diffusers, name)(**LEADING, **betas, **options)
    peer.set_timesteps(steps)
    start, net = float(peer.init_noise_sigma), Perfect(schedule)
    sample = x * start
    for k in peer.timesteps:
        said = net(peer.scale_model_input(sample, k), torch.full((len(x),), float(k)))
        sample = peer.step(said, k, sample).prev_sample
    return sample, sorted({(float(k) + 1) / T for k in peer.timesteps}, reverse=True), start


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", [LinearBetas(), ScaledLinearBetas()], ids=["linear", "scaled"])
def test_same_trajectory(case, schedule, monkeypatch):
    name, options, solver, renoise, counts = CASES[case]
    for steps in counts:
        fresh = torch.randn(steps, *SHAPE, generator=torch.Generator().manual_seed(1))
        drawn = iter(fresh)
        for module in DRAWING:
            monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, it=drawn, **__: next(it))
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        wanted, times, start = theirs(name, options, schedule, steps, x)
        levels = (*(schedule.level(t) for t in times), CLEAN)
        assert len(times) == steps
        if start != 1:  # this peer keeps samples at α = 1
            x = x * start * levels[0].row.a
        reader = Denoiser(Perfect(schedule), schedule, EPS(), scale=Plain(), label=StepNumber(T))
        table = write(levels, solver, renoise, schedule, EPS())
        found = table.run(reader, x, None, lambda step, number: fresh[step])  # noqa: B023 (called at once)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), steps
