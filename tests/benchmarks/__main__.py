"""Run the benchmarks, all or those named, and rewrite docs/benchmarks.md and its JSON twin from the measured rows."""

import os
import sys
from pathlib import Path

from diffusion_core.errors import suggest
from tests import measured
from tests.benchmarks import caching, guidance, lean, preparing, reading, sampling, training, vae

SUITES = {
    "preparing": preparing.figures,
    "reading": reading.figures,
    "vae": vae.figures,
    "caching": caching.figures,
    "sampling": sampling.figures,
    "guidance": guidance.figures,
    "training": training.figures,
    "lean": lean.figures,
}
PAGE, TWIN = measured.ROOT / "docs" / "benchmarks.md", measured.ROOT / "docs" / "benchmarks.json"
INTRO = """\
# Benchmarks

Measured beside the peer packages in one process: variants take turns, the clock is one thread's CPU time, and a ratio
is the median over rounds of the ratio within a round. `make bench` runs all of it and rewrites this page;
`make bench B=sampling` one part. A row with a bound that is not met is marked, and makes the command fail.
"""


def main(names: list[str]) -> int:
    """The exit code: 1 if a figure misses its bound, 2 for a name that is unknown."""
    if unknown := [name for name in names if name not in SUITES]:
        print(f"no benchmark is called {unknown[0]!r}; {suggest(unknown[0], SUITES)}")
        return 2
    names = names or list(SUITES)
    kept = {row.name: row for row in measured.read_rows(TWIN)}
    commit, device, failed = measured.commit(), measured.device(), False
    for suite in names:
        command = f"make bench B={suite}"
        kept = {name: row for name, row in kept.items() if row.command != command}
        for name, value, unit, bound, peer in SUITES[suite]():
            ok = measured.holds(value, bound)
            kept[name] = measured.Row(name, float(f"{value:.4g}"), unit, bound, ok, peer, device, commit, command)
            failed |= not ok
            print(f"{'' if ok else 'MISSED '}{name}: {value:.4g} {unit} {bound and f'(bound {bound})'}", flush=True)
    order = [f"make bench B={suite}" for suite in SUITES]
    rows = sorted(kept.values(), key=lambda row: order.index(row.command))
    measured.write_rows(TWIN, rows)
    write_page(PAGE, rows)
    return int(failed)


def write_page(path: Path, rows: list[measured.Row]) -> None:
    """One table a suite."""
    parts = [INTRO]
    for command in dict.fromkeys(row.command for row in rows):
        some = [row for row in rows if row.command == command]
        parts.append(f"\n## {command.rpartition('=')[2]}\n\n{some[0].device}; commit {some[0].commit}; `{command}`\n")
        parts.append("| figure | measured | bound | peer |\n|---|---|---|---|")
        for row in some:
            missed = "" if row.ok else " **missed**"
            parts.append(f"| {row.name} | {row.measured:.3g} {row.unit}{missed} | {row.bound} | {row.peer} |")
    path.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
