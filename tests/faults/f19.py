"""F19: DVC interrupted at any time in any stage."""

import random
import signal
import time
from pathlib import Path

from tests.faults.checkout import FIRST, TOO_LONG, Checkout, send
from tests.faults.figure import Figure, share

FAULT = "dvc repro interrupted by INT, TERM or KILL"
INJECTION = f"a signal at a random time in each of {', '.join(FIRST)}: INT to the group, TERM and KILL to DVC alone"
OUTCOME = "no process is left 5 s later; the same command run again completes; outputs as of an undisturbed run"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
GRACE = 5.0  # seconds


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    checkout, drawn = Checkout.made(place), random.Random(seed)
    undisturbed, seconds = checkout.digests(), {}
    orphans, completed, same = [], [], []
    cases = [(stage, number) for stage in FIRST for number in SIGNALS] * 2 if full else drawn_few(drawn)
    for stage, number in cases:
        if stage not in seconds:
            begun = time.monotonic()
            checkout.repro("--force", "--single-item", stage)
            seconds[stage] = time.monotonic() - begun
        running = checkout.start("dvc", "repro", "--force", "--single-item", stage)
        moment = drawn.uniform(0, seconds[stage])
        time.sleep(moment)
        send(running, number)
        left = checkout.gone_within(GRACE)
        running.communicate(timeout=TOO_LONG)
        # The run cache is not asked: what was interrupted has to run again.
        code, said = checkout.finish("dvc", "repro", "--no-run-cache", *FIRST)
        orphans.append(len(left))
        completed.append(code == 0)
        same.append(checkout.digests() == undisturbed)
        if left or code or not same[-1]:
            print(f"  {stage}, {number.name} after {moment:.1f} s: left {left}, code {code}: {said[-500:]}", flush=True)
    return [
        Figure(f"processes left after {GRACE:.0f} s, {len(cases)} signals", sum(orphans), "processes", "<= 0"),
        share("reruns that completed", completed),
        share("outputs equal to the undisturbed run's", same),
    ]


def drawn_few(drawn: random.Random) -> list[tuple[str, signal.Signals]]:
    """Each signal once, in different stages."""
    return list(zip(drawn.sample(FIRST, len(SIGNALS)), SIGNALS, strict=True))
