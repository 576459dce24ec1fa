"""Stage deploy: the model behind the alias goes into service and an independent judge reads its pictures.

A platform that runs already (`make up`) takes the model over without a pause. Where there is none, Serve is started
for as long as the stage lasts.
"""

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_core import images
from diffusion_core.errors import ConfigError, GateError, UnreachableError
from diffusion_core.metrics.judge import Judge, load_classifier
from pipelines.head import Ports, ray_head
from pipelines.processes import free_ports
from pipelines.rollout import Dashboard, Place, rollout
from pipelines.stage import STATE, Stage, run
from pipelines.tracking.registry import Registry, Version
from pipelines.tracking.store import Address

PLATFORM = "platform.json"
CACHE = "serving"
COLUMNS = 10
UNTIMED = 3  # requests before the timed ones, so that no connection or cache is met for the first time


@dataclass(frozen=True)
class Config:
    """The alias to serve, how many of its pictures the judge must read as the class asked for, how many are timed."""

    model: str = "digits"
    alias: str = "champion"
    pictures: int = 10
    min_correct: int = 9
    seed: int = 0
    requests: int = 30
    timeout: float = 90.0  # seconds for the application to run

    def __post_init__(self) -> None:
        if not 0 <= self.min_correct <= self.pictures or self.pictures == 0:
            raise ConfigError(f"min_correct is {self.min_correct} of {self.pictures} pictures; 0 to all is wanted")
        if self.requests < 20:
            raise ConfigError(f"requests is {self.requests}; at least 20 are wanted, fewer say little of a median")

    @property
    def reference(self) -> str:
        """The name under which replicas look the model up."""
        return f"{self.model}@{self.alias}"


def main(config: Config, stage: Stage) -> dict[str, Any]:
    """Roll out, check and time; raises GateError if the model is refused or too few of its pictures are right."""
    judge_folder, _ = stage.input("artifacts/judge", "judge")
    stage.input("artifacts/registration", "registration")
    wanted = _wanted(config)
    with _place(stage) as place:
        served = rollout(place, config.reference, config.timeout)
        if served["digest"] != wanted.tags["bundle.digest"]:
            raise GateError(f"{place.url} serves {served}; {wanted} is {wanted.tags['bundle.digest']}")
        stage.say(f"{wanted} is in service at {place.url}")
        smoke = {"model": served, "url": place.url} | _read(place.url, config, load_classifier(judge_folder), stage.out)
        smoke |= _timed(place.url, config, stage)
    (stage.out / "smoke.json").write_text(json.dumps(smoke, indent=1, sort_keys=True) + "\n")
    for name in ("smoke.json", "grid.png"):
        stage.tracker.artifact(stage.out / name)
    stage.tracker.metrics({name: float(smoke[name]) for name in ("correct", "p50_ms", "p95_ms")})
    stage.say(f"{smoke['correct']} of {config.pictures} read right, one picture in {smoke['p50_ms']:.0f} ms (p50)")
    if smoke["correct"] < config.min_correct:
        raise GateError(
            f"the judge reads {smoke['correct']} of {config.pictures} pictures of {wanted} as the class asked for; "
            f"at least {config.min_correct} are wanted (asked {smoke['asked']}, read {smoke['read']})"
        )
    return {name: smoke[name] for name in ("model", "correct", "p50_ms")}


def _wanted(config: Config) -> Version:
    """The version behind the alias; raises GateError if there is none, UnreachableError if the registry is silent."""
    registry = Registry.connect(STATE.resolve())
    version = registry.alias(config.model, config.alias)
    if version is None:
        raise GateError(f"the registry at {registry.store.address} has no '{config.reference}'; run the stage register")
    return version


@contextmanager
def _place(stage: Stage) -> Iterator[Place]:
    """The running platform, or a head of our own that ends with the block."""
    cache = (STATE / CACHE).resolve()
    if running := _platform(cache):
        stage.say(f"using the platform at {running.url}")
        yield running
        return
    stage.say("no platform runs; starting Serve for this stage")
    state = (STATE / "deploy").resolve()
    state.mkdir(parents=True, exist_ok=True)
    with ray_head(state, Ports.free(), Path.cwd()) as (dashboard, _):
        (port,) = free_ports(1)
        yield Place(dashboard, f"http://127.0.0.1:{port}", Address.of(STATE).uri, cache)


def _platform(cache: Path) -> Place | None:
    """What `make up` left word of, if its dashboard still answers to its token."""
    try:
        told = json.loads((STATE / PLATFORM).read_text())
        dashboard = Dashboard(told["dashboard"], Path(told["token"]))
        return Place(dashboard, told["serve"], told["mlflow"], cache) if dashboard.alive() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _read(url: str, config: Config, judge: Judge, out: Path) -> dict[str, Any]:
    """Ask for pictures, one class after the other, let the judge read them and keep them as one sheet."""
    (card,) = _ask(f"{url}/v1/models", None)["data"]
    asked = [place % len(card["classes"]) for place in range(config.pictures)]
    drawn = [_draw(url, label, config.seed + place) for place, label in enumerate(asked)]
    if _draw(url, asked[0], config.seed) != drawn[0]:
        raise GateError(f"{url} draws another picture for the same seed and model")
    channels = card["channels"]
    pixels = [images.decode(png, channels, origin=f"picture {place} of {url}") for place, png in enumerate(drawn)]
    read = judge.predict(images.to_tensor(pixels)).tolist()
    (out / "grid.png").write_bytes(images.encode_png(images.grid(np.stack(pixels), min(COLUMNS, len(pixels)))))
    right = sum(one == other for one, other in zip(asked, read, strict=True))
    return {"pictures": config.pictures, "correct": right, "asked": asked, "read": read, "sampling": card["sampling"]}


def _timed(url: str, config: Config, stage: Stage) -> dict[str, float]:
    """Milliseconds from request to picture, one after the other on an endpoint that is warm."""
    taken = []
    with stage.bar("timed requests", config.requests) as bar:
        for place in range(UNTIMED + config.requests):
            begun = time.perf_counter()
            _draw(url, 0, config.seed + place)
            if place >= UNTIMED:
                taken.append(1000 * (time.perf_counter() - begun))
                bar.step()
    p50, p95 = np.percentile(taken, [50, 95]).tolist()
    return {"requests": config.requests, "p50_ms": round(p50, 2), "p95_ms": round(p95, 2)}


def _draw(url: str, label: int, seed: int) -> bytes:
    answer = _ask(f"{url}/v1/images/generations", {"label": label, "seed": seed})
    return base64.b64decode(answer["data"][0]["b64_json"])


def _ask(url: str, body: dict[str, Any] | None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise GateError(f"{url} answers {error.code}: {error.read().decode(errors='replace')[:300]}") from error
    except OSError as error:
        raise UnreachableError(f"{url} does not answer: {error}") from error
    return found


if __name__ == "__main__":
    run("deploy", Config, main, out="artifacts/deployment", kind="deployment")
