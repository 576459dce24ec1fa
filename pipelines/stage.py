"""One stage: a frozen config in, artifact folders in, one artifact folder with a manifest out.

`run` reads this stage's section of params.yaml, holds the stage's lock, opens one tracked run, lets `main`
write into a draft folder and publishes the draft by rename. An error leaves no half-written output; a
signal ends the stage and everything it started.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil
import yaml
from rich.console import Console

from diffusion_core import manifest
from diffusion_core.errors import ConfigError, InkwellError, IntegrityError, suggest
from diffusion_core.manifest import Manifest
from diffusion_core.spec import build, flatten, spec
from pipelines.leash import end_with_parent, orphaned
from pipelines.progress import Bar, follow
from pipelines.tracking import Tracker

PARAMS = Path("params.yaml")
STATE = Path(".inkwell")
LOCK = Path("dvc.lock")
DATA, VALIDATION = "artifacts/data", "artifacts/validation"
PLACES = ("cluster", "workers", "store", "store_gb", "source")  # of a source the bytes decide
GRACE = 4.0  # seconds an interrupted stage has to put its things away
C = TypeVar("C")


@dataclass
class Stage:
    """What `main` is given: where to read, where to write, whom to tell."""

    name: str
    out: Path
    work: Path
    tracker: Tracker
    console: Console
    parents: dict[str, str] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def input(self, folder: str, kind: str) -> tuple[Path, Manifest]:
        """Check an input folder against its manifest and remember it as a parent of what this stage makes."""
        path = Path(folder)
        found = manifest.verify(path, kind)
        self.parents[folder] = found.digest
        self.tracker.tags({f"input.{folder}": found.digest})
        return path, found

    def validated_data(self) -> tuple[Path, Manifest]:
        """The prepared pictures; raises IntegrityError unless it was these that passed validation."""
        folder, found = self.input(DATA, "data")
        _, passed = self.input(VALIDATION, "validation")
        if passed.parents.get(DATA) != found.digest:
            raise IntegrityError(f"{VALIDATION} is of another {DATA} than the one that is there; run validate again")
        return folder, found

    def say(self, text: str) -> None:
        """Print one line about this stage."""
        self.console.print(f"[bold]{self.name}[/bold]  {text}", highlight=False)

    def identity(self, config: object) -> str:
        """Digest of all that decides this stage's result: config, inputs and the core's code, not the cluster."""
        code = {path.as_posix(): manifest.hash_file(path) for path in sorted(Path("diffusion_core").rglob("*.py"))}
        return manifest.digest_of([self.name, decisive(config), self.parents, code])

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """A progress bar over `total` units."""
        with Bar(self.console, f"{self.name}: {label}", total) as bar:
            yield bar

    @contextmanager
    def following(self, label: str, total: int) -> Iterator[None]:
        """A progress bar over `total` images that follows the metrics in the journal, whoever writes them."""
        with self.bar(label, total) as bar, follow(bar, self.tracker.journal):
            yield


def run(name: str, config_type: type[C], main: Callable[[C, Stage], Mapping[str, Any]], *, out: str, kind: str) -> None:
    """Run one stage as a process: parse, lock, track, write, publish; ends the process with its exit code.

    `name` is the path of the stage's section in params.yaml ("train", "distill.progressive"), `out` the
    folder it publishes, `kind` the manifest's kind; `main` returns the manifest's `about`.
    Exit codes: 0 done, 1 a bug (with traceback), 2 refused input (one sentence), 130 or 143 ended by a signal.
    """
    console = Console(stderr=True, soft_wrap=True)
    end_with_parent()  # a killed `dvc repro` leaves no writer behind
    if orphaned():
        sys.exit(143)
    code = 130

    def interrupt(number: int, _frame: object) -> None:
        nonlocal code
        code = 128 + number
        last = threading.Timer(GRACE, _leave, [code])
        last.daemon = True
        last.start()
        raise KeyboardInterrupt  # what Ray lets through; of a SystemExit it would forget the code

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with holding(name):
            _run(name, config_type, main, Path(out), kind, console)
    except InkwellError as error:
        console.print(f"{name}: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print(f"{name}: interrupted; run the same command again to go on")
        sys.exit(code)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def decisive(config: object) -> dict[str, Any]:
    """What of a config decides the result, as plain data: not where the work is done, nor where its pictures lie."""
    return {key: value for key, value in spec(config).items() if key not in PLACES}


def _leave(code: int) -> None:
    """End this process and all it started, whatever they are at: whoever interrupted a stage does not wait for ever."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)


