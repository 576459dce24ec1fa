"""A perceptual hash: 64 bits that stay mostly the same when a picture is scaled, recompressed or slightly cropped.

Bit (i, j) says whether the picture's two-dimensional DCT-II coefficient (i, j), i, j < 8, is above the median of the 64
(Zauner 2010, section 3.2.1; there after a mean filter, which the truncation makes needless). All numbers are whole and
exact, so no order of summation, and with it no number of threads and no machine, changes a bit.
"""

import numpy as np
from numpy.typing import NDArray

SIDE = 8
LEVELS = 1024  # of the cosine: sums over 30 million pixels of 8 bits stay below 2**53


class Hasher:
    """Gathers the low frequencies of pictures, and tells the hashes of all of them at once."""

    def __init__(self) -> None:
        self.bases: dict[int, NDArray[np.float64]] = {}
        self.found: list[NDArray[np.float64]] = []

    def add(self, grey: NDArray[np.uint8]) -> None:
        """Take one picture's brightness, uint8 (H, W)."""
        height, width = grey.shape
        self.found.append((self._basis(height) @ grey.astype(np.float64)) @ self._basis(width).T)

    def hashes(self) -> NDArray[np.uint64]:
        """The hash of each picture, in the order of their coming; the first coefficient is the highest bit."""
        if not self.found:
            return np.empty(0, np.uint64)
        low = np.stack(self.found).reshape(-1, SIDE * SIDE)
        middle = np.partition(low, SIDE * SIDE // 2 - 1, axis=1)[:, SIDE * SIDE // 2 - 1]
        packed = np.packbits(low > middle[:, None], axis=1)
        return np.ascontiguousarray(packed).view(">u8").reshape(-1).astype(np.uint64)

    def _basis(self, size: int) -> NDArray[np.float64]:
        if size not in self.bases:
            angle = np.pi / size * (np.arange(size) + 0.5)
            self.bases[size] = np.rint(LEVELS * np.cos(np.arange(SIDE)[:, None] * angle))
        return self.bases[size]


def spelt(hash_: int) -> str:
    """A hash as 16 hex digits."""
    return f"{hash_:016x}"
