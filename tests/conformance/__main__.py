"""Run every combination, one schedule after another on two processes, and write docs/conformance.md and its twin."""

import sys
from collections.abc import Mapping
from multiprocessing import get_context

import torch

from diffusion_core.schedule import Schedule
from diffusion_core.solver import Solver
from tests import measured
from tests.conformance import distillers, guides, landings, moments, orders, page
from tests.conformance.cell import Cell
from tests.conformance.solvers import SOLVERS
from tests.core.oracle import one_of_each

PAGE, TWIN = measured.ROOT / "docs" / "conformance.md", measured.ROOT / "docs" / "conformance.json"
COMMAND = "make conformance"
PROCESSES = 2


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


def main() -> int:
    """The exit code: 1 if a figure misses its bound."""
    cells = list[Cell]()
    with get_context("spawn").Pool(PROCESSES) as pool:
        for found in pool.imap(examine, Schedule.kinds()):
            cells += found
            figures, refused, missed, farthest = page.summary(found)
            print(f"{found[0].schedule}: {figures} figures, {refused} refused, {missed} missed; {farthest}", flush=True)
            for cell in found:
                if not cell.ok:
                    print(f"  MISSED {cell.name}: {cell.measured:g} (bound {cell.bound}) {cell.refused}", flush=True)
    device, commit = measured.device(), measured.commit()
    rows = [
        measured.Row(c.name, c.measured, c.unit, c.bound, c.ok, "closed form", device, commit, COMMAND) for c in cells
    ]
    measured.write_rows(TWIN, rows)
    PAGE.write_text(page.page(cells, f"{device}; commit {commit}; `{COMMAND}`"))
    return int(not all(cell.ok for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