def _run(
    name: str,
    config_type: type[C],
    main: Callable[[C, Stage], Mapping[str, Any]],
    out: Path,
    kind: str,
    console: Console,
) -> None:
    config = build(config_type, section(name), f"{PARAMS}: {name}")
    draft = STATE / "drafts" / name
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    if LOCK.exists():
        shutil.copyfile(LOCK, STATE / LOCK.name)  # DVC writes over it in place; `make doctor` knows this copy
    tracker = Tracker.start(name, STATE, tags=_identity(), warn=lambda text: console.print(f"{name}: {text}"))
    stage = Stage(name, draft, Path("work") / name, tracker, console)
    status = "FAILED"
    try:
        tracker.params({key: str(value) for key, value in flatten(spec(config)).items()})
        about = main(config, stage)
        sealed = manifest.seal(
            draft,
            kind,
            about,
            config=manifest.digest_of(decisive(config)),
            parents=stage.parents,
            samples=stage.samples,
        )
        tracker.tags({"output": out.as_posix(), "output.digest": sealed.digest})
        manifest.publish(draft, out)
        _close(stage.work, sealed)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        tracker.close(status)


def _close(work: Path, sealed: Manifest) -> None:
    """Drop the checkpoints, which are for going on after an interruption, and leave word of what the run came to."""
    if work.exists():
        shutil.rmtree(work)
        work.mkdir()
        (work / "published").write_text(f"{sealed.digest}\n")


def section(name: str) -> object:
    """This stage's part of params.yaml; raises ConfigError if the file or the section is missing."""
    try:
        node = yaml.safe_load(PARAMS.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{PARAMS.resolve()} is missing; stages run at the root of the checkout") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{PARAMS} is not valid YAML: {error}") from error
    path = f"{PARAMS}:"
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            known = [str(key) for key in node] if isinstance(node, Mapping) else []
            raise ConfigError(f"{path} lacks '{part}'; {suggest(part, known)}")
        node, path = node[part], f"{path}{part}."
    return node


def choice(allowed: Iterable[str]) -> str:
    """The one word after `python -m pipelines.<stage>` that says which of several like stages this is."""
    words = sys.argv[1:]
    if len(words) != 1 or words[0] not in allowed:
        got = " ".join(words) or "nothing"
        print(f"{Path(sys.argv[0]).stem}: which one? got {got}; {suggest(got, allowed)}", file=sys.stderr)
        sys.exit(2)
    return words[0]


@contextmanager
def holding(name: str) -> Iterator[None]:
    """Hold this stage's lock, so that two writers of one folder cannot be; raises IntegrityError naming who has it."""
    path = STATE / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IntegrityError(f"another '{name}' is running ({_holder(file)}); wait for it or end it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return f"process {file.read().strip() or 'unknown'}"


def _identity() -> dict[str, str]:
    """What this run is of: the commit and the digests of dvc.lock and params.yaml, as tags."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    tags = {"git.commit": commit or "none", "params.digest": manifest.hash_file(PARAMS)}
    if LOCK.exists():
        tags["dvc.lock.digest"] = manifest.hash_file(LOCK)
    return tags | {"pipeline": manifest.digest_of([tags["git.commit"], tags["params.digest"]])}
