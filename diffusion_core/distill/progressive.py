"""Progressive distillation: one step of the student does two of the teacher's (Salimans and Ho 2022, arXiv 2202.00512).

The target needs no formula: the sample at t and the sample the teacher reaches at s are two readings of the
pair that one straight step from t to s would hold (the paper's appendix G).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffusion_core.denoiser import Denoiser
from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise, Stream
from diffusion_core.objective import Batch, Objective, drop_condition
from diffusion_core.pair import Pair, mix, unmix
from diffusion_core.weighting import Weight


class Progressive(Objective):
    """Teach a student that takes `steps` uniform steps to land where its teacher lands in twice as many."""

    def __init__(self, student: Denoiser, teacher: Denoiser, steps: int, weight: Weight, drop_cond: float = 0.0):
        if steps < 1:
            raise ConfigError(f"steps {steps}: at least 1 is wanted")
        self.student, self.teacher, self.steps, self.weight = student, teacher, steps, weight
        self.drop_cond = drop_cond
        self.modules = {"student": student}

    def losses(self, batch: Batch, step: int, noise: Noise) -> Iterator[tuple[str, Tensor]]:
        schedule, target, first = self.student.schedule, self.student.target, self.student.first
        t, s = draw_interval(noise, self.steps, first)
        level, to = schedule(t), schedule(s)
        x = mix(Pair(batch.x, noise.normal(batch.x.shape[1:], Stream.NOISE).to(batch.x)), level)
        cond = drop_condition(batch.cond, noise, self.drop_cond)
        with torch.no_grad():
            middle = (t + s) / 2
            halfway = mix(self.teacher(x, t, cond), schedule(middle))
            landed = mix(self.teacher(halfway, middle, cond), to)
            wanted = unmix(x, level, landed, to)
        said = target(schedule, t)
        error = (mix(self.student(x, t, cond), said) - mix(wanted, said)).square().flatten(1).mean(1)
        yield "student", (self.weight(schedule, t, said).to(error) * error).mean()


def draw_interval(noise: Noise, intervals: int, first: float) -> tuple[Tensor, Tensor]:
    """One of the `intervals` equal pieces of [0, first] a sample: its noisy end t and its clean end s, float64 (B,)."""
    index = (noise.uniform((), Stream.TIME) * intervals).floor()
    return first * (index + 1) / intervals, first * index / intervals
