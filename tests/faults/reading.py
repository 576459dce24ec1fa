"""A reader as a process: `python -m tests.faults.reading FOLDER`: batches of a data folder, epoch after epoch.

It makes the file `reading` in its working directory once an epoch is read. Exit codes: 3 refused by IntegrityError;
4 a picture is not what it was in the first epoch, which must never be.
"""

import hashlib
import sys
from pathlib import Path

import torch

from diffusion_core.errors import IntegrityError
from diffusion_core.order import Order
from pipelines.data.reader import Pictures

BATCH = 8


def main(folder: Path) -> int:
    """Read until something is different; the exit code."""
    seen: dict[int, bytes] = {}
    step = 0
    try:
        pictures = Pictures.open(folder, "train")
        order = Order(pictures.groups, 0)
        while True:
            ids = order.ids(step, BATCH)
            for row, x in zip(ids.tolist(), pictures.tensor(ids), strict=True):
                digest = hashlib.sha256(x.numpy().tobytes()).digest()
                if seen.setdefault(row, digest) != digest:
                    return 4
            step += 1
            if len(seen) == len(pictures):
                Path("reading").touch()
    except IntegrityError:
        return 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1])))
