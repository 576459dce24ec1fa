"""Every error this project raises on purpose, drawn as a tree.

InkwellError (a ValueError)
├── ConfigError       a parameter is unknown, of the wrong type or out of range; names its full path
├── RefusedError      a combination with no mathematical answer, refused when the object is built
├── DataError         a picture, sample or shard that cannot be used
├── IntegrityError    bytes on disk that do not match their manifest
├── GateError         a model that may not be promoted or served
└── UnreachableError  a server or cluster that did not answer in time
"""

import difflib
from collections.abc import Iterable


class InkwellError(ValueError):
    """The root: catch this to catch everything the project refuses knowingly."""


class ConfigError(InkwellError):
    """A parameter is unknown, of the wrong type or out of range."""


class RefusedError(InkwellError):
    """A combination that has no mathematical answer."""


class DataError(InkwellError):
    """A picture, sample or shard that cannot be used."""


class IntegrityError(InkwellError):
    """Bytes on disk that do not match their manifest."""


class GateError(InkwellError):
    """A model that may not be promoted or served."""


class UnreachableError(InkwellError):
    """A server or cluster that did not answer in time."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """The tail of an error sentence: what is allowed and, if one is close, the nearest name."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"allowed: {', '.join(names) or 'nothing'}{hint}"
