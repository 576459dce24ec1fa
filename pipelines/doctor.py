"""Doctor: what is wrong with this checkout, and the repair of all that needs no decision: `python -m pipelines.doctor`.

DVC writes dvc.lock and its own lock file in place, so a kill or a full disk can leave half of one, and then every
command of DVC fails. What an interrupted stage left is swept; a folder that differs from its manifest is named.
Exit codes: 0 nothing is wrong, or no longer; 1 something is left for a person; 2 this is no checkout.
"""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from diffusion_core import manifest
from diffusion_core.errors import IntegrityError
from pipelines.stage import LOCK, STATE, holding

STAGES = Path("dvc.yaml")
RWLOCK = Path(".dvc/tmp/rwlock")
PINS = Path("requirements.lock")
MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
PIN = re.compile(r"^([A-Za-z0-9][^ =;]*)==([^ ;\\]+)( ;)?", re.MULTILINE)


class Finding(NamedTuple):
    """What is wrong, and what was done about it or, if `left`, is to be done."""

    what: str
    remedy: str
    left: bool = False


class Lock(NamedTuple):
    """A dvc.lock: its bytes, its stages as far as they are whole, and what is wrong with it."""

    raw: bytes
    stages: dict[str, Any]
    defect: str


def main() -> int:
    """Examine, repair and tell; the exit code."""
    if not STAGES.exists():
        print(f"{STAGES.resolve()} is missing; the doctor examines the root of a checkout", file=sys.stderr)
        return 2
    left = found = 0
    for finding in (*dvc_holders(), *dvc_lock(), *drafts(), *folders(), *packages()):
        found, left = found + 1, left + finding.left
        print(f"{'LEFT ' if finding.left else 'fixed'}  {finding.what}\n       {finding.remedy}", flush=True)
    print(f"{found} found, {left} left" if found else "nothing is wrong")
    return int(left > 0)


def dvc_holders() -> Iterator[Finding]:
    """DVC's table of who reads and writes what: torn, or naming processes that are gone."""
    if not RWLOCK.exists():
        return
    written = RWLOCK.stat().st_mtime
    try:
        table = json.loads(RWLOCK.read_bytes())
        held = [*table.get("write", {}).values(), *(one for some in table.get("read", {}).values() for one in some)]
        holders = {int(one["pid"]) for one in held}
    except (ValueError, TypeError, KeyError, AttributeError):
        RWLOCK.unlink()
        yield Finding(f"{RWLOCK} cannot be read, so that no DVC command runs", "removed: it says who is at work")
        return
    if holders and not any(_since(holder, written) for holder in holders):
        RWLOCK.unlink()
        named = ", ".join(map(str, sorted(holders)))
        yield Finding(f"{RWLOCK} names processes that are gone ({named})", "removed")


def _since(pid: int, time: float) -> bool:
    """Whether a process with this number was there at that time and still is: numbers are given again."""
    try:
        return bool(psutil.Process(pid).create_time() <= time)
    except psutil.NoSuchProcess:
        return False


def dvc_lock() -> Iterator[Finding]:
    """dvc.lock emptied, torn or missing: put together from what is whole of it, the last stage's copy and git."""
    known = [lock for lock in map(read_lock, _copies()) if lock.stages and not lock.defect]
    if not known:
        return  # nobody has run anything yet
    now = read_lock(LOCK.read_bytes() if LOCK.exists() else b"")
    declared = yaml.safe_load(STAGES.read_bytes())["stages"]
    every = {name: entry for lock in known for name, entry in lock.stages.items()}
    wanted = {name: entry for name, entry in every.items() if name.partition("@")[0] in declared}
    defect = now.defect or _lacking(now.stages, wanted)
    if not defect:
        return
    kept = dict(now.stages)
    if kept and _half(last := list(kept)[-1], kept, wanted):
        del kept[last]
    whole = [
        lock.raw if kept == {name: lock.stages.get(name) for name in kept} else _merged(lock, kept) for lock in known
    ]
    manifest.write_atomic(LOCK, min(dict.fromkeys(whole), key=_changed) if len(set(whole)) > 1 else whole[0])
    yield Finding(f"{LOCK} {defect}", "restored; `dvc repro` runs only what differs")


