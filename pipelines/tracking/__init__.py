"""Tracking: what a stage says of itself goes to a local journal first and from there to MLflow.

A stage never waits for the server. Every call appends one line to a journal file (`journal`); a thread
(`sender`) forwards finished lines (`outbox`) to MLflow (`store`, `runs`) and remembers how far it got. What a
silent server has not taken is sent by the next stage that reaches it. `registry` holds the verbs of the model
registry, `identity` the file that tells one registry from another.
"""

from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import Tracker

__all__ = ["Journal", "Tracker"]
