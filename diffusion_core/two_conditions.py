"""Guidance to two conditions, each with a scale of its own (Brooks et al. 2023, arXiv 2211.09800, eq. 3).

    reading = free + w₁·(first - free) + w₂·(both - first)

(1, 1) is plain conditional, (0, 0) unconditional, (1, 0) the first condition alone. Only what counts is asked for.
"""

import math
from collections.abc import Sequence

from torch import Tensor, zeros_like

from diffusion_core.denoiser import Condition, Reader, Said, without_condition
from diffusion_core.errors import ConfigError, suggest
from diffusion_core.guidance import TOGETHER, Guide, Interval, ask, checked, scale_at, something


class TwoConditions(Guide):
    """Guidance to two conditions at times inside `interval`; plain conditional outside it.

    `first_names` and `second_names` say which entries of cond make up each condition; entries of neither always stay.
    Raises ConfigError for a scale below 0, an interval outside [0, 1] and, when asked, a name that cond lacks.
    """

    def __init__(
        self,
        denoiser: Reader,
        first_scale: float,
        second_scale: float,
        interval: Interval = (0.0, 1.0),
        *,
        first_names: Sequence[str] = ("image",),
        second_names: Sequence[str] = ("text", "mask"),
        together: int = TOGETHER,
    ):
        super().__init__(denoiser)
        self.scales = float(first_scale), float(second_scale)
        if not 0 <= min(self.scales) <= max(self.scales) < math.inf:
            raise ConfigError(f"guidance scales {first_scale} and {second_scale}: two numbers of 0 or more are wanted")
        self.first_names, self.second_names = tuple(first_names), tuple(second_names)
        self.interval, self.together = checked(interval), together

    def read(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """The guided reading in x (B, ...) at times t (B,) or at one for all."""
        both = something(cond)
        first = without(both, self.second_names)
        one, two = (scale_at(scale, t, self.interval, x) for scale in self.scales)
        terms = ((two, both), (one - two, first), (1 - one, without(first, self.first_names)))
        counted = [(weight, cond) for weight, cond in terms if isinstance(weight, Tensor) or weight]
        said = ask(self.denoiser, x, t, [cond for _, cond in counted], self.together)
        parts = [weight * one.reading for (weight, _), one in zip(counted, said, strict=True)]
        return Said(sum(parts[1:], parts[0]), said[0].spread)


def without(cond: Condition, names: Sequence[str]) -> Condition:
    """The same batch with nothing asked for under some names: what has no null of its own, such as a picture, is zeros.

    Raises ConfigError for a name that cond lacks.
    """
    for name in names:
        if name not in cond:
            raise ConfigError(f"condition '{name}' is not there to be dropped; {suggest(name, cond)}")
    free = without_condition(cond)
    kept = {name: value for name, value in cond.items() if name not in names}
    return kept | {name: zeros_like(cond[name]) if free[name] is cond[name] else free[name] for name in names}
