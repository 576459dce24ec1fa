"""Make `.venv` as requirements.lock says, step by step: `python3 -I infra/local/bootstrap.py`, standard library only.

The lock comes first: exact versions, each file checked against its SHA-256, no dependency left to choose. torch
comes second and by version alone, because its build differs by machine: pip takes the CPU build where one is
offered and the CUDA build, with the CUDA packages it asks for, elsewhere. Running it again does nothing while the
lock, this interpreter and the place of the checkout stay the same.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
STAMP = VENV / ".stamp"
LOG = VENV / "install.log"
SHOW_EVERY = 10.0  # seconds between two lines where there is no terminal to redraw
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
INSTALL = (*PIP, "install", "--progress-bar=off", "--no-compile")  # bytecode is the last step, on all cores


class FailedError(Exception):
    """A step that did not succeed; its text is for the reader."""


class Meter:
    """One line that says how far a step is: redrawn in a terminal, repeated every ten seconds elsewhere."""

    def __init__(self, label: str):
        self.label = label
        self.begun = self.shown = time.monotonic()
        self.live = sys.stdout.isatty()
        self.tell("")

    def tell(self, note: str) -> None:
        now = time.monotonic()
        if self.live:
            print(f"\r\033[K  {self.label} {note} {now - self.begun:.0f} s", end="", flush=True)
        elif now - self.shown >= SHOW_EVERY:
            self.shown = now
            print(f"  {self.label} {note} {now - self.begun:.0f} s", flush=True)

    def done(self) -> None:
        start = "\r\033[K" if self.live else ""
        print(f"{start}  {self.label} done in {time.monotonic() - self.begun:.0f} s", flush=True)


def main() -> int:
    """Make or keep `.venv`; returns the exit code."""
    if STAMP.exists() and STAMP.read_text() == identity():
        STAMP.touch()
        return 0
    begun = time.monotonic()
    print(f"Making .venv with Python {sys.version.split()[0]} from {LOCK.name}: once, about two minutes")
    try:
        make()
    except FailedError as error:
        print(f"\n{error}\nThe full output is in {LOG.relative_to(ROOT)}; run the same command again to retry.")
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; run the same command again to start over.")
        return 130
    print(f"  .venv is ready after {time.monotonic() - begun:.0f} s")
    return 0


def identity() -> str:
    """What the environment was made of: any difference asks for a new one."""
    parts = (LOCK.read_bytes(), torch_pin().encode(), sys.version.encode(), str(ROOT).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest() + "\n"


def torch_pin() -> str:
    """The requirement on torch, exactly as pyproject.toml states it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = [name for name in project["dependencies"] if re.match(r"torch\b", name)]
    return str(pin)


def make() -> None:
    """All steps; raises FailedError with the reason of the first that fails."""
    python = str(VENV / "bin" / "python")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    step("1/5 environment    ", [sys.executable, "-m", "venv", str(VENV)])
    total = len(re.findall(r"^[A-Za-z0-9][^\s=]*==", LOCK.read_text(), re.MULTILINE))
    step(f"2/5 {total} packages   ", [python, *INSTALL, "--require-hashes", "--no-deps", "-r", str(LOCK)], total)
    step("3/5 torch          ", [python, *INSTALL, torch_pin()])
    step("4/5 check          ", [python, *PIP, "check"])
    # Without bytecode every process of every stage would compile torch and Ray anew on systems that do not let Python
    # write it. Some packages carry files for a newer Python, so this step's exit code says nothing.
    compile_all = [python, "-m", "compileall", "-qq", "-j", "0", "-x", r"[\\/]tests?[\\/]", str(VENV / "lib")]
    step("5/5 bytecode       ", compile_all, must_succeed=False)
    # Ray's workers start in folders of their own; this line lets every Python of .venv import the checkout from
    # anywhere, without a build.
    (site_packages() / "inkwell.pth").write_text(f"{ROOT}\n")
    STAMP.write_text(identity())


def step(label: str, command: list[str], total: int = 0, *, must_succeed: bool = True) -> None:
    """Run one command, its output into the log, and show its progress; `total` counts pip's packages."""
    meter, lines = Meter(label), 0
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        began_at = log.tell()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment())
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if total:
                    lines = counted(began_at)
                    installed = len(list(site_packages().glob("*.dist-info"))) if lines >= total else 0
                    meter.tell(f"{installed} of {total} installed" if installed > 2 else f"{lines} of {total} fetched")
                else:
                    meter.tell("")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode and must_succeed:
        raise FailedError(f"{label.strip()} failed with exit code {process.returncode}:\n{reason(began_at)}")
    meter.done()


def environment() -> dict[str, str]:
    """The caller's environment, less what would make pip or Python look outside `.venv`; output comes line by line."""
    astray = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"}
    return {name: value for name, value in os.environ.items() if name not in astray} | {"PYTHONUNBUFFERED": "1"}


def site_packages() -> Path:
    """Where `.venv` keeps its packages."""
    return VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def output(began_at: int) -> list[str]:
    """The lines written to the log since a position, without pip's warnings."""
    with LOG.open(errors="replace") as log:
        log.seek(began_at)
        return [line.rstrip() for line in log if not line.lstrip().startswith("WARNING")]


def counted(began_at: int) -> int:
    """How many packages pip has taken up or, by their marker, left out."""
    return sum(line.startswith(("Collecting ", "Processing ", "Ignoring ")) for line in output(began_at))


def reason(began_at: int) -> str:
    """What pip says went wrong, or its last lines."""
    lines = output(began_at)
    errors = [i for i, line in enumerate(lines) if "error" in line.lower()]
    return "\n".join(lines[max(errors[0] - 2, 0) :] if errors else lines[-10:])


if __name__ == "__main__":
    sys.exit(main())
