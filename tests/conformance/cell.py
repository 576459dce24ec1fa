"""The outcome of one combination."""

import math
from typing import NamedTuple

SHOWN = 1e-8  # differences below are rounding, of the oracle's too, which depends on the machine


class Cell(NamedTuple):
    """One figure of the page: of `row` on `schedule`, in a column of a table.

    `bound` is how it must compare, empty where it is only told; `refused` the sentence by which the library says
    that there is no such thing.
    """

    table: str
    schedule: str
    row: str
    column: str
    measured: float
    unit: str
    bound: str
    ok: bool
    refused: str = ""

    @property
    def name(self) -> str:
        refused = " (below pure noise, where it is refused)" if self.refused else ""
        return f"{self.table} / {self.schedule} / {self.row} / {self.column}{refused}"


def decade(difference: float) -> float:
    """The power of ten that a difference does not exceed, so that a page does not show rounding."""
    return 10.0 ** math.ceil(math.log10(max(difference, SHOWN)) - 1e-9) if math.isfinite(difference) else math.inf


def exact(table: str, schedule: str, row: str, column: str, difference: float, bound: float, refused: str = "") -> Cell:
    """The cell of a figure that must be a closed form's but for rounding."""
    ok = difference <= bound
    return Cell(table, schedule, row, column, decade(difference), "difference", f"<= {bound:g}", ok, refused)


def slope(table: str, schedule: str, row: str, column: str, found: float, stated: float, within: float) -> Cell:
    """The cell of an order of convergence; any where `within` is infinite."""
    bound = f"{stated:g} +- {within:g}" if within < math.inf else ""
    return Cell(table, schedule, row, column, round(found, 2), "order", bound, abs(found - stated) <= within)
