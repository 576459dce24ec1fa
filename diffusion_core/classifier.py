"""Classifier guidance (Dhariwal and Nichol 2021, arXiv 2105.05233, eq. 14): a classifier of noisy samples steers.

ε <- ε - w·σₜ·∇log p(y | xₜ)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_core.denoiser import SMALLEST_DETERMINANT, Condition, Reader, Said, rows
from diffusion_core.errors import ConfigError, RefusedError
from diffusion_core.guidance import Guide, Interval, checked
from diffusion_core.pair import determinant

LogProb = Callable[[Tensor, Tensor, Condition | None], Tensor]


class ClassifierGuided(Guide):
    """A reader steered by a classifier at times inside `interval`, with scale w: 1 is Bayes' rule, 0 none.

    The reader sees the same cond; for the unconditional reading of a conditional model, steer CFG(model, 0).
    `log_prob` takes x (B, ...), t (B,) in float64 and cond and gives log p(y | x) as (B,); one sample's must depend
    on no other's. It works under no_grad and inference_mode; the guided reading itself is not differentiated.
    Raises ConfigError for a scale below 0 or an interval outside [0, 1], RefusedError where it would steer pure
    noise: x₀ is what is left of x without its noise, and nothing is left there.
    """

    def __init__(self, denoiser: Reader, log_prob: LogProb, scale: float = 1.0, interval: Interval = (0.0, 1.0)):
        super().__init__(denoiser)
        if not scale >= 0:
            raise ConfigError(f"classifier scale {scale}: 0 (none), 1 (Bayes' rule) or more is wanted")
        self.log_prob, self.scale, self.interval = log_prob, scale, checked(interval)
        noisiest = min(self.first, interval[1])
        if self.schedule.level(noisiest).row.a < SMALLEST_DETERMINANT:
            raise RefusedError(
                f"classifier guidance at t = {noisiest:g} of {self.schedule}: it turns the noise read, which tells "
                "nothing of the picture in pure noise; end the interval or start below it"
            )

    def read(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """The steered reading in x (B, ...) at times t (B,) or at one for all."""
        said = self.denoiser.read(x, t, cond)
        low, high = self.interval
        if self.scale == 0 or (not isinstance(t, Tensor) and not low <= t <= high):
            return said
        level, of = rows(self.schedule, self.target, t)
        # what a change of ε by one changes in the reading, since x stays
        change = -self.scale * level.b * determinant(level, of) / level.a
        if isinstance(t, Tensor):
            change = torch.where((t >= low) & (t <= high), change, 0).to(x).reshape(-1, *(1,) * (x.ndim - 1))
        return said._replace(reading=said.reading + change * self.gradient(x, t, cond))

    def gradient(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Tensor:
        """∇ log p(y | x) for each sample, like x."""
        with torch.inference_mode(False), torch.enable_grad():  # clones, as inference tensors know no gradients
            times = t.clone() if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.float64).to(x.device)
            asked = None if cond is None else {name: value.clone() for name, value in cond.items()}
            sample = x.detach().clone().requires_grad_()
            (found,) = torch.autograd.grad(self.log_prob(sample, times, asked).sum(), sample)
        return found
