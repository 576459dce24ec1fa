"""The page: for every schedule a table of all solvers and targets, then guides, fresh noise and distillers."""

import textwrap
from collections.abc import Iterable, Sequence

from tests.conformance.cell import SHOWN, Cell

COLUMNS = ("order", "self-started")
INTRO = f"""\
# Conformance

Every schedule, target and solver in every combination, and every guide, rule of fresh noise and distiller on every
schedule, against closed forms: data are a mixture of two Gaussians, or one Gaussian, of which a perfect network, the
scores and the probability flow are known. `make conformance` runs all of it, in float64 on two cores, rewrites this
page and fails if one figure misses its bound. [conformance.json](conformance.json) has a row for every cell, with its
bound.

- **stated** is the order that the solver claims on the schedule (`Solver.order_on`), **order** the slope of its error
  against the exact flow from t = 0.8 to 0.2 between 240 and 480 equal steps (30 and 60 for single-step solvers; on a
  chain, its own steps and every other one, so that its kinks are levels). It must be within 0.2. Multistep solvers are
  given exact starting values; **self-started** is their slope without, which the first steps bound.
- Under the name of a **target** stands how far sampling through the table with a network that says it lands from where
  the readable loop lands with the law's own pair: inside the schedule, and from t = 1 to the clean picture. {SHOWN:g}
  is that or less, and no more than 1e-07 is allowed: the order above is then the same for every target.
- **refused** is what the library refuses to build or to run from t = 1, because it has no mathematical answer; the
  sentences are at the end. A refusal where there is an answer, or none where there is none, would fail. Below pure
  noise these combinations are measured like the others, and are in the JSON file.
"""
HEADS = {
    "guides": "Guides: the largest difference of the guided x₀ from its formula, over all targets and six times inside "
    "and outside the interval; at most 1e-06 is allowed.",
    "fresh noise": "Fresh noise: mean and standard deviation of the landing, computed exactly on Gaussian data. The "
    "first four converge to the law, at the slope shown, within 0.2 of 1, 1, 2 and 2; the others are exact in any "
    "number of steps, Langevin's walks by their own recursion.",
    "distillers": "Distillers: what is left to learn for a student that already is what it should become: nothing for "
    "progressive distillation, for consistency distillation the teacher's step, whose error is of order 3.",
}


def page(cells: Sequence[Cell], line: str) -> str:
    """The whole page; `line` says on which machine and commit it was measured."""
    schedules, solvers = _unique(cell.schedule for cell in cells), [cell for cell in cells if cell.table == "solvers"]
    parts = [INTRO, f"{line}\n", _summary(cells, schedules)]
    for schedule in schedules:
        parts.append(f"\n## Solvers on {schedule}\n\n{_solvers([c for c in solvers if c.schedule == schedule])}")
    for table, head in HEADS.items():
        title, _, text = head.partition(": ")
        some = {(cell.row, cell.schedule): shown(cell) for cell in cells if cell.table == table}
        rows = [[row, *(some[row, schedule] for schedule in schedules)] for row in _unique(row for row, _ in some)]
        parts.append(
            f"\n## {title}\n\n{textwrap.fill(text[0].upper() + text[1:], 120)}\n\n{_table(['', *schedules], rows)}"
        )
    sentences = {(cell.row, cell.column): cell.refused for cell in reversed(cells) if cell.refused}
    said = "\n".join(f"- {sentence}" for sentence in _unique(reversed(sentences.values())))
    return "\n".join(parts) + f"\n\n## Refused\n\nIn the words of the first schedule each stands on:\n\n{said}\n"


def summary(cells: Sequence[Cell]) -> list[str]:
    """Of one schedule: how many figures, how many refused and failed, and which order is farthest from its own."""
    orders = [cell for cell in cells if cell.unit == "order" and cell.bound]
    farthest = max(orders, key=lambda cell: abs(cell.measured - float(cell.bound.split()[0])))
    counts = [len(cells), sum(bool(cell.refused) for cell in cells), sum(not cell.ok for cell in cells)]
    return [*map(str, counts), f"{farthest.row}: {farthest.measured:.2f} of {farthest.bound.split()[0]}"]


def shown(cell: Cell) -> str:
    """What the page says of a cell."""
    text = f"{cell.measured:.2f}" if cell.unit == "order" else f"{cell.measured:.0e}"
    return f"**{text} missed**" if not cell.ok else "refused" if cell.refused else text


def _summary(cells: Sequence[Cell], schedules: Sequence[str]) -> str:
    rows = [[name, *summary([cell for cell in cells if cell.schedule == name])] for name in schedules]
    return _table(["schedule", "figures", "refused", "missed", "order farthest from the one stated"], rows)


def _solvers(cells: Sequence[Cell]) -> str:
    """One schedule's table: a row a solver."""
    some = {(cell.row, cell.column): cell for cell in cells}
    targets = [column for column in _unique(cell.column for cell in cells) if column not in COLUMNS]
    rows = []
    for row in _unique(cell.row for cell in cells):
        columns = [shown(some[row, column]) if (row, column) in some else "" for column in (*COLUMNS, *targets)]
        rows.append([row, some[row, "order"].bound.split()[0], *columns])
    return _table(["solver", "stated", *COLUMNS, *targets], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
