"""F27: a shard that changes while a job reads it."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests import measured
from tests.faults.figure import Figure, share
from tests.faults.pictures import PARAMS, flipped, folder, noise
from tests.faults.stages import Place

FAULT = "data changed under a running job"
INJECTION = "a shard replaced in the middle of an epoch: in place, by rename, by a shorter one, or removed"
OUTCOME = "the reading process ends at its next batch from there; no changed picture is handed out"
REFUSED = 3  # the exit code of tests.faults.reading
SOON = 30.0  # seconds


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    here, drawn = Place(place / "here"), random.Random(seed)
    here.done("prepare", PARAMS | {"source": folder(place / "pictures", noise(60, seed))})
    stopped, seconds = [], []
    for _ in range(5 if full else 1):
        for way in ("in place", "by rename", "shorter", "removed"):
            code, took = read_while(here, way, drawn)
            stopped.append(code == REFUSED)
            seconds.append(took)
            if code != REFUSED:
                print(f"  {way}: exit code {code} after {took:.1f} s", flush=True)
    return [
        share("changes that stopped the reader, none read", stopped),
        Figure("slowest until it ended", max(seconds), "s", f"<= {SOON:g}"),
    ]


def read_while(here: Place, way: str, drawn: random.Random) -> tuple[int, float]:
    """Change a shard while a process reads; its exit code and the seconds it went on. The shard is put back."""
    shard = drawn.choice(sorted(here.data.glob("*.tar")))
    whole, sign = shard.read_bytes(), here.folder / "reading"
    sign.unlink(missing_ok=True)
    env = os.environ | {"PYTHONPATH": str(measured.ROOT), "OMP_NUM_THREADS": "1"}
    reader = subprocess.Popen([sys.executable, "-m", "tests.faults.reading", here.data], cwd=here.folder, env=env)
    try:
        while not sign.exists():
            assert reader.poll() is None, f"the reader ended with {reader.returncode} before anything was changed"
            time.sleep(0.02)
        time.sleep(drawn.uniform(0, 0.2))
        change(shard, whole, way, drawn)
        begun = time.monotonic()
        try:
            code = reader.wait(SOON)
        except subprocess.TimeoutExpired:
            code = -1
        return code, time.monotonic() - begun
    finally:
        reader.kill()
        reader.wait()
        shard.write_bytes(whole)


def change(shard: Path, whole: bytes, way: str, drawn: random.Random) -> None:
    """Replace a shard in one of four ways."""
    other = flipped(whole, drawn.randrange(len(whole)))
    if way == "in place":
        with shard.open("r+b") as file:
            file.write(other)
    elif way == "by rename":
        beside = shard.with_name(f".{shard.name}")
        beside.write_bytes(other)
        beside.replace(shard)
    elif way == "shorter":
        beside = shard.with_name(f".{shard.name}")
        beside.write_bytes(whole[: drawn.randrange(len(whole))])
        beside.replace(shard)
    else:
        shard.unlink()
