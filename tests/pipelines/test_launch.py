"""The door to the cluster: one real Ray for the module, joined by its address as a person would."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from diffusion_core.denoiser import Denoiser
from diffusion_core.errors import ConfigError, UnreachableError
from diffusion_core.objective import Batch, Regression
from diffusion_core.order import Order
from diffusion_core.parallel import World
from diffusion_core.schedule import Linear
from diffusion_core.target import V
from diffusion_core.train import Plan, fit
from diffusion_core.weighting import Flat, UniformTimes
from pipelines import launch
from pipelines.launch import Cluster

PLAN = Plan(images=80, batch=8, lr=1e-2, warm_up=0, seed=3)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of its own: one head with three slots, in a short temporary folder."""
    port = free_port()
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads its token once a process, so it is one for all tests
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        words = f"start --head --block --node-ip-address 127.0.0.1 --port {port} --num-cpus 3 --temp-dir {folder}"
        words += " --include-dashboard false --disable-usage-stats --object-store-memory 80000000"
        ray = Path(sys.executable).with_name("ray")
        head = subprocess.Popen([ray, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            for line in head.stdout:
                if "runtime started" in line:
                    break
            yield f"127.0.0.1:{port}"
        finally:
            below = psutil.Process(head.pid).children(recursive=True)
            for process in (head, *below):  # politely, it takes Ray half a minute
                process.kill()
            psutil.wait_procs(below)
            head.wait()


@pytest.fixture
def cluster(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", address)


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, x, c, cond=None):
        return self.coefficients[0] * x + self.coefficients[1]


def train_affine(plan: Plan, device: str) -> dict:
    torch.set_num_threads(1)
    world, net, seen = World.current(), Affine(), []
    pictures = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(24, 1, 1, 1)
    order = Order((24,), plan.seed)

    def batch(step: int) -> Batch:
        ids = world.rows(order.ids(step, plan.batch))
        seen.extend(ids.tolist())
        return Batch(pictures[ids].to(device), {"label": ids % 2}, ids)

    fit(Regression(Denoiser(net, Linear(), V()), UniformTimes(), Flat()), batch, plan, world=world)
    return {"weights": net.coefficients.tolist(), "size": world.size, "seen": len(seen), "process": os.getpid()}


def test_two_workers_train_what_one_process_trains(cluster: None) -> None:
    alone = launch.train(train_affine, PLAN, Cluster(workers=0))
    shared = launch.train(train_affine, PLAN, Cluster(workers=2))
    assert (alone["size"], alone["seen"], alone["process"]) == (1, 80, os.getpid())
    assert (shared["size"], shared["seen"]) == (2, 40) and shared["process"] != os.getpid()
    assert shared["weights"] == pytest.approx(alone["weights"], abs=1e-9)
    assert alone["weights"] != [0.3, -0.2]
    assert not Path(".inkwell/ray").exists() or not list(Path(".inkwell/ray").iterdir())  # Ray's own notes are gone


def stumble(folder: Path, device: str) -> tuple[int, int]:
    """The second worker dies by SIGKILL, once; gloo must meet again in a new group."""
    world, mark = World.current(), folder / "died"
    if world.rank == 1 and not mark.exists():
        mark.touch()
        time.sleep(1)  # training is under way
        os.kill(os.getpid(), signal.SIGKILL)
    world.wait()
    return world.size, int(world.average(torch.tensor([float(world.rank)])).item() * 2)


def test_a_killed_worker_is_replaced(cluster: None, tmp_path: Path) -> None:
    assert launch.train(stumble, tmp_path, Cluster(workers=2, max_failures=1)) == (2, 1)
    assert (tmp_path / "died").exists()


def refuse(item: object, device: str = "") -> None:
    raise ConfigError(f"{item} is refused; a number is wanted")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_loop_raises_is_raised(cluster: None, workers: int) -> None:
    with pytest.raises(ConfigError) as caught:
        launch.train(refuse, "this", Cluster(workers=workers, max_failures=0))
    assert str(caught.value) == "this is refused; a number is wanted"


def square(item: int) -> tuple[int, int]:
    return item**2, os.getpid()


def test_map_here_is_map_there(cluster: None) -> None:
    here, there = (list(launch.map(square, range(9), workers)) for workers in (0, 2))
    assert [value for value, _ in here] == [value for value, _ in there] == [n**2 for n in range(9)]
    assert {process for _, process in here} == {os.getpid()} and os.getpid() not in {process for _, process in there}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_task_raises_is_raised(cluster: None, workers: int) -> None:
    with pytest.raises(ConfigError) as caught:
        list(launch.map(refuse, ["this"], workers))
    assert str(caught.value) == "this is refused; a number is wanted"


def test_a_map_left_in_the_middle_leaves_the_cluster(cluster: None) -> None:
    import ray

    rows = launch.map(square, range(9), 1)
    assert next(rows)[0] == 0
    rows.close()
    assert not ray.is_initialized()


@pytest.mark.parametrize("kind", ["closed port", "silent server", "closing server", "no such host"])
def test_an_address_that_does_not_answer_is_named_in_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the connection and says nothing is the hard case: nothing refuses, nothing ever comes."""
    port = free_port()
    address = f"no-such-host.invalid:{port}" if kind == "no such host" else f"127.0.0.1:{port}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    code = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print(flush=True);"
    code += {"silent server": "time.sleep(99)", "closing server": "[s.accept()[0].close() for _ in iter(int, 1)]"}.get(
        kind, ""
    )
    server = (
        subprocess.Popen([sys.executable, "-c", code, str(port)], stdout=subprocess.PIPE) if "server" in kind else None
    )
    try:
        if server:
            server.stdout.readline()
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=f"RAY_ADDRESS={address}"):
            launch.train(train_affine, PLAN, Cluster(workers=1))
        assert time.monotonic() - started < 15
    finally:
        if server:
            server.kill()
            server.wait()


@pytest.mark.parametrize("refused", [lambda: Cluster(workers=-1), lambda: Cluster(max_failures=-1)])
def test_impossible_numbers_are_refused(refused) -> None:
    with pytest.raises(ConfigError, match="0 or more"):
        refused()
