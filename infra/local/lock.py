"""Write requirements.lock: one version of everything for every supported Python and system, with all its hashes.

    python -m infra.local.lock

Versions already in the lock stay unless pyproject.toml asks for others; delete the file first to take the newest.
torch is left out, with the CUDA packages it brings on some systems: its build differs by machine, so bootstrap.py
installs it by version. What torch needs besides is pure Python, and is locked like the rest.
"""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
OLDEST_PYTHON = "3.11"
BY_MACHINE = ("torch", "nvidia", "cuda", "triton")  # what a machine's torch build decides
HEADER = """\
# Every package Inkwell and its tests need, for Python 3.11 and newer on Linux and macOS, with the SHA-256 of each
# of its files. Written by `make lock`. torch is not here: its build differs by machine (infra/local/bootstrap.py).
"""


def main() -> int:
    """Resolve, check and write; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        excluded, wanted, made = (Path(folder, name) for name in ("excluded.txt", "torch.in", "requirements.lock"))
        excluded.write_text("torch\n")
        wanted.write_text("\n".join(needs_of_torch()) + "\n")
        if LOCK.exists():
            made.write_text(LOCK.read_text())
        resolve = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", str(wanted), "--extra", "test"]
        resolve += ["--universal", "--python-version", OLDEST_PYTHON, "--fork-strategy", "fewest", "--generate-hashes"]
        resolve += ["--excludes", str(excluded), "--no-header", "--no-annotate", "--quiet", "--output-file", str(made)]
        if code := subprocess.run(resolve, cwd=ROOT, check=False).returncode:
            return code
        text = made.read_text()
    if found := re.findall(rf"^(?:{'|'.join(BY_MACHINE)})\b.*|^.*(?:://|--index|--find).*", text, re.MULTILINE):
        print(f"{LOCK.name} is left as it was; these lines do not belong there: {found}", file=sys.stderr)
        return 1
    LOCK.write_text(HEADER + text)
    packages = re.findall(r"^[A-Za-z0-9]", text, re.MULTILINE)
    print(f"{LOCK.name}: {len(packages)} packages, {text.count('sha256:')} hashes")
    return 0


def needs_of_torch() -> list[str]:
    """What the torch beside us requires, without extras and without what its build brings along."""
    needs = [Requirement(line) for line in requires("torch") or []]
    return [str(need) for need in needs if "extra" not in str(need.marker) and not need.name.startswith(BY_MACHINE)]


if __name__ == "__main__":
    sys.exit(main())
