"""F12: small files that want much memory."""

import os
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests import measured
from tests.faults.figure import Figure, share
from tests.faults.pictures import PARAMS, folder, noise, refusals, taken
from tests.faults.stages import Place
from tests.made import chunk, hostiles, one_bit

FAULT = "decompression bombs"
INJECTION = (
    "PNGs of 9,000 to 40,000 px a side in few kB, texts and profiles that unpack to 64 MB, animations, in a source"
)
OUTCOME = "each is refused on its header or chunks; the stage's memory grows by less than 64 MB"
SIDES = (9_000, 12_000, 20_000, 30_000, 40_000)
PICTURES = 20
WATCHED = """
import atexit, runpy
from tests.measured import peak_memory
atexit.register(lambda: print(peak_memory()))
runpy.run_module("pipelines.prepare", run_name="__main__")
"""


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    plain = noise(PICTURES, seed)
    (place / "made/circle").mkdir(parents=True)
    made = {one.name.rpartition("/")[2]: one for one in hostiles(place / "made")}
    wanted = {f"side-{side}.png": ("too_large", one_bit(side, side)) for side in SIDES}
    wanted |= {
        name.removeprefix("hostile-"): (str(one.kind), one.data)
        for name, one in made.items()
        if one.data and one.kind in ("too_large", "animated") or "bomb" in name and one.data and one.kind
    }
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        wanted[f"{kind.decode()}.png"] = ("broken", with_chunk(plain[0], kind))
    here = Place(place / "here")
    source = folder(place / "plain", plain)
    ordinary = peak(here, PARAMS | {"source": source})
    assert taken(here) == PICTURES
    for name, (_, data) in wanted.items():
        (place / "plain" / name).write_bytes(data or b"")
    hostile = peak(here, PARAMS | {"source": source})
    found = dict(refusals(here))
    for name, (kind, _) in wanted.items():
        if found.get(name) != kind:
            print(f"  {name}: {found.get(name)}, expected {kind}", flush=True)
    return [
        share("bombs refused for what they are", [found.get(name) == kind for name, (kind, _) in wanted.items()]),
        Figure("pictures taken beside them", taken(here), "pictures", f">= {PICTURES}"),
        Figure("growth of the stage's peak memory", (hostile - ordinary) / 2**20, "MB", "<= 64"),
    ]


def with_chunk(png: bytes, kind: bytes) -> bytes:
    """A PNG with a text or a profile that unpacks to 64 MB."""
    head = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\x01\0\0\0", b"iCCP": b"k\0\0"}[kind]
    return png[:33] + chunk(kind, head + zlib.compress(bytes(1 << 26), 9)) + png[33:]


def peak(place: Place, params: Mapping[str, Any]) -> int:
    """The most memory, in bytes, that prepare had while it ran."""
    (place.folder / "params.yaml").write_text(yaml.safe_dump({"prepare": dict(params)}))
    env = os.environ | {"PYTHONPATH": str(measured.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WATCHED], cwd=place.folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)
