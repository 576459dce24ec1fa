"""The registry's identity: a file that changes when, and only when, the registry behind the address does.

The identity is a UUID that lives in the store itself, as a tag of the project's experiment; so an emptied or
replaced registry has another one at the same address. Stages that write to the registry depend on the file
`.inkwell/registry.json`, and run again when it changes.
"""

import json
from pathlib import Path

from diffusion_core.manifest import write_atomic
from pipelines.tracking.store import Address, exclusive

NAME = "registry.json"


def write(state: Path, address: Address, identity: str | None) -> Path:
    """Make the file say which registry this is; left untouched, also in its time, if it says so already."""
    path = state / NAME
    text = json.dumps({"identity": identity, "uri": str(address)}, indent=1, sort_keys=True) + "\n"
    with exclusive(state):
        if not path.exists() or path.read_text() != text:
            write_atomic(path, text.encode())
    return path


def promise(state: Path, address: Address) -> None:
    """Make a file without identity if there is none, so that the stages that depend on it can say what is wrong."""
    if not (state / NAME).exists():
        write(state, address, None)
