"""The model registry: a version is a folder of files with tags, an alias is a name that can be moved.

Only files are stored, so reading a version runs no code. An alias moves in one
statement of the registry's database: a reader sees the old version or the new one, never none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from diffusion_core.errors import GateError, suggest
from pipelines.tracking import identity
from pipelines.tracking.store import Address, Store, answering, connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel


@dataclass(frozen=True)
class Version:
    """One version of a registered model and what its tags say of it."""

    model: str
    number: str
    run: str
    tags: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.model} version {self.number}"


class Registry:
    """A registry that has answered; every verb raises UnreachableError if it later fails."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def connect(cls, state: Path) -> Self:
        """Reach the registry that the environment names; raises UnreachableError within 15 s if it does not answer."""
        address = Address.of(state)
        store = connect(address, state)
        identity.write(state, address, store.identity)
        return cls(store)

    def register(self, model: str, folder: Path, run: str | None, tags: Mapping[str, str]) -> Version:
        """Store a folder of files as the next version of a model, made by `run`."""
        client = self.store.client
        with answering(self.store.address):
            stored = client.create_logged_model(self.store.experiment, name=model, source_run_id=run, tags=dict(tags))
            client.log_model_artifacts(stored.model_id, str(folder))
            client.finalize_logged_model(stored.model_id, "READY")
            if self._model(model) is None:
                client.create_registered_model(model)
            # Not "models:/<id>" as the source: MLflow looks that up at its process-wide URI, not at this client's.
            where = stored.artifact_location
            made = client.create_model_version(model, where, run, dict(tags), model_id=stored.model_id)
        return _version(made)

    def find(self, model: str, tags: Mapping[str, str]) -> Version | None:
        """The newest version that has all these tags and still has its files."""
        with answering(self.store.address):
            found = self.store.client.search_model_versions(f"name = '{model}'", order_by=["version_number DESC"])
            for one in found:
                if tags.items() <= one.tags.items() and self._has_files(one):
                    return _version(one)
        return None

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with answering(self.store.address):
            for key, value in tags.items():
                self.store.client.set_model_version_tag(version.model, version.number, key, value)

    def alias(self, model: str, alias: str) -> Version | None:
        """The version an alias points at, if there are such a model and alias."""
        with answering(self.store.address):
            registered = self._model(model)
            if registered is None or alias not in registered.aliases:
                return None
            return _version(self.store.client.get_model_version(model, registered.aliases[alias]))

    def set_alias(self, version: Version, alias: str) -> None:
        """Point an alias at a version."""
        with answering(self.store.address):
            self.store.client.set_registered_model_alias(version.model, alias, version.number)

    def download(self, reference: str, into: Path) -> tuple[Version, Path]:
        """Copy the files of "model@alias" into a folder; raises GateError, with what there is, if it is not there."""
        from mlflow.artifacts import download_artifacts

        model, _, alias = reference.partition("@")
        version = self.alias(model, alias)
        if version is None:
            raise GateError(f"the registry at {self.store.address} has no '{reference}'; {self._nearest(model, alias)}")
        with answering(self.store.address):
            place = self.store.client.get_model_version_download_uri(model, version.number)
            at = download_artifacts(place, dst_path=str(into), tracking_uri=self.store.address.uri)
        return version, Path(at)

    def run_that_made(self, digest: str) -> str | None:
        """The id of the latest stage run whose output has this manifest digest."""
        with answering(self.store.address):
            found = self.store.client.search_runs(
                [self.store.experiment], f"tags.`output.digest` = '{digest}'", max_results=1
            )
        return str(found[0].info.run_id) if found else None

    def _model(self, name: str) -> "RegisteredModel | None":
        found = self.store.client.search_registered_models(f"name = '{name}'")
        return found[0] if found else None

    def _has_files(self, version: "ModelVersion") -> bool:
        from mlflow.artifacts import list_artifacts

        place = self.store.client.get_model_version_download_uri(version.name, version.version)
        return bool(list_artifacts(place, tracking_uri=self.store.address.uri))

    def _nearest(self, model: str, alias: str) -> str:
        with answering(self.store.address):
            models = self.store.client.search_registered_models()
        names = [f"{one.name}@{other}" for one in models for other in one.aliases]
        return suggest(f"{model}@{alias}", names)


def _version(raw: "ModelVersion") -> Version:
    return Version(raw.name, str(raw.version), raw.run_id or "", dict(raw.tags))
