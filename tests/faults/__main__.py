"""Do the faults, all or those named, and rewrite docs/faults.md and its JSON twin: `python -m tests.faults F10 F11`.

With FULL=1 in the environment the counts are those of the contract, with SEED=7 the draws are those of 7. Files lie
in a temporary folder that is removed afterwards. Exit code 1 if an outcome is not the expected one.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from diffusion_core.errors import suggest
from tests import measured
from tests.faults import f10, f11, f12, f13, f16, f19, f20, f21, f27, f28
from tests.faults.figure import SkippedError
from tests.measured import Row

FAULTS = {
    module.__name__.rpartition(".")[2].upper(): module for module in (f10, f11, f12, f13, f16, f19, f20, f21, f27, f28)
}
PAGE, TWIN = measured.ROOT / "docs" / "faults.md", measured.ROOT / "docs" / "faults.json"
INTRO = """\
# Faults

Done on purpose, by real processes, files and signals; judged by what is there in the end: bytes, counts, exit codes.
`make faults` does all of them with the fewer counts and rewrites this page, `make faults FULL=1` with those of the
contract, `make faults F=F10` one. A figure that misses its bound is marked, and makes the command fail.

`make doctor` examines a checkout after a fault: it restores a torn or emptied `dvc.lock`, sweeps what killed processes
left, and names every published folder that differs from its manifest.

"""


@dataclass(frozen=True)
class Record(Row):
    """A figure of a fault, with what was done and what should come of it; `skipped` says why it was not done."""

    injection: str
    outcome: str
    seed: int
    skipped: str = ""


def main(names: list[str]) -> int:
    """The exit code: 1 if a figure misses its bound, 2 for a name that is unknown."""
    names = [name.upper() for name in names] or list(FAULTS)
    if unknown := [name for name in names if name not in FAULTS]:
        print(f"no fault is called {unknown[0]!r}; {suggest(unknown[0], FAULTS)}")
        return 2
    seed, full = int(os.environ.get("SEED") or 0), os.environ.get("FULL", "") not in ("", "0")
    records = [record for record in read() if fault_of(record) not in names]
    done = list[Record]()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for name in names:
            begun = time.monotonic()
            done += attempt(name, FAULTS[name], Path(folder).resolve() / name.lower(), seed, full)
            print(f"{name} took {time.monotonic() - begun:.0f} s", flush=True)
    records = sorted(records + done, key=lambda record: list(FAULTS).index(fault_of(record)))
    measured.write_rows(TWIN, records)
    PAGE.write_text(page(records))
    return int(not all(record.ok for record in done))


def attempt(name: str, module: ModuleType, place: Path, seed: int, full: bool) -> list[Record]:
    """Do one fault in a folder of its own; an error of its driver ends the command, since nothing was measured."""
    command = f"make faults F={name}{' FULL=1' if full else ''}{f' SEED={seed}' if seed else ''}"
    told = ("", measured.device(), measured.commit(), command, module.INJECTION, module.OUTCOME, seed)
    place.mkdir()
    try:
        figures = module.run(place, seed, full)
    except SkippedError as error:
        print(f"skipped {name}: {error}", flush=True)
        return [Record(f"{name}: {module.FAULT}", 0.0, "", "", True, *told, str(error))]
    records = []
    for figure, value, unit, bound in figures:
        ok = measured.holds(value, bound)
        records.append(Record(f"{name}: {figure}", float(f"{value:.4g}"), unit, bound, ok, *told))
        print(f"{'' if ok else 'MISSED '}{name}: {figure}: {value:.4g} {unit} (bound {bound})", flush=True)
    return records


def fault_of(record: Record) -> str:
    """The fault's name, F10 and the like."""
    return record.name.partition(":")[0]


def read() -> list[Record]:
    """Records of earlier runs; none if there are none yet."""
    return [Record(**one) for one in json.loads(TWIN.read_text())] if TWIN.exists() else []


def page(records: list[Record]) -> str:
    """One table, a row a figure."""
    lines = [
        "| | fault | injection | expected outcome | measured | bound | seed | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        name, _, figure = record.name.partition(": ")
        found = f"{figure}: {record.measured:g} {record.unit}{'' if record.ok else ' **missed**'}"
        cells = (
            *(name, FAULTS[name].FAULT, record.injection, record.outcome),
            *(
                f"skipped: {record.skipped}" if record.skipped else found,
                record.bound,
                record.seed,
                f"`{record.command}`",
            ),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    places = dict.fromkeys(f"{record.device}; commit {record.commit}" for record in records)
    return INTRO + "\n".join(lines) + f"\n\nMeasured on: {'; '.join(places)}.\n"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
