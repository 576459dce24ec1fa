"""F20: dvc.lock torn or emptied."""

import random
from pathlib import Path

from tests.faults.checkout import FIRST, Checkout
from tests.faults.figure import Figure, share

FAULT = "dvc.lock torn or emptied"
INJECTION = "emptied, deleted, cut at random bytes and between lines, and cut while it was newer than git's"
OUTCOME = "one `make doctor` restores it; no unchanged stage is run again"
CHANGED = "train_vae"  # the stage up to which the pipeline is run again


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    checkout, drawn = Checkout.made(place), random.Random(seed)
    lock = checkout.folder / "dvc.lock"
    whole = lock.read_bytes()
    lines = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")][:-1]
    cuts = [0, *drawn.sample(range(1, len(whole)), 30 if full else 3), *drawn.sample(lines, 20 if full else 2)]
    unchanged = checkout.changed()
    assert not unchanged & set(FIRST), unchanged
    restored = []
    for cut in [None, *cuts]:
        lock.unlink() if cut is None else lock.write_bytes(whole[:cut])
        code, said = checkout.finish("pipelines.doctor")
        restored.append(code == 0 and checkout.changed() == unchanged)
        if not restored[-1]:
            print(f"  cut at {cut}: doctor gave {code}: {said[-500:]}", flush=True)
            lock.write_bytes(whole)
    return [share("recovered by one command", restored), *newer(checkout, drawn)]


def newer(checkout: Checkout, drawn: random.Random) -> list[Figure]:
    """A lock that git does not have, torn by the write after the last stage: what ran before must not run again."""
    params, lock = checkout.folder / "params.yaml", checkout.folder / "dvc.lock"
    params.write_text(params.read_text().replace("val_share: 0.2", "val_share: 0.3"))
    checkout.repro(CHANGED)
    before = checkout.changed()
    lock.write_bytes(lock.read_bytes()[: drawn.randrange(1, lock.stat().st_size)])
    code, said = checkout.finish("pipelines.doctor")
    again = checkout.changed() - before if code == 0 else set(FIRST)
    if again - {CHANGED}:
        print(f"  uncommitted lock: {again} would run again: {said[-500:]}", flush=True)
    return [Figure("finished stages to be run again, lock newer than git's", len(again - {CHANGED}), "stages", "<= 0")]