def read_lock(raw: bytes) -> Lock:
    """A dvc.lock as far as it is whole."""
    if not raw.strip():
        return Lock(raw, {}, "is empty or missing")
    try:
        node = yaml.safe_load(raw)
        stages = node["stages"] or {}
        whole = {name: entry for name, entry in stages.items() if _is_whole(entry)}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
        return Lock(raw, {}, "is torn: no YAML of stages")
    if half := sorted(set(stages) - set(whole)):
        return Lock(raw, whole, f"is torn: it has half of stage {half[0]}")
    if raw.endswith(b"\n"):
        return Lock(raw, whole, "")
    return Lock(raw, dict(list(whole.items())[:-1]), "is torn: its last line has no end")


def _is_whole(entry: object) -> bool:
    if not isinstance(entry, Mapping) or not entry.get("cmd"):
        return False
    files: list[Any] = [one for part in ("deps", "outs") for one in entry.get(part) or [None]]
    return all(isinstance(one, Mapping) and "path" in one and MD5.fullmatch(str(one.get("md5"))) for one in files)


def _copies() -> Iterator[bytes]:
    """What the last stage kept when it began, and what git has."""
    if (kept := STATE / LOCK.name).exists():
        yield kept.read_bytes()
    asked = ["git", "show", f"HEAD:./{LOCK}"]
    yield subprocess.run(asked, capture_output=True, check=False).stdout


def _lacking(stages: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What a lock cut off between two lines lacks."""
    if gone := [name for name in wanted if name not in stages]:
        return f"is torn: it lacks stage {gone[0]}"
    last = list(stages)[-1]
    return f"is torn: it has half of stage {last}" if _half(last, stages, wanted) else ""


def _half(name: str, stages: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a stage lacks files that the same command had."""
    if name not in wanted or stages[name]["cmd"] != wanted[name]["cmd"]:
        return False
    ours, theirs = (
        {(part, one["path"]) for part in ("deps", "outs") for one in entry.get(part, ())}
        for entry in (stages[name], wanted[name])
    )
    return bool(theirs - ours) or ("params" in wanted[name] and "params" not in stages[name])


def _merged(lock: Lock, stages: Mapping[str, Any]) -> bytes:
    node = yaml.safe_load(lock.raw)
    node["stages"] |= stages
    return yaml.safe_dump(node, sort_keys=False, allow_unicode=True).encode()


def _changed(raw: bytes) -> float:
    """How many stages DVC would run again with this lock."""
    manifest.write_atomic(LOCK, raw)
    asked = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return len(json.loads(done.stdout)) if done.returncode == 0 else float("inf")


def drafts() -> Iterator[Finding]:
    """Half-written outputs of stages that were killed."""
    for draft in sorted((STATE / "drafts").glob("*")):
        try:
            with holding(draft.name):
                shutil.rmtree(draft)
        except IntegrityError:
            continue  # its stage is at work
        yield Finding(f"{draft} was left by a stage that was killed", "removed; the stage begins anew")


def folders() -> Iterator[Finding]:
    """Published folders whose bytes are not what their manifests say."""
    for path in sorted(Path("artifacts").rglob(manifest.NAME)):
        try:
            manifest.verify(path.parent)
        except IntegrityError as error:
            remedy = f"`dvc checkout --force {path.parent}` brings it back; if it cannot, remove it and run `dvc repro`"
            yield Finding(str(error), remedy, left=True)


def packages() -> Iterator[Finding]:
    """Packages that are not of the version the lock says."""
    wrong = []
    for name, version, marker in PIN.findall(PINS.read_text()) if PINS.exists() else ():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = version if marker else "missing"  # with a marker, it may be for other machines
        if found != version:
            wrong.append(f"{name} is {found}, locked is {version}")
    if wrong:
        yield Finding("; ".join(wrong), "remove .venv; the next `make` command makes it anew", left=True)


if __name__ == "__main__":
    sys.exit(main())
