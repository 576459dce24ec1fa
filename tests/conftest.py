"""What every test shares: no tool calls home, property tests repeat themselves, and the slow tests come last."""

import os

import pytest
from hypothesis import settings

QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how often Ray Train looks at its workers; 2 s by default
    "RAY_USAGE_STATS_ENABLED": "0",
}

os.environ.update(QUIET)  # before any of them is imported
for elsewhere in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):  # tests bring their own
    os.environ.pop(elsewhere, None)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the end-to-end tests at the end, so that a broken part is named before the whole is tried."""
    items.sort(key=lambda item: item.get_closest_marker("end_to_end") is not None)
