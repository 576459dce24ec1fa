"""Servers started as children: each in a session of its own, on a leash, ended with everything it started."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from diffusion_core.errors import UnreachableError

GRACE = 5.0  # seconds between asking a server to end and ending it
LINES = 8  # of a server's log, shown when it fails
POLL = 0.1  # seconds


class Server:
    """A running child; `log` is where its output goes."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    def wait(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready` says so; raises UnreachableError, with the log's end, if it ends or is late."""
        last = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                raise UnreachableError(f"{self.name} ended with code {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > last:
                raise UnreachableError(f"{self.name} was not ready in {seconds:.0f} s:\n{self.tail()}")
            time.sleep(POLL)

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LINES:])


@contextmanager
def server(
    name: str, command: Sequence[str | Path], environment: Mapping[str, str], log: Path, folder: Path
) -> Iterator[Server]:
    """A child that runs `command` in `folder`; however the block is left, it and all it started are gone afterwards."""
    words = [sys.executable, "-m", "pipelines.leash", *map(str, command)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield Server(name, process, log)
    finally:
        end(process.pid)
        process.wait()


def end(leader: int) -> None:
    """End a session's leader and all of its family: first by request, after `GRACE` seconds by force."""
    known = family(leader)
    with suppress(ProcessLookupError):
        os.kill(leader, 15)
    left = _outlive(known, GRACE)
    # A server that is ending may still start a process; such a one is in its session.
    left |= family(leader)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _outlive(left, GRACE)


def family(leader: int) -> set[psutil.Process]:
    """A session's leader, its descendants, and whoever else is in its session (Ray's workers, once orphaned)."""
    found: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(leader)
        found |= {root, *root.children(recursive=True)}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                found.add(process)
    return found


def living(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie, which only waits for its parent to notice, does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _outlive(processes: set[psutil.Process], seconds: float) -> set[psutil.Process]:
    last = time.monotonic() + seconds
    while (left := set(filter(living, processes))) and time.monotonic() < last:
        time.sleep(POLL)
    return left


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listened on a moment ago."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def answers(url: str, headers: Mapping[str, str] | None = None, seconds: float = 2.0) -> bool:
    """Whether a GET of `url` gives a 200."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=seconds):
            return True
    except (OSError, ValueError):
        return False
