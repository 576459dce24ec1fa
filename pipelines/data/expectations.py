"""Claims judged by Great Expectations, and the Data Docs (static HTML) that show every judgement to people.

What could not be judged has failed, whatever its severity: the gate closes when the judge falls over.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.data.claims import Claim, Limits

EXAMPLES = 3  # rows named in a sentence


@dataclass(frozen=True)
class Outcome:
    """What became of one claim, as plain data; `found` is empty when it held."""

    expectation: str
    severity: str
    claim: str
    held: bool
    found: str

    @property
    def sentence(self) -> str:
        """The failure in one sentence."""
        return f"{self.expectation}: {self.claim}, but {self.found}"


def check(tables: Mapping[str, pd.DataFrame], wanted: Sequence[Claim], limits: Limits, docs: Path) -> list[Outcome]:
    """Judge every claim, in order, and write the Data Docs to the folder `docs`, which appears when they are whole."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # the package reads it while it is imported
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    shutil.rmtree(docs, ignore_errors=True)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    context.delete_data_docs_site("local_site")  # the package's own: would be built too, into a folder left in /tmp
    source = context.data_sources.add_pandas("data")
    judged: dict[int, Outcome] = {}
    for name, table in tables.items():
        suite = context.suites.add(gx.ExpectationSuite(name))
        claimed = {}
        for place, claim in enumerate(wanted):
            if claim.table == name:
                about = {"description": claim.text, "severity": claim.severity(limits)}
                made = getattr(gx.expectations, claim.expectation)(**claim.keywords, **about)
                claimed[suite.add_expectation(made).id] = place
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe(name)
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        judgement = definition.run(batch_parameters={"dataframe": table}, result_format="SUMMARY")
        for one in judgement.results:  # in an order of their own
            place = claimed[one.expectation_config.id]
            judged[place] = _outcome(wanted[place], one, limits, table)
    docs.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=docs.parent, prefix=f".{docs.name}.") as draft:
        site = Path(draft) / docs.name
        context.add_data_docs_site("data", _site(site))
        context.build_data_docs()
        _prune(site)
        site.rename(docs)
    return [judged[place] for place in range(len(wanted))]


def _outcome(claim: Claim, judged: Any, limits: Limits, table: pd.DataFrame) -> Outcome:
    name = f"{claim.table}.{'/'.join(claim.columns) or 'rows'} {claim.expectation}"
    if not judged.result:
        return Outcome(name, "critical", claim.text, False, f"it could not be judged ({_raised(judged)})")
    held = bool(judged.success)
    return Outcome(name, claim.severity(limits), claim.text, held, "" if held else _found(judged.result, table))


def _raised(judged: Any) -> str:
    """The first exception inside a judgement; the package nests them by metric."""
    found = judged.exception_info.values()
    messages = [str(one["exception_message"]) for one in found if isinstance(one, Mapping)]
    return messages[0].splitlines()[0] if messages else "no reason given"


def _found(result: Mapping[str, Any], table: pd.DataFrame) -> str:
    """What failed: how many rows, and the first of them by name (the table's first column) and value."""
    if "observed_value" in result:
        return f"there are {result['observed_value']}"
    rows = result["partial_unexpected_index_list"][:EXAMPLES]
    values = result["partial_unexpected_list"][:EXAMPLES]
    examples = [f"{table.iloc[row, 0]} ({_spelt(value)})" for row, value in zip(rows, values, strict=True)]
    return f"{result['unexpected_count']} of {result['element_count']} rows differ: {', '.join(examples)}"


def _spelt(value: object) -> str:
    if isinstance(value, tuple):
        return " against ".join(map(_spelt, value))
    if value is None or value != value:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _site(folder: Path) -> dict[str, object]:
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder.resolve())}
    pages = {"class_name": "DefaultSiteIndexBuilder"}
    return {
        "class_name": "SiteBuilder",
        "site_index_builder": pages,
        "store_backend": store,
        "show_how_to_buttons": False,
    }


def _prune(site: Path) -> None:
    """Drop the files that no page or style sheet names: nine tenths of the site are pictures of a walk-through."""
    texts = [path.read_text() for path in site.rglob("*") if path.suffix in (".html", ".css")]
    for path in sorted((site / "static").rglob("*")):
        if path.is_file() and not any(path.name in text for text in texts):
            path.unlink()
