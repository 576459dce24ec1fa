"""What the tests of solvers share: named solvers, grids inside a schedule, and the posterior means of a law."""

import torch

from diffusion_core.multistep import Multistep, UniPC
from diffusion_core.solver import FirstOrder, Heun, SingleStep
from diffusion_core.target import EPS, FLOW, X0
from tests.core.oracle import Gaussian

LAW = Gaussian(0.7, 0.4)
SOLVERS = {
    "first_order": FirstOrder(),
    "heun x0": Heun(X0()),
    "heun eps": Heun(EPS()),
    "heun flow": Heun(FLOW()),
    "dpm 2": SingleStep(EPS(), 2),
    "dpm 3": SingleStep(EPS(), 3),
    "dpm++ 2s": SingleStep(X0(), 2),
    "dpm++ 2m": Multistep(),
    "dpm++ 3m": Multistep(order=3, exact=True),
    "lms": Multistep(EPS(), "ratio", 2),
    "adams-bashforth flow": Multistep(FLOW(), "t", 2),
    "plms": Multistep(EPS(), "t", 4, start="heun"),
    "ipndm": Multistep(EPS(), "step", 4),
    "unipc 2": UniPC(2),
    "unipc 3": UniPC(3),
}


def levels(schedule, steps, start=0.8, end=0.2):
    return schedule.levels(torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist())


def at(law=LAW):
    """The law's posterior means, as a solver asks for them."""
    return lambda x, level: law.pair(x, level.row)


def start(level, law=LAW):
    """Points one, zero and two standard deviations from the mean of the noisy law."""
    a, b = level.row
    spread = ((a * law.std) ** 2 + b**2) ** 0.5
    return a * law.means[0] + spread * torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
