"""What is said of a picture beside it: its class, caption, licence and source, under the names people use.

Metadata tables, the JSON in tars and Parquet columns are read alike, and what cannot be used is a fault of that one
picture.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from diffusion_core.errors import DataError
from pipelines.data.sources.address import printable

LABEL = ("label",)
CAPTION = ("text", "caption")
LICENCE = ("licence", "license")
SOURCE = ("source", "url")


class Said(NamedTuple):
    """What a record says of one picture, or why it cannot be used."""

    label: str | None = None
    caption: str | None = None
    licence: str | None = None
    source: str | None = None
    fault: tuple[str, str] | None = None


def said(record: Mapping[str, object]) -> Said:
    """Read a record by the customary names; the first of several that has a value counts."""
    fault, label, caption = None, None, None
    try:
        label = label_of(_first(record, LABEL))
    except DataError as error:
        fault = ("bad_label", str(error))
    try:
        caption = caption_of(_first(record, CAPTION))
    except DataError as error:
        fault = ("bad_caption", str(error))
    return Said(label, caption, _note(_first(record, LICENCE)), _note(_first(record, SOURCE)), fault)


def caption_of(value: object) -> str | None:
    """A caption exactly as given, None for none; raises DataError if it is no text, no valid UTF-8 or empty."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"the caption is {reprlib.repr(value)} ({type(value).__name__}), not text")
    if not _is_utf8(value):
        raise DataError(f"the caption is no valid UTF-8: {ascii(value[:40])}")
    if not value.strip():
        raise DataError("the caption is empty")
    return value


def label_of(value: object) -> str | None:
    """A class's name: 3, 3.0 and "3" are one class, nothing at all is None; raises DataError for what names none."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"the label is {reprlib.repr(value)} ({type(value).__name__}); a name or a number is wanted")
    if not _is_utf8(value):
        raise DataError(f"the label is no valid UTF-8: {ascii(value[:40])}")
    return value.strip() or None


def _note(value: object) -> str | None:
    """A licence or a source as text; it decides nothing, so it is never a fault."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return printable(str(value)).strip() or None


def _first(record: Mapping[str, object], names: Iterable[str]) -> object:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: bytes that were none, or JSON that spelt half a sign
        return False
    return True
