"""The local platform behind `make up` and `make down`: MLflow, a Ray head and the endpoint, all on loopback.

    python -m infra.local.platform up|down|status

`up` starts a keeper, a small process in a session of its own. The keeper starts the servers as its children, leaves
word in .inkwell/platform.json and sleeps; when it ends, however it ends, they end. `down` asks it to.
Exit codes: 0 done, 1 the platform did not come up or (`status`) is not up, 2 a word that is no command.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from diffusion_core.errors import GateError, InkwellError, UnreachableError, suggest
from diffusion_core.manifest import write_atomic
from diffusion_core.spec import build
from pipelines import deploy
from pipelines.head import Ports, ray_head
from pipelines.processes import Server, answers, end, living, server
from pipelines.rollout import Place, rollout
from pipelines.stage import section
from pipelines.tracking.store import Address

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".inkwell"
WORD = STATE / "platform.json"
FOLDER = STATE / "platform"  # logs and the token
USUAL = {"mlflow": 5000, "serve": 8000, "dashboard": 8265, "gcs": 6379, "client": 10001, "agent": 52365}
TRIES = 50  # ports above the usual one
SLOTS = 4  # CPUs that Ray hands out at least: two training workers and what waits for them
START = 120.0  # seconds for MLflow, which creates its tables at the first start
SERVE = 120.0
DOWN = 40.0


@dataclass(frozen=True)
class Word:
    """What .inkwell/platform.json says; the keeper is known by its id and the moment it was created."""

    keeper: int
    created: float
    servers: dict[str, int]
    mlflow: str = ""
    dashboard: str = ""
    ray: str = ""
    serve: str = ""
    token: str = ""
    ready: bool = False

    def leave(self) -> None:
        """Write the file, for its owner alone."""
        write_atomic(WORD, (json.dumps(asdict(self), indent=1) + "\n").encode())
        WORD.chmod(0o600)

    @property
    def alive(self) -> bool:
        """Whether that very keeper still runs."""
        return _created(self.keeper) == self.created

    @classmethod
    def read(cls) -> "Word | None":
        """What the last keeper left, if it left anything."""
        with suppress(FileNotFoundError, ValueError, TypeError):
            return cls(**json.loads(WORD.read_text()))
        return None


def up() -> int:
    """Start the platform, or say where it is if it runs already."""
    if (word := Word.read()) and word.alive and word.ready:
        print("already up")
        return _tell(word)
    down()
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "keeper.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "infra.local.platform", "keep"]
        keeper = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return _follow(keeper, log)
    except KeyboardInterrupt:
        keeper.terminate()
        keeper.wait()
        print("interrupted; everything is stopped again")
        return 130


def down() -> int:
    """End exactly what `up` started; does nothing if nothing runs."""
    word = Word.read()
    if word is None:
        return 0
    if word.alive:
        print("stopping the platform")
        keeper = psutil.Process(word.keeper)
        keeper.terminate()
        with suppress(psutil.TimeoutExpired):
            keeper.wait(DOWN)
    for pid in word.servers.values():  # a keeper that was killed could not end them
        if (created := _created(pid)) is not None and created >= word.created:
            end(pid)
    WORD.unlink(missing_ok=True)
    return 0


def status() -> int:
    """Print the addresses."""
    word = Word.read()
    if word is None or not word.alive:
        print("the platform is not up; `make up` starts it")
        return 1
    return _tell(word)


def keep() -> int:
    """The keeper: start everything, leave word, watch; ends with an error if one of its servers does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    created = _created(os.getpid())
    assert created is not None
    word = Word(os.getpid(), created, {})
    word.leave()
    try:
        with ExitStack() as stack:
            _serve(stack, word)
    except InkwellError as error:
        print(f"error: {error}", flush=True)
        return 1
    finally:
        WORD.unlink(missing_ok=True)
    return 0


