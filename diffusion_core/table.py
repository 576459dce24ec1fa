"""A sampler is a table: every step of every linear solver is a sum of a few known tensors with known coefficients.

The loop in walk.py, run once on linear forms instead of tensors, writes the table down; after that, sampling is one
network call and one sum a row, and no schedule, solver or target is asked again. The readable loop stays the only
definition of every solver. What is not linear stays with the loop: a learned variance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from diffusion_core.denoiser import SMALLEST_DETERMINANT, Condition, Reader, rows
from diffusion_core.pair import Numbers, Pair, determinant, mix, unmix
from diffusion_core.renoise import Renoise
from diffusion_core.schedule import Level, Schedule
from diffusion_core.solver import FRAMES, Solver
from diffusion_core.target import Target
from diffusion_core.walk import Draw, walk

START = 0  # the place of the sample that sampling starts from
ROUNDING = 1e-13  # a coefficient this small beside another is none
TABLES = 256  # how many tables are kept


@dataclass(frozen=True)
class Form:
    """A sum of values yet to come: place -> coefficient."""

    terms: Mapping[int, float]

    def __add__(self, other: "Form") -> "Form":
        both = dict(self.terms)
        for place, coefficient in other.terms.items():
            both[place] = both.get(place, 0.0) + coefficient
        return Form(both)

    def __rmul__(self, factor: float) -> "Form":
        return Form({place: factor * coefficient for place, coefficient in self.terms.items()})

    def __sub__(self, other: "Form") -> "Form":
        return self + -1.0 * other

    def __truediv__(self, divisor: float) -> "Form":
        return 1 / divisor * self


class Sum(NamedTuple):
    """A value that is a sum of others: (place, coefficient) each."""

    terms: tuple[tuple[int, float], ...]

    def uses(self) -> list[int]:
        return [place for place, _ in self.terms]

    def moved(self, to: Mapping[int, int]) -> "Sum":
        return Sum(tuple((to[place], coefficient) for place, coefficient in self.terms))


class Call(NamedTuple):
    """A value that is what the reader says of x at t or, with a `turn`, x plus that many times what it says."""

    x: int
    t: float
    turn: float | None

    def uses(self) -> list[int]:
        return [self.x]

    def moved(self, to: Mapping[int, int]) -> "Call":
        return self._replace(x=to[self.x])


class Fresh(NamedTuple):
    """A value that is fresh noise."""

    step: int
    number: int

    def uses(self) -> list[int]:
        return []

    def moved(self, to: Mapping[int, int]) -> "Fresh":
        return self


Task = Sum | Call | Fresh


class Line(NamedTuple):
    """How one value is made, and the places of those not needed after it."""

    task: Task
    drop: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """How every value is made, in order: line i makes value i + 1, the last one the sample at the last level."""

    lines: tuple[Line, ...]

    @property
    def calls(self) -> int:
        """How often the network is asked."""
        return sum(isinstance(line.task, Call) for line in self.lines)

    def run(self, reader: Reader, x: Tensor, cond: Condition | None, draw: Draw) -> Tensor:
        """Carry x (B, ...) from the first level to the last; `reader` says the target the table was written for."""
        values = [x] * (len(self.lines) + 1)
        made, spare = set[int](), list[Tensor]()  # the places of values made here; memory of such, free again
        recycles = not torch.is_grad_enabled()  # a gradient may need any value again
        for place, (task, drop) in enumerate(self.lines, 1):
            if isinstance(task, Call):
                sample = values[task.x]
                value = reader.read(sample, task.t, cond).reading
                if recycles and value.untyped_storage().data_ptr() == sample.untyped_storage().data_ptr():
                    value = value.clone()  # a network that answers with its own input
                if task.turn is not None:
                    value = torch.add(sample, value, alpha=task.turn, out=spare.pop() if spare else None)
                    made.add(place)
            elif isinstance(task, Sum):
                (first, coefficient), *others = task.terms
                if recycles and first in drop and first in made:
                    value = values[first].mul_(coefficient)
                    made.remove(first)
                else:
                    value = torch.mul(values[first], coefficient, out=spare.pop() if spare else None)
                for other, coefficient in others:
                    value.add_(values[other], alpha=coefficient)
                made.add(place)
            else:
                value = draw(task.step, task.number)
            values[place] = value
            for done in drop:
                if recycles and done in made:
                    spare.append(values[done])
                values[done] = x
        return values[-1]


@lru_cache(TABLES)
def write(levels: tuple[Level, ...], solver: Solver, renoise: Renoise, schedule: Schedule, target: Target) -> Table:
    """The table of a path along `levels` for a reader that says `target`."""
    writer = _Writer(solver, schedule, target)
    start = cast(Tensor, Form({START: 1.0}))
    end = walk(writer.denoise, start, levels, solver, schedule, renoise=renoise, draw=writer.draw, settle=writer.settle)
    return Table(_shortened(writer.tasks, writer.place(end)))


class _Writer:
    """Stands where network, noise and memory stand in the loop, and notes what each is asked."""

    def __init__(self, solver: Solver, schedule: Schedule, target: Target):
        self.frame, self.schedule, self.target = solver.frame, schedule, target
        self.tasks: list[Task] = []

    def note(self, task: Task, factor: float = 1.0) -> Tensor:
        """A value to be made, times a factor."""
        self.tasks.append(task)
        return cast(Tensor, Form({len(self.tasks): factor}))

    def place(self, value: Tensor) -> int:
        """Where a value stands by itself."""
        terms = tuple((place, number) for place, number in cast(Form, value).terms.items() if number != 0)
        if len(terms) == 1 and terms[0][1] == 1:
            return terms[0][0]
        self.note(Sum(terms))
        return len(self.tasks)

    def settle(self, value: Tensor) -> Tensor:
        """What outlives a step becomes one value, up to a factor, lest the sums grow with every step."""
        terms = cast(Form, value).terms
        largest = max(abs(coefficient) for coefficient in terms.values())
        real = {place: number for place, number in terms.items() if abs(number) > ROUNDING * largest}
        return cast(Tensor, Form(real if len(real) == 1 else {self.place(value): 1.0}))

    def denoise(self, x: Tensor, level: Level) -> Pair:
        """A call; what is kept of it is a reading in the solver's frame, so that what is remembered is one value."""
        place = self.place(x)
        at = cast(Tensor, Form({place: 1.0}))
        of = cast(Numbers, rows(self.schedule, self.target, level.t)[1])
        frame = of if self.frame is None else FRAMES[self.frame]
        if abs(float(determinant(level.row, frame))) < SMALLEST_DETERMINANT:
            frame = of
        told = cast(Tensor, Form({-1: 1.0}))  # stands for what will be said
        parts = cast(Form, mix(unmix(at, level.row, told, of), frame)).terms
        of_x, of_said = parts.get(place, 0.0), parts.get(-1, 0.0)
        if abs(of_x) < ROUNDING * abs(of_said):
            reading = self.note(Call(place, level.t, None), of_said)
        else:
            reading = self.note(Call(place, level.t, of_said / of_x), of_x)
        return unmix(at, level.row, reading, frame)

    def draw(self, step: int, number: int) -> Tensor:
        """Fresh noise."""
        return self.note(Fresh(step, number))


def _shortened(tasks: Sequence[Task], result: int) -> tuple[Line, ...]:
    """What is needed for the result, with new places, each line told what is not needed after it."""
    needed, kept = {result}, list[int]()
    for place in range(len(tasks), START, -1):
        if place in needed:
            kept.insert(0, place)
            needed.update(tasks[place - 1].uses())
    to = {START: START} | {old: new for new, old in enumerate(kept, 1)}
    moved = [tasks[old - 1].moved(to) for old in kept]
    last = {place: index for index, task in enumerate(moved) for place in task.uses()}
    return tuple(
        Line(task, tuple(place for place in dict.fromkeys(task.uses()) if last[place] == index and place != START))
        for index, task in enumerate(moved)
    )
