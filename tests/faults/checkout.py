"""A small checkout of its own, in which DVC runs the real pipeline with tiny params."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil
import yaml

from diffusion_core import manifest
from pipelines.processes import living
from tests import measured
from tests.test_end_to_end import environment, tiny

FIRST = ("prepare", "validate", "train_vae", "cache_latents", "train")
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
TOO_LONG = 600.0  # seconds


class Checkout:
    """A checkout in a folder; `made` makes one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def made(cls, place: Path) -> Self:
        """A clone of this checkout as it stands, in which the stages FIRST have run and git has their dvc.lock.

        It is made once beside `place`, and copied for each fault.
        """
        template = cls(place.parent / "pipeline")
        if not template.folder.exists():
            template._make()
        shutil.copytree(template.folder, place / "checkout", symlinks=True)
        return cls(place / "checkout")

    def _make(self) -> None:
        asked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(asked, cwd=measured.ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (measured.ROOT / name).is_file() and name != "dvc.lock":
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(measured.ROOT / name, self.folder / name)
        (self.folder / ".venv").symlink_to(sys.prefix)
        params = tiny(yaml.safe_load((measured.ROOT / "params.yaml").read_text()))
        params["train"]["plan"] |= {"images": 2560, "log_every": 1280}
        params["validate"].setdefault("near_leak", None)  # digits are alike
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params))
        subprocess.run([*GIT, "init", "-q"], cwd=self.folder, check=True)
        self.repro(*FIRST)
        self.commit()

    def commit(self) -> None:
        """Put everything into git."""
        for words in (["add", "-A"], ["commit", "-q", "--allow-empty", "-m", "State"]):
            subprocess.run([*GIT, *words], cwd=self.folder, check=True)

    def start(self, *words: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        """A Python module as a process of a group of its own, as a shell starts one."""
        return subprocess.Popen(
            [*before, ".venv/bin/python", "-m", *words],
            cwd=self.folder,
            env=environment(self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *words: str) -> tuple[int, str]:
        """Run a Python module to its end: its exit code and what it said."""
        process = self.start(*words)
        said, _ = process.communicate(timeout=TOO_LONG)
        return process.returncode, said

    def repro(self, *words: str) -> str:
        """`dvc repro`, which has to succeed; what it said."""
        code, said = self.finish("dvc", "repro", *words)
        assert code == 0, said[-4000:]
        return said

    def changed(self) -> set[str]:
        """The stages that DVC would run again."""
        code, said = self.finish("dvc", "status", "--json")
        assert code == 0, said
        return set(yaml.safe_load(said))

    def digests(self) -> dict[str, str]:
        """What every published folder is, by the digest of its verified manifest."""
        found = sorted(self.folder.glob("artifacts/**/manifest.json"))
        return {str(path.parent.relative_to(self.folder)): manifest.verify(path.parent).digest for path in found}

    def processes(self) -> list[psutil.Process]:
        """Who works in this checkout."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(self.folder) and living(process):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def gone_within(self, seconds: float) -> list[str]:
        """Wait until nobody works here; the command lines of those who still do after that time, then killed."""
        last = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < last:
            time.sleep(0.1)
        names = []
        for process in left:
            names.append(" ".join(process.cmdline()))
            process.kill()
        return names


def send(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """A signal as it really comes: Ctrl-C goes to the whole group in the foreground, the others to DVC alone."""
    if process.poll() is None:
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