def _serve(stack: ExitStack, word: Word) -> None:
    """Start MLflow and Ray beside each other, roll the model out, and watch until one of them ends."""
    ports = {name: _port(name, usual) for name, usual in USUAL.items()}
    address, mlflow, database = Address.of(STATE), f"http://127.0.0.1:{ports['mlflow']}", None
    if address.database is None:
        mlflow = address.uri
    else:
        database = stack.enter_context(_mlflow(address, ports["mlflow"]))
        word = replace(word, servers={"mlflow": database.process.pid})
        word.leave()
    ray_ports = Ports(ports["gcs"], ports["dashboard"], ports["client"], ports["agent"])
    slots = max(SLOTS, os.cpu_count() or 1)
    dashboard, pid = stack.enter_context(ray_head(FOLDER, ray_ports, ROOT, slots))
    word = replace(
        word,
        servers=word.servers | {"ray": pid},
        mlflow=mlflow,
        dashboard=dashboard.url,
        ray=f"127.0.0.1:{ports['gcs']}",
        serve=f"http://127.0.0.1:{ports['serve']}",
        token=str(dashboard.token),
    )
    word.leave()
    print(f"Ray        {dashboard.url} (token in {dashboard.token.relative_to(ROOT)}), {word.ray}", flush=True)
    if database is not None:
        database.wait(lambda: answers(f"{mlflow}/health"), START)
    print(f"MLflow     {Address(mlflow)}", flush=True)
    reference = build(deploy.Config, section("deploy"), "params.yaml: deploy").reference
    try:
        served = rollout(Place(dashboard, word.serve, mlflow, STATE / "serving"), reference, SERVE)
        print(f"Endpoint   {word.serve} serves {reference}, version {served['version']}", flush=True)
    except GateError as error:
        print(f"Endpoint   {word.serve} serves nothing yet: {error}", flush=True)
    word = replace(word, ready=True)
    word.leave()
    while all(_created(pid) is not None for pid in word.servers.values()):
        time.sleep(1)
    raise UnreachableError(f"one of {word.servers} has ended; its log is in {FOLDER}")


def _mlflow(address: Address, port: int) -> AbstractContextManager[Server]:
    """MLflow's server over the database that the stages use without one, so that both see the same runs and models."""
    assert address.artifacts is not None
    command: list[str | Path] = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", address.uri, "--default-artifact-root", address.artifacts, "--no-serve-artifacts"),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return server("MLflow", command, environment, FOLDER / "mlflow.log", ROOT)


def _follow(keeper: subprocess.Popen[bytes], log: Path) -> int:
    """Print what the keeper says until everything runs or it gives up."""
    print(f"starting the platform (log: {log.relative_to(ROOT)})", flush=True)
    shown = 0
    while True:
        ended = keeper.poll()
        said = log.read_text()
        print(said[shown:], end="", flush=True)
        shown = len(said)
        if ended is not None:
            return 1
        if (word := Word.read()) and word.keeper == keeper.pid and word.ready:
            return _tell(word)
        time.sleep(0.2)


def _tell(word: Word) -> int:
    token = Path(word.token).relative_to(ROOT)
    print(f"""
  MLflow     {Address(word.mlflow)}
  Ray        {word.dashboard}   (bearer token: {token})
  Endpoint   {word.serve}   (a page to draw on; /v1/models, /readyz, /metrics, /docs)

  curl -s {word.serve}/v1/images/generations -H 'content-type: application/json' -d '{{"prompt": "7", "seed": 1}}'

  make down  stops everything""")
    return 0


def _port(name: str, usual: int) -> int:
    """The usual port, or the next one that is free."""
    for port in range(usual, usual + TRIES):
        with suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            if port != usual:
                print(f"port {usual} ({name}) is taken; using {port}", flush=True)
            return port
    raise UnreachableError(f"no port from {usual} to {usual + TRIES - 1} is free for {name}")


def _created(pid: int) -> float | None:
    """When a living process was created."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.create_time() if living(process) else None
    return None


def main() -> int:
    """Run the command named on the command line."""
    commands = {"up": up, "down": down, "status": status, "keep": keep}
    words = sys.argv[1:]
    if len(words) != 1 or words[0] not in commands:
        print(f"which command? {suggest(' '.join(words), commands.keys() - {'keep'})}", file=sys.stderr)
        return 2
    return commands[words[0]]()


if __name__ == "__main__":
    sys.exit(main())
