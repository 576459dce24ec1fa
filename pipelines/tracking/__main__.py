"""Bring `.inkwell/registry.json` up to date and print it: `python -m pipelines.tracking`.

Exits with code 2 and a sentence if the registry does not answer within 15 s.
"""

import sys
from pathlib import Path

from diffusion_core.errors import UnreachableError
from pipelines.tracking import identity
from pipelines.tracking.store import Address, connect

STATE = Path(".inkwell")

if __name__ == "__main__":
    address = Address.of(STATE)
    try:
        store = connect(address, STATE.resolve())
    except UnreachableError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(identity.write(STATE, address, store.identity).read_text(), end="")
