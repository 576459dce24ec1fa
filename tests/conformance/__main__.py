"""Run every combination, one schedule after another on two processes, and write docs/conformance.md and its twin."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from diffusion_core.schedule import Schedule
from tests import measured
from tests.conformance import page
from tests.conformance.cell import Cell
from tests.conformance.examine import examine

PAGE, TWIN = measured.ROOT / "docs" / "conformance.md", measured.ROOT / "docs" / "conformance.json"
COMMAND = "make conformance"
PROCESSES = 2


def main() -> int:
    """The exit code: 1 if a figure misses its bound."""
    cells = list[Cell]()
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        for found in pool.map(examine, Schedule.kinds()):
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
