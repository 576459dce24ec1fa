"""Scikit-learn's digits: a source that is always there, and needs neither disk nor network."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_core import images
from pipelines.data.sources.base import Catalog, Item, Part, Source

PICTURES = 1797
PER_PART = 512


@dataclass(frozen=True)
class Digits(Source):
    """The 1,797 scans of handwritten digits inside scikit-learn: 8x8 pixels, 17 grey levels (Alpaydin, Kaynak 1998)."""

    def catalog(self, spool: Path) -> Catalog:
        """Four parts of consecutive scans."""
        starts = range(0, PICTURES, PER_PART)
        parts = (Part(number, min(PER_PART, PICTURES - start), {"start": start}) for number, start in enumerate(starts))
        return Catalog(parts, PICTURES, "pictures", PICTURES, tuple(str(digit) for digit in range(10)))

    def items(self, part: Part) -> Iterator[Item]:
        """The scans of one part as grey PNG."""
        from sklearn.datasets import load_digits  # slow to import, and only this source wants it

        found = load_digits()
        scans = np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None]
        for row in range(part.where["start"], part.where["start"] + part.weight):
            name = str(found.target_names[found.target[row]])
            yield Item(f"sklearn.digits/{row:04d}", images.encode_png(scans[row]), name)
