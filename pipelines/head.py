"""A Ray head of our own on this machine: every port on loopback, a token on every door, no process left behind."""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.processes import free_ports, server
from pipelines.rollout import Dashboard

START = 60.0  # seconds a head may take to answer; about ten on two idle cores
STORE = 200 * 1024 * 1024  # bytes of Ray's object store: pictures are small
LONGEST = 40  # characters of a temporary folder, since Ray puts sockets into it and their paths are bounded


@dataclass(frozen=True)
class Ports:
    """Where a head listens, all on 127.0.0.1; `client` and `agent` are Ray's own."""

    gcs: int
    dashboard: int
    client: int
    agent: int

    @classmethod
    def free(cls) -> "Ports":
        """Ports that nobody listens on."""
        return cls(*free_ports(4))


@contextmanager
def ray_head(state: Path, ports: Ports, root: Path, slots: int = 2) -> Iterator[tuple[Dashboard, int]]:
    """A running head with `slots` CPUs to hand out, and its process id; its workers import from the checkout `root`.

    Its token and its log lie in `state`. Slots are bookkeeping, not processors: what serves or waits needs none.
    Raises UnreachableError, with the end of Ray's own log, if it does not come up.
    """
    token = make_token(state / "ray.token")
    dashboard = Dashboard(f"http://127.0.0.1:{ports.dashboard}", token)
    folder = _session_folder(state / "ray.folder")
    command: list[str | Path] = [
        Path(sys.executable).with_name("ray"),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--log-style=record",
        "--node-ip-address=127.0.0.1",
        f"--num-cpus={slots}",
        f"--port={ports.gcs}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports.dashboard}",
        f"--ray-client-server-port={ports.client}",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--object-store-memory={STORE}",
        f"--temp-dir={folder}",
    ]
    try:
        with server("Ray", command, _environment(root, token), state / "ray.log", root) as ray:
            ray.wait(dashboard.alive, START)
            yield dashboard, ray.process.pid
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_token(path: Path) -> Path:
    """A file with a random token that only its owner may read; one that is there already is kept."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


def _environment(root: Path, token: Path) -> dict[str, str]:
    """Ours without what would point Ray at another cluster, and with what keeps this one to itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "PYTHONPATH": str(root),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Otherwise Ray replaces 127.0.0.1 by the machine's address, and then listens on every interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _session_folder(record: Path) -> Path:
    """A new folder with a short path; the one of a head that was killed before it could remove it goes now."""
    if record.exists():
        shutil.rmtree(record.read_text(), ignore_errors=True)
    usual = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="ink-", dir=usual if len(usual) <= LONGEST else "/tmp")
    record.write_text(folder)
    return Path(folder)
