"""A folder in which single stages run as real processes, with params and inputs made for the fault."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests import measured
from tests.pipelines.stores import fresh_state, make_template


class Place:
    """A folder with a fresh MLflow database in which stages can run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        template = folder.parent / "template"
        if not template.exists():
            template.mkdir()
            make_template(template)
        fresh_state(template / "template.db", folder)

    def run(self, stage: str, params: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
        """One stage to its end with these params."""
        (self.folder / "params.yaml").write_text(yaml.safe_dump({stage: dict(params)}))
        command = [sys.executable, "-m", f"pipelines.{stage}"]
        env = os.environ | {"PYTHONPATH": str(measured.ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)

    def done(self, stage: str, params: Mapping[str, Any]) -> None:
        """One stage that has to succeed."""
        ran = self.run(stage, params)
        assert ran.returncode == 0, ran.stderr[-3000:]

    def refused(self, stage: str, params: Mapping[str, Any]) -> bool:
        """Whether a stage ends with the code of refused input and leaves nothing half-written."""
        ran = self.run(stage, params)
        return ran.returncode == 2 and not list((self.folder / ".inkwell/drafts").glob("*"))

    @property
    def data(self) -> Path:
        """What prepare publishes."""
        return self.folder / "artifacts/data"
