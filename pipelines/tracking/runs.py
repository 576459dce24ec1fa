"""Runs in MLflow: one parent per pipeline, one nested run per stage, each found again before it is created.

A create call whose answer is lost has happened all the same; so every run carries a tag that names it
(`pipeline` for a parent, `journal` for a stage) and is looked up by it first.
"""

from collections.abc import Mapping
from pathlib import Path

from pipelines.tracking.store import Store, exclusive

PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"


def open_stage(store: Store, state: Path, journal: str, name: str, tags: Mapping[str, str], ms: int) -> str:
    """The id of the run that a stage's journal is sent to, nested under its pipeline's run."""
    own = {**tags, "role": "stage", "stage": name, "journal": journal}
    with exclusive(state):
        if pipeline := tags.get("pipeline"):
            own[PARENT] = _parent(store, pipeline, tags, ms)
        return _find_or_create(store, f"tags.journal = '{journal}'", name, own, ms)


def close_stage(store: Store, run: str, status: str, ms: int) -> None:
    """End a stage's run with FINISHED, FAILED or KILLED; its pipeline's run takes the same status."""
    store.client.set_terminated(run, status, end_time=ms)
    if parent := store.client.get_run(run).data.tags.get(PARENT):
        store.client.set_terminated(parent, status, end_time=ms)


def _parent(store: Store, pipeline: str, tags: Mapping[str, str], ms: int) -> str:
    note = f"Commit {tags.get('git.commit', 'unknown')[:12]} with one params.yaml; the stages are nested below."
    own = {**tags, "role": "pipeline", NOTE: note}
    found = f"tags.pipeline = '{pipeline}' and tags.role = 'pipeline'"
    run = _find_or_create(store, found, f"pipeline {pipeline[:8]}", own, ms)
    store.client.update_run(run, status="RUNNING")
    return run


def _find_or_create(store: Store, wanted: str, name: str, tags: Mapping[str, str], ms: int) -> str:
    found = store.client.search_runs([store.experiment], wanted, max_results=1)
    if found:
        return str(found[0].info.run_id)
    made = store.client.create_run(store.experiment, start_time=ms, tags=dict(tags), run_name=name)
    return str(made.info.run_id)
