"""Tars of samples as the webdataset package writes them: a picture and what is said of it, under one name."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from diffusion_core.errors import ConfigError, DataError, suggest
from pipelines.data.sources import address, files, limits, listing
from pipelines.data.sources.base import Catalog, Item, Part, Source
from pipelines.data.sources.fields import said
from pipelines.data.sources.store import in_lanes
from pipelines.data.tar import ALLOWED, Member, members

PICTURES = ("png", "jpg", "jpeg", "webp")
TEXTS = ("json", "cls", "txt")
LONGEST_TEXT = 1 << 20  # bytes
SHOWN = 8  # suffixes named in a sentence


@dataclass(frozen=True)
class Tars(Source):
    """WebDataset tars: `path` or several `paths`, local or URLs, with wildcards or braces such as `{000..009}`.

    A picture is a `.png`, `.jpg`, `.jpeg` or `.webp`; its class is the text of `.cls` or "label" in `.json`, its
    caption the text of `.txt` or "text" or "caption" in `.json`; licence and source are in `.json`. A sample with a
    file of any other kind is refused unread, and a picture of more than `max_bytes` bytes is not taken.
    """

    path: str | None = None
    paths: tuple[str, ...] = ()
    max_bytes: int = limits.MAX_BYTES

    def __post_init__(self) -> None:
        if (self.path is None) == (not self.paths):
            raise ConfigError("either path or paths is wanted")
        for pattern in self._patterns:
            address.check(pattern)
        limits.check(self.max_bytes)

    @property
    def _patterns(self) -> tuple[str, ...]:
        return self.paths if self.path is None else (self.path,)

    def catalog(self, spool: Path) -> Catalog:
        """A part a tar, weighed in bytes; raises DataError for a tar that is missing."""
        found = files.expand(self._patterns, (".tar",))
        lanes = max(files.store(tar).lanes for tar in found)
        sizes = in_lanes(lambda tar: files.store(tar).size(tar), found, lanes)
        kept, total = spool / "tars.jsonl", 0

        def parts() -> Iterator[Part]:
            nonlocal total
            for number, (tar, name, size) in enumerate(zip(found, address.names(found), sizes, strict=True)):
                total += size
                yield Part(number, size, {"tar": tar, "name": name})

        listing.keep(parts(), kept)
        return Catalog((Part(*entry) for entry in listing.kept(kept)), total, "bytes")

    def items(self, part: Part) -> Iterator[Item]:
        """The samples of one tar; raises DataError, naming it, before the first of them if it is torn or forged."""
        tar, name = part.where["tar"], part.where["name"]
        with files.store(tar).mapped(tar) as view:
            for _ in members(view, name):
                pass  # every header is walked before any sample is handed out
            seen = (member for member in members(view, name) if not _is_hidden(member.name))
            for key, group in groupby(seen, lambda member: _split(member.name)[0]):
                yield self._item(view, f"{name}/{key}", [(_split(member.name)[1], member) for member in group])

    def _item(self, view: memoryview, origin: str, found: list[tuple[str, Member]]) -> Item:
        """One sample, of the suffixes and members that stand together under one key."""
        sample, item = dict(found), Item(origin, b"")
        pictures = [suffix for suffix in PICTURES if suffix in sample]
        if refused := sorted(set(sample) - ALLOWED):
            reason = f"{origin} comes with '.{refused[0]}', which is not read; {suggest(refused[0], ALLOWED)}"
            return item._replace(fault=("bad_member", reason))
        if len(pictures) != 1 or len(sample) < len(found):
            together = ", ".join(suffix for suffix, _ in found[:SHOWN])
            reason = f"{origin} is {together} standing together; one picture is wanted, and one of each other suffix"
            return item._replace(fault=("bad_member", reason))
        picture = sample[pictures[0]]
        item = item._replace(origin=f"{origin}.{pictures[0]}")
        if picture.size > self.max_bytes:
            return item._replace(fault=limits.too_large(item.origin, self.max_bytes))
        try:
            about = said(_record(view, sample))
        except DataError as error:
            return item._replace(fault=("bad_member", f"{origin}{error}"))
        fault = (about.fault[0], f"{origin}: {about.fault[1]}") if about.fault else None
        return Item(item.origin, _bytes(view, picture), about.label, about.caption, about.licence, about.source, fault)


def _split(name: str) -> tuple[str, str]:
    """The key and the suffix of a member, parted at the first dot of its last part as the webdataset package does."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def _record(view: memoryview, sample: Mapping[str, Member]) -> dict[str, object]:
    """What a sample says of its picture; a file of its own goes before the same field in the JSON."""
    record: dict[str, object] = {}
    for suffix in TEXTS:
        if suffix in sample and sample[suffix].size > LONGEST_TEXT:
            raise DataError(f".{suffix} has {sample[suffix].size:,} bytes; at most {LONGEST_TEXT:,} are read")
    if "json" in sample:
        try:
            read = json.loads(_bytes(view, sample["json"]))
        except (ValueError, RecursionError) as error:
            raise DataError(f".json cannot be read: {error}") from None
        if not isinstance(read, dict):
            raise DataError(f".json holds {type(read).__name__}; an object is wanted")
        record |= read
    if "cls" in sample:
        record["label"] = _text(view, sample["cls"]).strip()
    if "txt" in sample:
        record["text"] = _text(view, sample["txt"]).removesuffix("\n")
    return record


def _text(view: memoryview, member: Member) -> str:
    return _bytes(view, member).decode("utf-8", "surrogateescape")  # what is no UTF-8 is a fault of its field


def _bytes(view: memoryview, member: Member) -> bytes:
    return bytes(view[member.offset : member.offset + member.size])
