"""F28: a validation that crashes, and an index of another schema."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.index import INDEX
from tests.faults.figure import Figure, share
from tests.faults.stages import Place
from tests.pipelines.data_folder import make, reseal
from tests.pipelines.validating import CLASSES, pictures

FAULT = "validation crash or schema drift"
INJECTION = (
    "an index with a wrong type, nulls, a new, a missing or a renamed column, or torn; Great Expectations that raises"
)
OUTCOME = "the stage ends with a code other than 0 and publishes nothing"
BROKEN = "raise RuntimeError('it crashed')\n"


def drifts() -> dict[str, Callable[[pa.Table], pa.Table]]:
    """Each way in which the index can be of another schema."""

    def replaced(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, column)

    return {
        "wrong type of label": lambda t: replaced(t, "label", t["label"].cast(pa.string())),
        "wrong type of offset": lambda t: replaced(t, "offset", t["offset"].cast(pa.float64())),
        "nulls in label": lambda t: replaced(t, "label", pa.array([None, *t["label"].to_pylist()[1:]], pa.int64())),
        "nulls in key": lambda t: replaced(t, "key", pa.array([None, *t["key"].to_pylist()[1:]], pa.string())),
        "a new column": lambda t: t.append_column("mood", pa.array(["sad"] * len(t))),
        "a missing column": lambda t: t.drop_columns(["phash"]),
        "a renamed column": lambda t: t.rename_columns(["id" if n == "key" else n for n in t.column_names]),
        "no row": lambda t: t.slice(0, 0),
    }


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    here = Place(place / "here")
    make(here.data, pictures(), CLASSES)
    here.done("validate", {})
    index = here.data / INDEX
    whole, table, closed = index.read_bytes(), pq.read_table(index), []
    for name, drift in drifts().items():
        pq.write_table(drift(table), index)
        reseal(here.data)
        closed.append(is_closed(here, name))
    index.write_bytes(whole[: len(whole) // 2])
    reseal(here.data)
    closed.append(is_closed(here, "torn"))
    index.write_bytes(whole)
    reseal(here.data)
    # A package of that name in the working directory comes before the installed one.
    crash = here.folder / "great_expectations"
    crash.mkdir()
    (crash / "__init__.py").write_text(BROKEN)
    closed.append(is_closed(here, "a crash"))
    shutil.rmtree(crash)
    here.done("validate", {})
    return [share("gates that stayed closed, with nothing published", closed)]


def is_closed(here: Place, name: str) -> bool:
    """Whether the stage fails and leaves neither output nor draft."""
    published = here.folder / "artifacts/validation"
    shutil.rmtree(published, ignore_errors=True)
    ran = here.run("validate", {})
    closed = ran.returncode != 0 and not published.exists() and not list((here.folder / ".inkwell/drafts").glob("*"))
    if not closed:
        print(f"  {name}: exit code {ran.returncode}: {ran.stderr[-500:]}", flush=True)
    return closed
