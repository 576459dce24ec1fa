"""The MLflow server or database: where it is, whether it answers, and a client that never waits for minutes.

MLflow's own patience (7 retries of 120 s) would hold a stage for as long as a server is silent. So a server
is asked for its health first, and the client then gets one try of ten seconds a call; who wants more tries
again later. This is the one module that reads MLflow's environment.
"""

import fcntl
import logging
import os
import queue
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from diffusion_core.errors import UnreachableError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "inkwell"
IDENTITY_TAG = "inkwell.registry"
PROBE = 5.0  # seconds a server has to answer a question about its health
DEADLINE = 8.0  # seconds it then has to answer the first real question
DATABASE_DEADLINE = 60.0  # the same for a local file, which has no network to be lost in but may be migrating
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")  # codes that no second try changes
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Address:
    """A tracking URI; as text it is without user and password, fit for messages and files."""

    uri: str

    @classmethod
    def of(cls, state: Path) -> "Address":
        """MLFLOW_TRACKING_URI, else a SQLite file in the folder of local state."""
        return cls(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{state.resolve() / 'mlflow.db'}")

    def __str__(self) -> str:
        host = urlsplit(self.uri).netloc
        return self.uri.replace(host, host.rpartition("@")[2], 1) if "@" in host else self.uri

    @property
    def database(self) -> Path | None:
        """The file of a SQLite address."""
        return Path(self.uri.removeprefix("sqlite:///")).resolve() if self.uri.startswith("sqlite:///") else None

    @property
    def artifacts(self) -> str | None:
        """Where a new experiment keeps files: beside a SQLite file, else where the server says."""
        return (self.database.parent / "mlartifacts").as_uri() if self.database else None


@dataclass(frozen=True)
class Store:
    """A connection: the client, the project's experiment and the identity kept in the store itself."""

    address: Address
    client: "MlflowClient"
    experiment: str
    identity: str


def connect(address: Address, state: Path) -> Store:
    """Reach the store and its experiment; raises UnreachableError within 15 s if it does not answer."""
    probe(address)
    _import_quietly()
    deadline = DATABASE_DEADLINE if address.database else DEADLINE
    with answering(address):
        return within(deadline, address, lambda: _open(address, state))


def probe(address: Address) -> None:
    """Ask an HTTP server for its health; raises UnreachableError if no answer comes or it is not well."""
    if urlsplit(address.uri).scheme not in ("http", "https"):
        return
    bare = urllib.request.Request(f"{str(address).rstrip('/')}/health")
    try:
        within(PROBE + 1, address, lambda: urllib.request.urlopen(bare, timeout=PROBE).close())
    except urllib.error.HTTPError as error:
        # A refusal is an answer: servers behind a login or another path need not show their health.
        if error.code >= 500:
            raise UnreachableError(f"MLflow at {address} answers with status {error.code}") from error
    except (OSError, ValueError) as error:
        raise UnreachableError(f"MLflow at {address} does not answer ({_reason(error)})") from error


@contextmanager
def answering(address: Address) -> Iterator[None]:
    """Turn what MLflow raises when its server or database fails into an UnreachableError; refusals stay as they are."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, ConnectionError, TimeoutError) as error:
        if isinstance(error, MlflowException) and error.error_code in REFUSED:
            raise
        raise UnreachableError(f"MLflow at {address} fails ({_reason(error)})") from error


@contextmanager
def exclusive(state: Path) -> Iterator[None]:
    """Hold the lock under which all processes and threads of a checkout look something up and create it if missing."""
    lock = state / "locks" / "mlflow"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def within(seconds: float, address: Address, call: Callable[[], T]) -> T:
    """The result of `call`, for which a thread is left behind if it takes longer; raises UnreachableError then."""
    answers: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def ask() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, name="mlflow-call", daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise UnreachableError(f"MLflow at {address} does not answer (silent for {seconds:.0f} s)") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _open(address: Address, state: Path) -> Store:
    from mlflow.tracking import MlflowClient

    # Two stages that both create the tables, the experiment or its identity would undo each other's work.
    with exclusive(state):
        client = MlflowClient(tracking_uri=address.uri, registry_uri=address.uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            made = client.create_experiment(EXPERIMENT, artifact_location=address.artifacts)
            experiment = client.get_experiment(made)
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        identity = experiment.tags.get(IDENTITY_TAG)
        if identity is None:
            identity = str(uuid.uuid4())
            client.set_experiment_tag(experiment.experiment_id, IDENTITY_TAG, identity)
    return Store(address, client, experiment.experiment_id, identity)


def _import_quietly() -> None:
    """Import MLflow with our patience instead of its own, and keep its log lines off the stage's console."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "reason", None) or error or type(error).__name__)
    return text.splitlines()[0][:200]
