"""F13: tars that are empty, missing, in disorder, odd or forged."""

import gzip
import random
import tarfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import create_autospec

from rich.console import Console

from diffusion_core import manifest
from diffusion_core.errors import DataError
from diffusion_core.spec import build
from pipelines import prepare
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from tests.faults.figure import Figure, share
from tests.faults.pictures import PARAMS, kinds, noise, taken, tar
from tests.faults.stages import Place
from tests.pipelines.test_tar import END, header, member, pax

FAULT = "30 hostile or odd tars"
INJECTION = "beside a plain tar of 3 pictures one that is empty, missing, in disorder, odd or forged, as a source"
OUTCOME = (
    "each has its named outcome: its pictures are taken, its samples or all of it quarantined, or the stage refuses"
)
GOOD = 3
REFUSED = None


class Case(NamedTuple):
    """A tar's bytes, or None for none, and what comes of it: pictures taken and refusals by kind, or REFUSED."""

    data: bytes | None
    outcome: tuple[int, dict[str, int]] | None


def cases(seed: int) -> dict[str, Case]:
    """Every case by its name."""
    first, second, third = noise(3, seed + 1)
    one = member("a.png", first)
    lost: tuple[int, dict[str, int]] = (0, {"unreadable": 1})
    bad: tuple[int, dict[str, int]] = (0, {"bad_member": 1})
    long_name = "d" * 90 + "/" + "n" * 120
    made = {
        "missing": Case(None, REFUSED),
        "an empty file": Case(b"", lost),
        "no member": Case(END, (0, {})),
        "gzip": Case(gzip.compress(one + END), lost),
        "no tar": Case(b"plain text ".ljust(1024, b"."), lost),
        "no end mark": Case(one, lost),
        "cut in a payload": Case(one[:1024], lost),
        "wrong checksum": Case(one + header("b.png", sum=b"000777\0 ") + END, lost),
        "a symbolic link": Case(header("b.png", kind=b"2", link=b"/etc/x".ljust(100, b"\0")) + END, lost),
        "a hard link": Case(one + header("b.png", kind=b"1", link=b"a.png".ljust(100, b"\0")) + END, lost),
        "a device": Case(header("b.png", kind=b"3") + END, lost),
        "a sparse file": Case(header("b.png", kind=b"S") + END, lost),
        "an absolute name": Case(member("/etc/a.png", first) + END, lost),
        "a name upwards": Case(member("b/../../a.png", first) + END, lost),
        "a name not UTF-8": Case(member(b"\xff\xfe.png", first) + END, lost),
        "10 GB claimed": Case(header("b.png", size=b"\x80" + (10 << 30).to_bytes(11)) + END, lost),
        "a size below zero": Case(header("b.png", size=b"\xff" * 12) + END, lost),
        "a broken pax header": Case(member("pax", b"99 path=b.png\n", b"x") + one + END, lost),
        "a name twice": Case(tar([("a.png", first), ("a.png", second)]), lost),
        "pax names": Case(tar([(f"{long_name}é.png", first)], tarfile.PAX_FORMAT), (1, {})),
        "GNU long names": Case(tar([(f"{long_name}.png", first)], tarfile.GNU_FORMAT), (1, {})),
        "a pax size": Case(pax(("size", str(len(first)))) + member("a.png", first) + END, (1, {})),
        "upper case": Case(tar([("A.PNG", first), ("B.Png", second)]), (2, {})),
        "one stem in two folders": Case(tar([("x/a.png", first), ("y/a.png", second)]), (2, {})),
        "members in another order": Case(
            tar([("b.txt", b"b"), ("b.png", first), ("a.png", second), ("a.txt", b"a")]), (2, {})
        ),
        "a key without its picture": Case(tar([("a.json", b"{}"), ("b.png", first)]), (1, {"bad_member": 1})),
        "one picture twice": Case(tar([("a.png", first), ("b.png", first), ("c.png", third)]), (2, {"duplicate": 1})),
        "two pictures of one key": Case(tar([("a.png", first), ("a.jpg", second)]), bad),
        "a planted pickle": Case(tar([("a.png", first), ("a.pyd", b"cos\nsystem\n(S'touch ran'\ntR.")]), bad),
        "torn JSON": Case(tar([("a.json", b'{"label": '), ("a.png", first)]), bad),
    }
    assert len(made) == 30
    return made


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    good, drawn = tar([(f"{number}.png", data) for number, data in enumerate(noise(GOOD, seed))]), random.Random(seed)
    every = cases(seed)
    real = set(every) if full else {"missing", *drawn.sample(sorted(every), 5)}
    as_named = []
    for number, (name, (data, wanted)) in enumerate(every.items()):
        here, tars = Place(place / f"case-{number}"), place / f"tars-{number}"
        tars.mkdir()
        (tars / "good.tar").write_bytes(good)
        if data is not None:
            (tars / "hostile.tar").write_bytes(data)
        source = {"kind": "tars", "paths": [f"{tars}/good.tar", f"{tars}/hostile.tar"]}
        done = (as_process if name in real else in_process)(here, PARAMS | {"source": source})
        found = (taken(here) - GOOD, dict(kinds(here))) if done else REFUSED
        as_named.append(found == wanted and not (here.folder / "ran").exists())
        if not as_named[-1]:
            print(f"  {name}: {found}, expected {wanted}", flush=True)
    return [
        share("tars with the outcome that is named for them", as_named),
        Figure("of these through the stage as a process", len(real), "tars", ">= 6"),
    ]


def as_process(here: Place, params: dict[str, object]) -> bool:
    """Whether the stage published; a refusal has to leave nothing."""
    ran = here.run("prepare", params)
    assert ran.returncode in (0, 2), ran.stderr[-3000:]
    assert here.data.exists() == (ran.returncode == 0)
    return ran.returncode == 0


def in_process(here: Place, params: dict[str, object]) -> bool:
    """The same without the seconds of a start."""
    here.data.mkdir(parents=True)
    stage = Stage("prepare", here.data, here.folder, create_autospec(Tracker, instance=True), Console(quiet=True))
    try:
        about = prepare.main(build(prepare.Config, params, "prepare"), stage)
    except DataError:
        return False
    manifest.seal(here.data, "data", about)
    return True
