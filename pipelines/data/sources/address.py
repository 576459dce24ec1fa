"""Addresses, as text alone: what may be opened at all, braces spelt out, names free of the machine's own paths."""

import itertools
import math
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from diffusion_core.errors import ConfigError, suggest

SCHEMES = ("file", "gs", "http", "https", "memory", "s3")
WEB = ("http", "https")
MOST_SPELT_OUT = 1_000_000
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


def check(address: str) -> None:
    """Raises ConfigError for an address that may not be opened: an unknown scheme, a program, a password in it."""
    if not address or "\0" in address:
        raise ConfigError(f"the path {address!r} names nothing")
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", address)
    if found is None:
        return
    name = found[1]
    if name not in SCHEMES or not address.startswith(f"{name}://"):
        hint = suggest(name, SCHEMES)
        raise ConfigError(f"a path may not begin with '{name}:'; {hint} (each with '://'), or a local path")
    try:
        place = urlsplit(address).netloc
    except ValueError as error:
        raise ConfigError(f"a path that begins with '{name}://' cannot be read: {error}") from None
    if "@" in place:  # the sentence must not repeat it
        where = f"{name}://{place.rpartition('@')[2]}"
        raise ConfigError(f"a URL at {where} carries a user or a password; credentials come from the environment")
    if name in WEB and "?" in address:
        where = address.partition("?")[0]
        raise ConfigError(
            f"{where} has a query (?), which could hold a key and would be written down; a plain URL is wanted"
        )
    if name == "file" and place:
        raise ConfigError(f"{address} names the machine '{place}'; a local path is wanted")


def scheme(address: str) -> str:
    """The scheme of a checked address; a local path's is "file"."""
    head, separator, _ = address.partition("://")
    return head if separator and head in SCHEMES else "file"


def spelt_out(pattern: str) -> list[str]:
    """Every address that a pattern's braces stand for: `{000..009}` counts, `{a,b}` lists; others stay as they are.

    Raises ConfigError for more than a million, and for braces in braces.
    """
    pieces = BRACES.split(pattern)  # by turns what stands between braces and what stands in them
    words = [[piece] if place % 2 == 0 else _words(piece) for place, piece in enumerate(pieces)]
    if any(sign in piece for piece in pieces[::2] for sign in "{}") and len(pieces) > 1:
        raise ConfigError(f"{pattern} has braces in braces, or one without its other")
    if math.prod(map(len, words)) > MOST_SPELT_OUT:
        raise ConfigError(f"{pattern} stands for more than {MOST_SPELT_OUT:,} files")
    return ["".join(some) for some in itertools.product(*words)]


def has_wildcard(address: str) -> bool:
    """Whether files must be listed to know what an address stands for; in a URL `?` begins the query."""
    return any(sign in address for sign in ("*[" if scheme(address) in WEB else "*?["))


def names(addresses: Sequence[str]) -> list[str]:
    """The addresses without what they all begin with and without queries: equal wherever the folder lies."""
    plain = (address.partition("?")[0] if scheme(address) in WEB else address for address in addresses)
    parts = [address.split("/") for address in plain]
    shared = len(os.path.commonprefix([some[:-1] for some in parts]))
    return [printable("/".join(some[shared:])) for some in parts]


def printable(name: str) -> str:
    """A name as text that any table can hold: bytes that are not UTF-8 are spelt out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _words(inside: str) -> Sequence[str]:
    counted = RANGE.fullmatch(inside)
    if counted is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = int(counted[1]), int(counted[2])
    if abs(last - first) >= MOST_SPELT_OUT:
        raise ConfigError(f"{{{inside}}} stands for more than {MOST_SPELT_OUT:,} files")
    step = 1 if last >= first else -1
    padded = any(len(end) > 1 and end.startswith("0") for end in counted.groups())
    width = max(map(len, counted.groups())) if padded else 0
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]
