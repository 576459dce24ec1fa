"""A passport names everything a measured number depends on; numbers taken with different rulers refuse comparison."""

from dataclasses import dataclass

from diffusion_core.errors import RefusedError
from diffusion_core.manifest import digest_of
from diffusion_core.sampler import Sampling
from diffusion_core.spec import spec

RULER = ("metric", "extractor", "resize", "reference", "reference_count", "count")


@dataclass(frozen=True)
class Passport:
    """What a number depends on; digests are SHA-256 in hex, `count` pictures have the seeds from `first_seed` on.

    The first six fields are the ruler: what was measured, in whose features, after which resizing, against
    which real pictures and how many of them, with how many generated ones. The rest says what was measured.
    """

    metric: str
    extractor: str
    resize: str
    reference: str
    reference_count: int
    count: int
    first_seed: int
    sampling: Sampling
    bundle: str
    ema: str

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all fields: the identity of one measurement."""
        return digest_of(spec(self))

    def comparable(self, other: "Passport") -> None:
        """Pass if both numbers were taken with one ruler, else raise RefusedError naming what differs."""
        differing = [
            f"{name} ({getattr(self, name)} against {getattr(other, name)})"
            for name in RULER
            if getattr(self, name) != getattr(other, name)
        ]
        if differing:
            raise RefusedError(f"two numbers cannot be compared: they differ in {', '.join(differing)}")
