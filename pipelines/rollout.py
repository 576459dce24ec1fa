"""The launch verb `rollout`: an application reaches a cluster over Serve's REST interface, as import path and settings.

The cluster imports the application itself, so nothing here knows more of it than a name and its `/readyz`. Where the
application runs already, only its `user_config` changes: replicas load the model beside the old one and swap.
"""

import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_core.errors import GateError, UnreachableError

APPLICATION, DEPLOYMENT, IMPORT_PATH = "inkwell", "Images", "services.app:build"
REST = "/api/serve/applications/"
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
POLL = 0.2  # seconds


@dataclass(frozen=True)
class Dashboard:
    """The dashboard of a cluster on which Serve runs or may be started; `token` is the file with its bearer token."""

    url: str
    token: Path

    def state(self) -> dict[str, Any]:
        """What Serve says of itself; raises UnreachableError if the dashboard does not answer or refuses the token."""
        return self._ask("GET", None, 10.0)

    def alive(self) -> bool:
        """Whether the dashboard answers to our token."""
        try:
            self._ask("GET", None, 2.0)
        except UnreachableError:
            return False
        return True

    def put(self, config: Mapping[str, Any]) -> None:
        """Hand Serve its whole configuration; when this returns it is accepted, not yet running."""
        self._ask("PUT", config, 30.0)

    def _ask(self, method: str, body: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        try:
            headers = {"authorization": f"Bearer {self.token.read_text().strip()}", "content-type": "application/json"}
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(self.url + REST, data, headers, method=method)
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").strip()[:300]
            raise UnreachableError(f"{self.url} answers {error.code} to {method} {REST}: {said}") from error
        except OSError as error:
            raise UnreachableError(f"{self.url} does not answer: {error}") from error
        found: dict[str, Any] = json.loads(text or "{}")
        return found


@dataclass(frozen=True)
class Place:
    """Where to roll out: a cluster, the URL its Serve has, and the registry and folder of copies its replicas use."""

    dashboard: Dashboard
    url: str
    tracking_uri: str
    cache: Path

    def configuration(self, reference: str, revision: str) -> dict[str, Any]:
        """Serve's whole configuration with our application in it, beside what else the cluster runs."""
        state = self.dashboard.state()
        known = {name: one["deployed_app_config"] for name, one in state.get("applications", {}).items()}
        fresh = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": IMPORT_PATH,
            "args": {"model": reference, "tracking_uri": self.tracking_uri, "cache": str(self.cache)},
        }
        target = {"name": DEPLOYMENT, "user_config": {"model": reference, "revision": revision}}
        ours = (known.pop(APPLICATION, None) or fresh) | {"deployments": [target]}
        host, _, port = self.url.removeprefix("http://").partition(":")
        return {
            "proxy_location": state.get("proxy_location") or "HeadOnly",
            "http_options": state.get("http_options") or {"host": host, "port": int(port)},
            "applications": [*filter(None, known.values()), ours],
        }


def rollout(place: Place, reference: str, seconds: float) -> dict[str, str]:
    """Make a cluster serve a model anew; returns the name, version and digest of what then serves.

    Raises GateError if the application or the model is refused, UnreachableError if it takes longer than `seconds`.
    """
    revision = uuid.uuid4().hex  # never used before: replicas that serve this alias read it again
    place.dashboard.put(place.configuration(reference, revision))
    last = time.monotonic() + seconds
    while True:
        status, reason = _status(place.dashboard)
        state = _ready(place.url)
        if state.get("revision") == revision and status == "RUNNING":
            break
        if status in FAILED:
            raise GateError(f"Serve could not run {IMPORT_PATH} for {reference}: {status}, {reason}")
        if time.monotonic() > last:
            raise UnreachableError(f"{reference} was not in service in {seconds:.0f} s: {status}, {reason}")
        time.sleep(POLL)
    if state["refused"]:
        raise GateError(f"{place.url} refused {reference}: {state['refused']}")
    served: dict[str, str] = state["model"]
    return served


def _status(dashboard: Dashboard) -> tuple[str, str]:
    application = dashboard.state().get("applications", {}).get(APPLICATION, {})
    said = [application.get("message"), *(one.get("message") for one in application.get("deployments", {}).values())]
    reason = " ".join(text.strip()[-600:] for text in said if text and text.strip())
    return application.get("status", "absent"), reason or "no reason given"


def _ready(url: str) -> dict[str, Any]:
    """What `/readyz` says, whatever its status; nothing while no replica answers."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5.0) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        text = error.read()
    except OSError:
        return {}
    try:
        state = json.loads(text)
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}
