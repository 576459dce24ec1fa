"""What a fault gives: figures, or the reason why it cannot be done here."""

from typing import NamedTuple


class Figure(NamedTuple):
    """One counted outcome; `bound` is how it must compare (">= 100")."""

    name: str
    measured: float
    unit: str
    bound: str


class SkippedError(Exception):
    """This machine lacks what the fault needs."""


def share(name: str, held: list[bool]) -> Figure:
    """How many per cent of the cases ended as expected; all of them have to."""
    return Figure(f"{name}, {sum(held)} of {len(held)}", 100 * sum(held) / len(held), "%", ">= 100")
