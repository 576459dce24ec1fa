"""Quarantine: every item that was left out, with the reason; budgets that stop the stage; a report for people.

Defects use up the budgets. Decisions (a duplicate, a wish to opt out) do not.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from diffusion_core.errors import DataError
from pipelines.data import index
from pipelines.data.index import QUARANTINE, RefusalRow
from pipelines.data.preparing import Budget, Done

REPORT = "quarantine.md"
DECISIONS = ("duplicate", "near_duplicate", "opt_out")
QUOTED = 3  # reasons in the sentence that stops the stage
SHOWN = 20  # items of each kind in the report
LONGEST = 300  # characters of one field there
ENOUGH = 1000  # items after which a share of an unknown total means something


class Quarantine:
    """The refused items of one run; raises DataError as soon as there are more than the budgets allow.

    `total` is the weight of all parts, in `unit`.
    """

    def __init__(self, budget: Budget, total: int, unit: str):
        self.budget, self.total, self.unit = budget, total, unit
        self.rows: list[RefusalRow] = []
        self.seen = self.defects = self.in_a_row = self.unread = 0
        self.examples: list[str] = []
        self.streak: list[str] = []

    def take(self, done: Done) -> None:
        """Count one part."""
        last = -1
        for place, row in done.refused:
            self.rows.append(row)
            if row.kind in DECISIONS:
                continue
            if place != last + 1:
                self.in_a_row, self.streak = 0, []
            last = place
            self.defects += 1
            self.in_a_row += 1
            self.examples = [*self.examples, row.reason][:QUOTED]
            self.streak = [*self.streak, row.reason][:QUOTED]
            if self.in_a_row > self.budget.max_consecutive:
                allowed = f"max_consecutive allows {self.budget.max_consecutive}"
                raise DataError(f"{self.in_a_row} items in a row cannot be used; {allowed}: {'; '.join(self.streak)}")
        if last + 1 != done.seen:
            self.in_a_row, self.streak = 0, []
        self.seen += done.seen
        self.unread += done.part.weight if done.unread else 0
        if self.budget.pictures is not None:
            self._check(self.budget.pictures)
        elif self.seen >= ENOUGH:
            self._check(self.seen)
        if self.budget.exceeded(self.unread, self.total):
            unread = f"{self.unread:,} of {self.total:,} {self.unit} are in parts that cannot be read to their end"
            raise DataError(f"{unread}; {self._said()}")

    def close(self) -> None:
        """Check once more when the number of items is known; there must be one."""
        self._check(max(self.seen, self.budget.pictures or 0))
        if self.seen == len(self.rows):
            reasons = "; ".join(row.reason for row in self.rows[:QUOTED]) or "the source is empty"
            raise DataError(f"no usable picture among {self.seen}: {reasons}")

    def _check(self, total: int) -> None:
        if self.budget.exceeded(self.defects, total):
            raise DataError(f"{self.defects:,} of {total:,} items cannot be used; {self._said()}")

    def _said(self) -> str:
        return f"max_quarantine_percent allows {self.budget.max_percent:g} %: {'; '.join(self.examples)}"


def write(folder: Path, rows: Iterable[RefusalRow], decided: Iterable[RefusalRow]) -> Counter[str]:
    """Write the table, sorted `rows` first and then those `decided` as they come, and the report; counts the kinds."""
    counts: Counter[str] = Counter()
    shown: dict[str, list[RefusalRow]] = {}

    def watched() -> Iterator[RefusalRow]:
        for row in chain(sorted(rows, key=lambda row: (row.kind, *row)), decided):
            counts[row.kind] += 1
            if counts[row.kind] <= SHOWN:
                shown.setdefault(row.kind, []).append(row)
            yield row

    index.write(folder / QUARANTINE, RefusalRow, watched())
    (folder / REPORT).write_text("\n".join(_report(counts, shown)) + "\n", encoding="utf-8")
    return counts


def _report(counts: Counter[str], shown: dict[str, list[RefusalRow]]) -> Iterator[str]:
    yield "# Quarantine\n"
    if not counts:
        yield "Nothing was left out."
        return
    yield f"What was left out, and why. All of it is in {QUARANTINE}.\n"
    yield "| kind | items | |\n|---|---:|---|"
    for kind in sorted(counts):
        yield f"| {kind} | {counts[kind]:,} | {'a decision' if kind in DECISIONS else 'a defect'} |"
    for kind in sorted(shown):
        more = f", the first {SHOWN}" if counts[kind] > SHOWN else ""
        yield f"\n## {kind}{more}\n\n| origin | reason |\n|---|---|"
        for row in shown[kind]:
            yield f"| {_escaped(row.origin)} | {_escaped(row.reason)} |"


def _escaped(text: str) -> str:
    """Text of a stranger as one cell, spelt as code: nothing in it is Markdown, HTML or a link, and it has one line."""
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    plain = "".join(sign if sign.isprintable() else " " for sign in short)
    return f"`{plain.replace('`', chr(39)).replace('|', chr(92) + '|').strip() or ' '}`"
