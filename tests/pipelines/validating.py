"""The validate stage in a test's own folder: clean data, ways to spoil them, the stage, and what it found."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

from rich.console import Console

from diffusion_core.spec import build
from pipelines import validate
from pipelines.data.index import INDEX
from pipelines.stage import Stage
from pipelines.tracking import Tracker
from tests.pipelines.data_folder import Row, picture, png, reseal, rows_of, write

ROOT = Path(__file__).parents[2]
DATA, VALIDATION, DRAFT = Path("artifacts/data"), Path("artifacts/validation"), Path("draft")
CLASSES = ("cat", "dog")


def pictures(count: int = 60) -> list[Row]:
    """Noise in two classes and two splits, every picture with a caption."""
    return [
        picture(png(n), "val" if n % 5 == 0 else "train", label=n // 5 % 2, caption=f"ein Bild, größer als {n}")
        for n in range(count)
    ]


def judge(**params: Any) -> dict[str, Any]:
    """The report of the stage with these params; raises as it does."""
    DRAFT.mkdir(exist_ok=True)
    judging = Stage("validate", DRAFT, DRAFT, create_autospec(Tracker, instance=True), Console(quiet=True))
    validate.main(build(validate.Config, params, "validate"), judging)
    return json.loads((DRAFT / validate.RESULT).read_text())


def failed() -> dict[str, str]:
    """The claims that did not hold, with what was found."""
    outcomes = json.loads((DRAFT / validate.RESULT).read_text())["outcomes"]
    return {outcome["expectation"]: outcome["found"] for outcome in outcomes if not outcome["held"]}


def rewrite(change: Callable[[list[Row]], object], **about: Any) -> list[Row]:
    """Change the index as data, and the manifest as told."""
    rows = rows_of(DATA)
    change(rows)
    write(DATA / INDEX, rows)
    reseal(DATA, **about)
    return rows


def real_stage(name: str, params: str) -> subprocess.CompletedProcess[str]:
    """A stage as DVC runs it."""
    Path("params.yaml").write_text(f"{name}: {params}\n")
    return subprocess.run(
        [sys.executable, "-m", f"pipelines.{name}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
