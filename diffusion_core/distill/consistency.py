"""Consistency distillation: every point of a path is sent to the path's clean end (Song et al. 2023, arXiv 2303.01469).

The student's x₀ at t is pulled to a slowly following copy's x₀ one teacher step further down the same path.
The boundary f(x, 0) = x needs no skip connection: at t = 0 the sample *is* the pair's x₀. The distance is
pseudo-Huber and the number of intervals doubles along the way (Song and Dhariwal 2024, arXiv 2310.14189).
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.denoiser import Condition, Denoiser
from diffusion_core.distill.progressive import draw_interval
from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise, Stream
from diffusion_core.objective import Batch, Objective, drop_condition
from diffusion_core.pair import Pair, determinant, mix, unmix
from diffusion_core.target import FLOW


@dataclass(frozen=True)
class Consistency:
    """Numbers of the method: intervals double from `fewest` to `most` over the run; `huber` is c for one dimension."""

    fewest: int = 8
    most: int = 64
    huber: float = 0.03
    follow: float = 0.98

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most:
            raise ConfigError(f"fewest {self.fewest}, most {self.most}: 1 <= fewest <= most is wanted")
        if not (self.huber > 0 and 0 <= self.follow < 1):
            raise ConfigError(f"huber {self.huber}, follow {self.follow}: huber > 0 and 0 <= follow < 1 are wanted")

    def intervals(self, step: int, steps: int) -> int:
        """How many pieces the path is cut into at a step of `steps`."""
        doublings = (self.most // self.fewest).bit_length()
        return min(self.most, self.fewest << step * doublings // max(steps, 1))


class ConsistencyDistillation(Objective):
    """Make a student's answer the same all along the teacher's path."""

    def __init__(self, student: Denoiser, teacher: Denoiser, method: Consistency, steps: int, drop_cond: float = 0.0):
        self.student, self.teacher, self.method, self.steps = student, teacher, method, steps
        self.drop_cond = drop_cond
        self.follower = deepcopy(student).requires_grad_(False)
        self.modules, self.carried = {"student": student}, {"follower": self.follower}

    def losses(self, batch: Batch, step: int, noise: Noise) -> Iterator[tuple[str, Tensor]]:
        schedule = self.student.schedule
        t, s = draw_interval(noise, self.method.intervals(step, self.steps), self.student.first)
        x = mix(Pair(batch.x, noise.normal(batch.x.shape[1:], Stream.NOISE).to(batch.x)), schedule(t))
        cond = drop_condition(batch.cond, noise, self.drop_cond)
        with torch.no_grad():
            nearer = self._teacher_step(x, t, s, cond)
            wanted = self.follower(nearer, s, cond).x0
            wanted = torch.where((s > 0).reshape(-1, 1, 1, 1), wanted, nearer)  # the boundary, exactly
        error = (self.student(x, t, cond).x0 - wanted).square().flatten(1).mean(1)
        huber = self.method.huber
        yield "student", ((error + huber**2).sqrt() - huber).mean()

    def _teacher_step(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """One Heun step of the teacher in the FLOW frame, which is finite at both ends.

        Into a clean end where the teacher's target cannot be read (x₀ says nothing of the noise there), first order.
        """
        schedule, frame = self.student.schedule, FLOW()(self.student.schedule, t)
        level, to = schedule(t), schedule(s)
        pair = self.teacher(x, t, cond)
        there = self.teacher(mix(pair, to), s, cond)
        told = torch.as_tensor(determinant(to, self.teacher.target(schedule, s)))
        readable = (told.isfinite() & (told != 0)).reshape(-1, 1, 1, 1)
        second = torch.where(readable, mix(there, frame), mix(pair, frame))
        return mix(unmix(x, level, (mix(pair, frame) + second) / 2, frame), to)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for follower, student in zip(self.follower.parameters(), self.student.parameters(), strict=True):
            follower.lerp_(student, 1 - self.method.follow)
