"""The real thing: Ray Serve over HTTP, started by the stage or by the platform, and nothing left when it ends.

Everything runs in a small checkout of its own, with a real registry that holds two bundles of random weights.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from diffusion_core import manifest
from diffusion_core.metrics import judge
from pipelines.processes import living
from pipelines.tracking.registry import Registry
from tests.services.conftest import write_bundle

ROOT = Path(__file__).resolve().parents[2]
PR_SET_CHILD_SUBREAPER = 36
CONFIG = {"model": "digits", "alias": "champion", "pictures": 10, "min_correct": 0, "requests": 20}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, two registered models, and what deploy reads."""
    root = tmp_path_factory.mktemp("checkout")
    for package in ("diffusion_core", "pipelines", "services", "infra"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    registry = Registry.connect(root / ".inkwell")
    for seed in (0, 1):
        bundle = write_bundle(root / f"bundle-{seed}", seed)
        run = registry.store.client.create_run(registry.store.experiment).info.run_id
        registry.register("digits", bundle, run, {"bundle.digest": manifest.read(bundle).digest})
    promote(root, 0)
    folder = root / "artifacts" / "judge"
    folder.mkdir(parents=True)
    labels = torch.arange(40) % 10
    judge.fit(torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(0)), labels).save(folder)
    manifest.seal(folder, "judge", {})
    (root / "artifacts" / "registration").mkdir()
    manifest.seal(root / "artifacts" / "registration", "registration", {})
    configure(root)
    return root


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Adopt every orphan, so that none can be overlooked, and allow none."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    before = set(psutil.Process().children(recursive=True))
    yield
    last = time.monotonic() + 15
    while left := [one for one in set(psutil.Process().children(recursive=True)) - before if living(one)]:
        assert time.monotonic() < last, left
        time.sleep(0.2)


def promote(root: Path, seed: int) -> str:
    """Point the alias at a bundle; gives its digest."""
    registry, digest = Registry.connect(root / ".inkwell"), manifest.read(root / f"bundle-{seed}").digest
    version = registry.find("digits", {"bundle.digest": digest})
    assert version is not None
    registry.set_alias(version, "champion")
    return digest


def configure(root: Path, **changes: object) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump({"deploy": CONFIG | changes}))


def start(root: Path, *words: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", *words]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def ask(url: str, body: object = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, {"content-type": "application/json"})) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_deploy_starts_serve_checks_the_pictures_and_stops_it(checkout: Path) -> None:
    code, said = finish(start(checkout, "pipelines.deploy"))
    assert code == 0, said
    smoke = json.loads((checkout / "artifacts/deployment/smoke.json").read_text())
    assert smoke["asked"] == list(range(10))
    assert smoke["correct"] == sum(one == other for one, other in zip(smoke["asked"], smoke["read"], strict=True))
    assert smoke["model"]["digest"] == manifest.read(checkout / "bundle-0").digest
    assert 0 < smoke["p50_ms"] <= smoke["p95_ms"]
    assert {"smoke.json", "grid.png"} == set(manifest.verify(checkout / "artifacts/deployment", "deployment").files)
    assert ask_fails(smoke["url"])


def ask_fails(url: str) -> bool:
    try:
        ask(f"{url}/healthz")
    except urllib.error.URLError:
        return True
    return False


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stage_that_is_stopped_leaves_no_process(checkout: Path, how: signal.Signals, code: int) -> None:
    log = checkout / ".inkwell" / "deploy" / "ray.log"
    log.unlink(missing_ok=True)
    stage = start(checkout, "pipelines.deploy")
    last = time.monotonic() + 60
    while not (log.exists() and "Ray runtime started" in log.read_text()):
        assert stage.poll() is None, stage.communicate()
        assert time.monotonic() < last
        time.sleep(0.1)
    stage.send_signal(how)
    assert finish(stage)[0] == code


def test_the_platform_serves_the_alias_and_deploy_swaps_it_without_a_dropped_request(checkout: Path) -> None:
    first, second = (manifest.read(checkout / f"bundle-{seed}").digest for seed in (0, 1))
    promote(checkout, 0)
    code, said = finish(start(checkout, "infra.local.platform", "up"))
    try:
        assert code == 0, said
        word = json.loads((checkout / ".inkwell/platform.json").read_text())
        url = word["serve"]
        assert ask(f"{url}/readyz")[1]["model"] == {"name": "digits", "version": "1", "digest": first}
        assert Path(word["token"]).stat().st_mode & 0o777 == 0o600
        secret = Path(word["token"]).read_text()
        assert secret not in said + "".join(path.read_text() for path in (checkout / ".inkwell/platform").glob("*.log"))
        assert status_of(f"{word['dashboard']}/api/jobs/", None) == 401
        assert status_of(f"{word['dashboard']}/api/jobs/", "0" * 64) in (401, 403)
        assert status_of(f"{word['dashboard']}/api/jobs/", secret) == 200

        asked = {"label": 7, "seed": 5, "n": 3}
        before = ask(f"{url}/v1/images/generations", asked)
        assert before[0] == 200
        assert ask(f"{url}/v1/images/generations", asked)[1]["data"] == before[1]["data"]
        assert ask(f"{url}/v1/images/generations", {"label": 77})[1]["error"]["param"] == "label"

        promote(checkout, 1)
        answers = under_load(url, asked, lambda: finish(start(checkout, "pipelines.deploy")))
        assert {status for status, _ in answers} == {200}
        pictures = {body["model"]["digest"]: [] for _, body in answers}
        for _, body in answers:
            pictures[body["model"]["digest"]].append(json.dumps(body["data"]))
        assert set(pictures) == {first, second}
        assert all(len(set(same)) == 1 for same in pictures.values())
        assert ask(f"{url}/readyz")[1]["model"]["digest"] == second

        spoil(checkout, 0)
        promote(checkout, 0)
        code, said = finish(start(checkout, "pipelines.deploy"))
        assert code == 2
        assert "codec.safetensors" in said
        assert ask(f"{url}/readyz")[1]["model"]["digest"] == second
    finally:
        code, said = finish(start(checkout, "infra.local.platform", "down"))
    assert code == 0, said
    assert finish(start(checkout, "infra.local.platform", "down")) == (0, "")


def under_load(url: str, asked: object, act: Any) -> list[tuple[int, Any]]:
    """What an endpoint answered while `act` ran."""
    answers: list[tuple[int, Any]] = []
    over = threading.Event()

    def knock() -> None:
        while not over.is_set():
            answers.append(ask(f"{url}/v1/images/generations", asked))

    knocking = threading.Thread(target=knock)
    knocking.start()
    try:
        code, said = act()
    finally:
        over.set()
        knocking.join()
    assert code == 0, said
    return answers


def spoil(root: Path, seed: int) -> None:
    """Alter one byte of a registered bundle, in the registry and in the copy kept of it."""
    digest = manifest.read(root / f"bundle-{seed}").digest
    places = [*(root / ".inkwell").rglob("codec.safetensors")]
    for place in (path for path in places if manifest.read(path.parent).digest == digest):
        data = bytearray(place.read_bytes())
        data[-1] ^= 1
        place.write_bytes(data)


def status_of(url: str, token: str | None) -> int:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_without_a_registered_model_deploy_says_so_at_once(checkout: Path) -> None:
    configure(checkout, alias="nobody")
    try:
        begun = time.monotonic()
        code, said = finish(start(checkout, "pipelines.deploy"))
    finally:
        configure(checkout)
    assert code == 2
    assert "digits@nobody" in said
    assert time.monotonic() - begun < 15
