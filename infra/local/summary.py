"""The last table of `make demo`: every figure this project promises, as measured, beside its bound.

    python -m infra.local.summary

Exit codes: 0 every figure is inside its bound, 1 one is not, 2 a file it reads is missing or unreadable.
"""

import json
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diffusion_core.errors import InkwellError, IntegrityError

MODELS = ("teacher", "progressive", "consistency")
TIMES = Path(".inkwell/demo.times")  # lines "name seconds-since-1970", written by the Makefile
HOLDS: Mapping[str, Callable[[float, float], bool]] = {"≤": operator.le, "≥": operator.ge}

NEXT = """\
[bold]Pictures[/bold]    artifacts/evaluation/{champion}/grid.png, artifacts/deployment/grid.png
[bold]Data Docs[/bold]   artifacts/data_docs/index.html
[bold]Numbers[/bold]     .venv/bin/dvc metrics show, .venv/bin/dvc plots show, artifacts/registration/decision.json

[bold]What next[/bold]
  make up      starts MLflow, Ray and the endpoint, and prints their addresses. Then ask for a seven:
               curl -s localhost:8000/v1/images/generations -H 'Content-Type: application/json' \\
                 -d '{{"prompt": "7", "seed": 1}}' | sed 's/.*"b64_json":"\\([^"]*\\)".*/\\1/' | base64 -d > seven.png
  make down    stops them
  make test    lint, types and tests"""


@dataclass(frozen=True)
class Figure:
    """One number; without a bound it is told, not judged."""

    name: str
    value: float
    unit: str = ""
    relation: str = "≤"
    bound: float | None = None

    @property
    def ok(self) -> bool:
        return self.bound is None or HOLDS[self.relation](self.value, self.bound)

    def row(self) -> tuple[str, str, str, str]:
        """Name, measured, bound and verdict as the table shows them."""
        bound = "" if self.bound is None else f"{self.relation} {written(self.bound, self.unit)}"
        verdict = "" if self.bound is None else "[green]yes[/green]" if self.ok else "[bold red]NO[/bold red]"
        return self.name, written(self.value, self.unit), bound, verdict


def main() -> int:
    """Print the table and what to do next; returns the exit code."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        metrics = {model: read(Path(f"artifacts/evaluation/{model}/metrics.json")) for model in MODELS}
        decision = read(Path("artifacts/registration/decision.json"))
        smoke = read(Path("artifacts/deployment/smoke.json"))
        champion = champion_of(decision)
        figures = [*durations(TIMES), *qualities(metrics, champion), *services(smoke)]
    except InkwellError as error:
        console.print(f"[red]summary: {error}[/red]")
        return 2
    table = Table(title=f"Inkwell, {metrics['teacher']['metric']}", title_justify="left", box=None, pad_edge=False)
    table.add_column("figure")
    for column in ("measured", "bound", "ok"):
        table.add_column(column, justify="right")
    for figure in figures:
        table.add_row(*figure.row())
    missed = [figure.name for figure in figures if not figure.ok]
    judged = sum(figure.bound is not None for figure in figures)
    console.print()
    console.print(table)
    console.print(f"\nU is the distance between two halves of the real training pictures: {unit_of(metrics)}")
    console.print(NEXT.format(champion=champion))
    told = f"[bold red]missed: {', '.join(missed)}[/bold red]" if missed else "[green]all inside their bounds[/green]"
    console.print(f"\n{judged - len(missed)} of {judged} figures hold; {told}")
    return 1 if missed else 0


def durations(path: Path) -> Iterator[Figure]:
    """How long `make demo` and the pipeline in it took; nothing if the pipeline was run by hand."""
    if not path.exists():
        return
    try:
        times = {name: float(at) for name, at in (line.split() for line in path.read_text().splitlines())}
        ended = times["repro_ended"]
        yield Figure("make demo, from clone to here", ended - times["demo_started"], "s", "≤", 960)
        yield Figure("of it in dvc repro", ended - times["repro_started"], "s", "≤", 720)
    except (KeyError, ValueError) as error:
        raise IntegrityError(f"{path} is incomplete ({error}); `make demo` writes it") from None


def qualities(metrics: Mapping[str, Any], champion: str) -> Iterator[Figure]:
    """Distances in U and the champion's accuracy; raises IntegrityError if a number of calls was not measured."""

    def at(model: str, calls: int, field: str = "distance_u") -> float:
        try:
            return float(metrics[model]["by_calls"][str(calls)][field])
        except KeyError as error:
            path = f"artifacts/evaluation/{model}/metrics.json"
            raise IntegrityError(f"{path} has no {field} at {calls} calls: {error} is missing") from None

    teacher = {calls: at("teacher", calls) for calls in (1, 2, 4, 50)}
    student = {calls: at("consistency", calls) for calls in (1, 2)}
    progressive = at("progressive", 4)
    yield Figure("teacher, 50 calls", teacher[50], "U", "≤", 0.6)
    yield Figure("progressive student, 4 calls", progressive, "U", "≤", 0.8)
    yield Figure("  progressive against the teacher's own best, 4 calls", progressive, "U", "≤", teacher[4])
    yield Figure("consistency student, 2 calls", student[2], "U", "≤", 0.8)
    yield Figure("  consistency against the teacher's own best, 2 calls", teacher[2] / student[2], "x", "≥", 2)
    yield Figure("consistency student, 1 call", student[1], "U", "≤", 1.2)
    yield Figure("  consistency against the teacher's own best, 1 call", teacher[1] / student[1], "x", "≥", 5)
    yield Figure(f"accuracy of the champion ({champion})", 100 * metrics[champion]["accuracy"], "%", "≥", 95)
    for model, calls in (("teacher", 50), ("progressive", 4), ("consistency", 2), ("consistency", 1)):
        name = f"{model} to the held-out pictures, {calls} call{'s'[: calls > 1]}"
        yield Figure(name, at(model, calls, "distance_val_u"), "U")


def services(smoke: Mapping[str, Any]) -> Iterator[Figure]:
    """What the deployed endpoint did."""
    if "p50_ms" not in smoke:
        raise IntegrityError("artifacts/deployment/smoke.json lacks p50_ms")
    yield Figure("one picture from the warm endpoint, p50", float(smoke["p50_ms"]), "ms", "≤", 150)


def champion_of(decision: Mapping[str, Any]) -> str:
    """The name of the model that is champion; of the chosen one if an earlier run's version stayed champion."""
    try:
        names = [name for name, version in decision["versions"].items() if version == decision["champion"]]
        return str(names[0] if names else decision["chosen"])
    except KeyError as error:
        raise IntegrityError(f"artifacts/registration/decision.json lacks {error}") from None


def unit_of(metrics: Mapping[str, Any]) -> str:
    """The unit of distance, in the metric's own numbers."""
    return f"1 U = {metrics['teacher']['unit']:.4g}"


def read(path: Path) -> dict[str, Any]:
    """A JSON file of a stage; raises IntegrityError naming it if it is missing or torn."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing; `make demo` or `dvc repro` makes it") from None
    except ValueError as error:
        raise IntegrityError(f"{path} cannot be read ({error})") from None
    return content


def written(value: float, unit: str) -> str:
    """A number as the table shows it: as many digits as its unit deserves."""
    digits = {"s": 0, "ms": 0, "%": 1, "x": 1, "U": 2}[unit]
    return f"{value:.{digits}f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
