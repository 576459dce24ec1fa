"""Every cell of one schedule."""

from collections.abc import Mapping

import torch

from diffusion_core.schedule import Schedule
from diffusion_core.solver import Solver
from tests.conformance import distillers, guides, landings, moments, orders
from tests.conformance.cell import Cell
from tests.core.oracle import one_of_each
from tests.core.paths import SOLVERS


def examine(name: str, solvers: Mapping[str, Solver] = SOLVERS) -> list[Cell]:
    """Every cell of one schedule."""
    torch.set_num_threads(1)
    schedule = one_of_each(Schedule)[name]
    return [
        *orders.cells(name, schedule, solvers),
        *landings.cells(name, schedule, solvers),
        *guides.cells(name, schedule),
        *moments.cells(name, schedule),
        *distillers.cells(name, schedule),
    ]
