"""From `name@alias` to a verified bundle on local disk; the only reader of the registry, and it never writes there.

A version is believed only if its manifest has the digest that stands in the registry's tag and every file has the
digest that stands in the manifest. Copies are kept by version and digest, so a registry that is down at start costs
nothing but news: the last verified copy goes into service.
"""

import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from diffusion_core import bundle, manifest
from diffusion_core.bundle import Bundle
from diffusion_core.errors import ConfigError, InkwellError, IntegrityError, UnreachableError

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = "folder://"
KIND = "bundle"
DIGEST_TAG = "bundle.digest"
PROBE = 4.0  # seconds a registry has to say that it is alive
PATIENCE = 8  # seconds it has for each answer after that


@dataclass(frozen=True)
class Model:
    """A verified bundle and the names under which it was asked for."""

    name: str
    reference: str
    version: str
    digest: str
    bundle: Bundle


def load(reference: str, tracking_uri: str, cache: Path) -> Model:
    """The model of `name@alias` in the registry, or of `folder://path`, with every byte checked.

    Raises IntegrityError for bytes that are not those registered, ConfigError for a reference that names nothing,
    UnreachableError within 15 s if the registry does not answer and no verified copy is at hand.
    """
    if reference.startswith(FOLDER):
        folder = Path(reference.removeprefix(FOLDER))
        digest = manifest.verify(folder, KIND).digest
        return Model(folder.name, reference, "folder", digest, bundle.load(folder, verify=False))
    name, at, alias = reference.partition("@")
    if not (name and at and alias):
        raise ConfigError(f"model '{reference}' is unknown; 'name@alias' or '{FOLDER}path' is wanted")
    pointer = cache / f"{reference}.json"
    try:
        version, digest = _resolve(name, alias, tracking_uri)
        folder = _fetch(name, version, digest, tracking_uri, cache)
        manifest.write_atomic(pointer, json.dumps([version, digest]).encode())
    except UnreachableError:
        if not pointer.exists():
            raise
        version, digest = json.loads(pointer.read_text())
        folder = _verified(_place(cache, name, version, digest), digest)
    return Model(name, reference, version, digest, bundle.load(folder, verify=False))


def _resolve(name: str, alias: str, tracking_uri: str) -> tuple[str, str]:
    """The version behind an alias and the digest that its registration vouches for."""
    with _registry(tracking_uri):
        found = _client(tracking_uri).get_model_version_by_alias(name, alias)
    if not (digest := found.tags.get(DIGEST_TAG)):
        raise IntegrityError(f"version {found.version} of {name} has no tag '{DIGEST_TAG}': nothing vouches for it")
    return str(found.version), digest


def _fetch(name: str, version: str, digest: str, tracking_uri: str, cache: Path) -> Path:
    """The verified local copy of a version, downloaded if there is none or if it was altered."""
    place = _place(cache, name, version, digest)
    if place.exists():
        try:
            return _verified(place, digest)
        except IntegrityError:
            shutil.rmtree(place)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".draft-") as draft, _registry(tracking_uri):
        from mlflow.artifacts import download_artifacts

        source = _source(name, version, tracking_uri)
        got = Path(download_artifacts(source, dst_path=draft, tracking_uri=tracking_uri))
        manifest.publish(_verified(_folder_of(got), digest), place)
    return place


def _source(name: str, version: str, tracking_uri: str) -> str:
    """Where a version's files lie; `models:/name/version` is looked up in MLflow's global registry."""
    client = _client(tracking_uri)
    source: str = client.get_model_version_download_uri(name, version)
    if source.startswith("models:/"):
        source = client.get_logged_model(source.removeprefix("models:/")).artifact_location
    return source


def _folder_of(download: Path) -> Path:
    """Where the bundle lies in what was downloaded: MLflow may add a folder and files of its own around it."""
    found = sorted(download.rglob(manifest.NAME), key=lambda path: len(path.parts))
    return found[0].parent if found else download


def _verified(folder: Path, digest: str) -> Path:
    found = manifest.verify(folder, KIND).digest
    if found != digest:
        raise IntegrityError(f"{folder} has digest {found[:12]}...; {digest[:12]}... was registered")
    return folder


def _place(cache: Path, name: str, version: str, digest: str) -> Path:
    return cache / f"{name}-{version}-{digest[:16]}"


def _client(tracking_uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


@contextmanager
def _registry(tracking_uri: str) -> Iterator[None]:
    """Speak to MLflow with short patience; what it raises becomes an error of ours."""
    _probe(tracking_uri)
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
    from mlflow.exceptions import MlflowException

    MLFLOW_HTTP_REQUEST_TIMEOUT.set(PATIENCE)
    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
    try:
        yield
    except InkwellError:
        raise
    except MlflowException as error:
        said = error.message.removeprefix(f"{error.error_code}: ")
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ConfigError(f"registry {_shown(tracking_uri)}: {said}") from error
        raise UnreachableError(f"registry {_shown(tracking_uri)} does not answer: {said}") from error


def _probe(tracking_uri: str) -> None:
    """Fail early: MLflow itself would wait for minutes, and would make a database that is missing."""
    if tracking_uri.startswith("sqlite:///"):
        if not Path(tracking_uri.removeprefix("sqlite:///")).is_file():
            raise UnreachableError(
                f"registry {_shown(tracking_uri)}: there is no such file; has a model been registered?"
            )
    elif urlsplit(tracking_uri).scheme in ("http", "https"):
        try:
            urllib.request.urlopen(f"{tracking_uri.rstrip('/')}/health", timeout=PROBE).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise UnreachableError(f"registry {_shown(tracking_uri)} answers {error.code}") from error
        except OSError as error:
            raise UnreachableError(f"registry {_shown(tracking_uri)} does not answer: {error}") from error


def _shown(uri: str) -> str:
    """A URI without user and password."""
    head, slashes, tail = uri.partition("://")
    return f"{head}{slashes}{tail.rpartition('@')[2]}"
