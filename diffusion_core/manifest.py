"""Manifests: what a folder holds, what made it and what it came from.

A folder is published in one order: its files, then `manifest.json` by rename. So a folder without a
manifest does not exist for any reader, and one with a manifest is whole. A manifest holds no clock time
and no machine name: equal inputs give equal bytes, and its digest names the folder's whole content.
Lineage in both directions is a walk over `parents`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_core.errors import IntegrityError, suggest

NAME = "manifest.json"


@dataclass(frozen=True)
class File:
    """One file of a folder: SHA-256 (hex), size in bytes and how many samples it holds, if it holds any."""

    sha256: str
    size: int
    samples: int | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; `about` is what this kind of folder says of itself (plain data)."""

    kind: str
    about: dict[str, Any]
    files: dict[str, File]
    config: str
    parents: dict[str, str]

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the manifest's text: the identity of the folder."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def digest_of(value: object) -> str:
    """SHA-256 (hex) of plain data in canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old bytes or all the new ones, also after a power cut."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)


def seal(
    folder: Path,
    kind: str,
    about: Mapping[str, Any],
    *,
    config: str = "",
    parents: Mapping[str, str] | None = None,
    samples: Mapping[str, int] | None = None,
) -> Manifest:
    """Hash every file under `folder` and write its manifest last."""
    files = {
        path.relative_to(folder).as_posix(): File(
            hash_file(path), path.stat().st_size, (samples or {}).get(path.relative_to(folder).as_posix())
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != NAME
    }
    manifest = Manifest(kind, json.loads(json.dumps(about)), files, config, dict(parents or {}))
    write_atomic(folder / NAME, manifest.text().encode())
    return manifest


def read(folder: Path, kind: str | None = None) -> Manifest:
    """The manifest of a folder; raises IntegrityError if there is none, it is torn or of another kind."""
    path = folder / NAME
    try:
        raw = json.loads(path.read_text())
        files = {name: File(**entry) for name, entry in raw.pop("files").items()}
        manifest = Manifest(files=files, **raw)
    except FileNotFoundError:
        raise IntegrityError(f"{folder} has no {NAME}: it was never finished, or is not ours") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{path} cannot be read ({error})") from error
    if kind is not None and manifest.kind != kind:
        raise IntegrityError(f"{folder} holds '{manifest.kind}'; {suggest(manifest.kind, [kind])}")
    return manifest


def verify(folder: Path, kind: str | None = None) -> Manifest:
    """Read the manifest and check every file against it; raises IntegrityError naming the first that differs."""
    manifest = read(folder, kind)
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; {folder / NAME} lists it")
        if (size := path.stat().st_size) != file.size:
            raise IntegrityError(f"{path} has {size} bytes; {folder / NAME} says {file.size}")
        if (found := hash_file(path)) != file.sha256:
            raise IntegrityError(f"{path} has SHA-256 {found[:12]}...; {folder / NAME} says {file.sha256[:12]}...")
    return manifest


def publish(draft: Path, folder: Path) -> None:
    """Put a sealed draft in its place by rename; what stood there goes only when the draft is whole."""
    read(draft)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
