"""The only door to the cluster, with two verbs: `train` a loop on workers, `map` a function over items.

Zero workers is this process: no Ray is started, and the same code runs. Otherwise the cluster that
RAY_ADDRESS names is used, or a local one for as long as the call lasts. The third verb, `rollout`, talks to
Serve over HTTP and lives beside this file, so that rolling out imports no Ray.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffusion_core.errors import ConfigError, UnreachableError

C = TypeVar("C")
I = TypeVar("I")  # noqa: E741 (the item of `map`)
R = TypeVar("R")

ANSWER = 5.0  # seconds a cluster has to accept a connection
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
HTTP2_SETTINGS = 4  # the type of the frame with which every HTTP/2 server begins
LOOPBACK = ("127.0.0.1", "localhost")
QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how often a finished loop is noticed; Ray's default is 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each line of a worker shows twice
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


@dataclass(frozen=True)
class Cluster:
    """How many training workers, on what device, and how many times a dead worker is replaced."""

    workers: int = 2
    device: Literal["cpu", "cuda"] = "cpu"
    max_failures: int = 2

    def __post_init__(self) -> None:
        if self.workers < 0 or self.max_failures < 0:
            raise ConfigError(f"workers {self.workers}, max_failures {self.max_failures}: 0 or more are wanted")


def train(loop: Callable[[C, str], R], config: C, cluster: Cluster) -> R:
    """Run loop(config, device) on every worker as one process group; returns what the first worker returned.

    The loop keeps its own checkpoints on storage that all workers see: a worker that dies is replaced and
    every loop is entered again. Gloo joins CPU workers, NCCL GPU workers. Raises what the loop raised.
    """
    if cluster.workers == 0:
        return loop(config, cluster.device)
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    with connected(cluster.workers + 1):
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
        from ray.train.torch import TorchConfig, TorchTrainer

        # A name is used once: Ray would silently resume a run of the same name. Resuming is the loop's business.
        storage = Path(".inkwell").resolve() / "ray" / uuid.uuid4().hex[:12]
        trainer = TorchTrainer(
            _enter,
            train_loop_config={"loop": loop, "config": config, "device": cluster.device},
            torch_config=TorchConfig(backend="nccl" if cluster.device == "cuda" else "gloo"),
            scaling_config=ScalingConfig(num_workers=cluster.workers, use_gpu=cluster.device == "cuda"),
            run_config=RunConfig(
                name="run",
                storage_path=str(storage),
                logging_config=LoggingConfig(log_level="ERROR"),
                failure_config=FailureConfig(max_failures=cluster.max_failures),
            ),
        )
        try:
            returned: R = trainer.fit().return_value
        except WorkerGroupError as error:
            raise next(iter(error.worker_failures.values())) from None
        except SystemExit:  # Ray's answer to Ctrl-C, with exit code 0
            raise KeyboardInterrupt from None
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        return returned


def map(fn: Callable[[I], R], items: Iterable[I], workers: int) -> Iterator[R]:
    """fn of every item, in order: here if `workers` is 0, else as Ray tasks, at most two a worker in flight.

    Items are taken one at a time, as far ahead as tasks are in flight.
    Raises what fn raised.
    """
    if workers == 0:
        yield from (fn(item) for item in items)
        return
    with connected(workers):
        import ray
        from ray.exceptions import RayTaskError

        task = ray.remote(num_cpus=1)(fn)
        flying: list[Any] = []
        try:
            for item in items:
                if len(flying) == 2 * workers:
                    yield ray.get(flying.pop(0))
                flying.append(task.remote(item))
            while flying:
                yield ray.get(flying.pop(0))
        except RayTaskError as error:  # Ray puts its own traceback into the sentence
            raise error.cause from None


@contextlib.contextmanager
def connected(cpus: int) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, or to a local one with `cpus` slots that ends with the context.

    Raises UnreachableError within 15 s if the address does not answer.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    _probe(address)
    if address.rpartition(":")[0] in LOOPBACK:
        # Otherwise Ray replaces a loopback address by the machine's own, on which a local head does not listen.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if address == "local" and not any(name.startswith("RAY_AUTH") for name in os.environ):
        # Left to itself Ray writes a token that everyone may read into the home folder.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    # Slots are bookkeeping: a small machine may run more workers than it has cores, if slowly.
    local = {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False} if address == "local" else {}
    ended = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **local)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise UnreachableError(f"the Ray cluster at RAY_ADDRESS={address} cannot be joined: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ended)  # Ray has put its own there, which aborts the process
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Have a server greet us as gRPC does; Ray itself would wait for minutes on a port that is closed or silent."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "local" and "auto" name no host
    try:
        with socket.create_connection((host, int(port)), ANSWER) as connection:
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(9)  # one frame header: length, type, flags, stream
    except OSError as error:
        raise UnreachableError(f"no Ray cluster answers at RAY_ADDRESS={address} ({error})") from None
    if len(answer) < 4 or answer[3] != HTTP2_SETTINGS:
        raise UnreachableError(f"what answers at RAY_ADDRESS={address} is no Ray cluster")


def _enter(payload: dict[str, Any]) -> Any:
    device = "cpu"
    if payload["device"] == "cuda":
        from ray.train.torch import get_device

        device = str(get_device())
    return payload["loop"](payload["config"], device)
