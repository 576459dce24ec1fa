"""A fresh MLflow database without its seconds of migrations: one is made, and copied for each that is wanted."""

import shutil
from pathlib import Path

from mlflow.tracking import MlflowClient

from pipelines.tracking.store import Address


def make_template(folder: Path) -> Path:
    """An empty database with all tables and no experiment of ours."""
    path = folder / "template.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def fresh_state(template: Path, folder: Path) -> Path:
    """A folder of local state whose default store is a copy of the template."""
    state = folder / ".inkwell"
    state.mkdir(parents=True)
    shutil.copyfile(template, state / "mlflow.db")
    return state


def client_of(state: Path) -> MlflowClient:
    """MLflow's own client of a state's store: what the tests ask."""
    return MlflowClient(Address.of(state).uri, Address.of(state).uri)
