"""What the tests of solvers share: every solver by the names of its papers, grids inside a schedule, and the posterior
means of a law."""

import torch

from diffusion_core.multistep import Multistep, UniPC
from diffusion_core.solver import FirstOrder, Heun, SingleStep
from diffusion_core.target import EPS, FLOW, X0
from tests.core.oracle import Gaussian

LAW = Gaussian(0.7, 0.4)
SOLVERS = {
    "DDIM, Euler": FirstOrder(),
    "Heun (EDM)": Heun(EPS()),
    "Heun, x0": Heun(X0()),
    "Heun, flow": Heun(FLOW()),
    "DPM-Solver-2": SingleStep(EPS(), 2),
    "DPM-Solver-3": SingleStep(EPS(), 3),
    "DPM-Solver++(2S)": SingleStep(X0(), 2),
    "DPM-Solver++(3S)": SingleStep(X0(), 3),
    "single-step 3, flow": SingleStep(FLOW(), 3),
    "DPM-Solver++(2M)": Multistep(),
    "DPM-Solver++(2M), exact": Multistep(X0(), "log_snr", 2, exact=True),
    "DPM-Solver++(3M)": Multistep(X0(), "log_snr", 3, exact=True),
    "multistep 3, eps": Multistep(EPS(), "log_snr", 3, exact=True),
    "multistep 3, flow": Multistep(FLOW(), "log_snr", 3, exact=True),
    "PNDM (PLMS)": Multistep(EPS(), "t", 4, start="heun"),
    "iPNDM": Multistep(EPS(), "step", 4),
    "LMS-2": Multistep(EPS(), "ratio", 2),
    "LMS-3": Multistep(EPS(), "ratio", 3),
    "LMS-4": Multistep(EPS(), "ratio", 4),
    "Adams-Bashforth-2, flow": Multistep(FLOW(), "t", 2),
    "Adams-Bashforth-4, flow": Multistep(FLOW(), "t", 4),
    "UniPC-1": UniPC(1),
    "UniPC-2": UniPC(2),
    "UniPC-3": UniPC(3),
}
STUCK = {"Heun (EDM)", "DPM-Solver-2", "DPM-Solver-3", "PNDM (PLMS)"}  # average noise over a step out of pure noise


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
