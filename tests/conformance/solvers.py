"""Every solver by the names of its papers."""

from diffusion_core.multistep import Multistep, UniPC
from diffusion_core.solver import FirstOrder, Heun, SingleStep, Solver
from diffusion_core.stochastic import Churn, Langevin
from diffusion_core.target import EPS, FLOW, X0

SOLVERS: dict[str, Solver] = {
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
STOCHASTIC: dict[str, Solver] = {"Churn": Churn(), "Langevin": Langevin(FirstOrder())}
