"""DDIM inversion (Song et al. 2021, arXiv 2010.02502, section 5.3) and interpolation of latents.

The step down from level t to s is xₛ = αₛ·x₀(xₜ) + σₛ·ε(xₜ). Going up solves it for xₜ: with the noise ε guessed,
xₜ = αₜ·(xₛ - σₛ·ε)/αₛ + σₜ·ε; read a better guess off that, and again. One guess is plain inversion, wrong at first
order in the step; more find the fixed point, from which the first-order sampler comes back exactly.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_core.checks import check_finite
from diffusion_core.denoiser import Condition, Reader
from diffusion_core.errors import ConfigError
from diffusion_core.pair import Pair, mix
from diffusion_core.schedule import Level


def invert(
    reader: Reader, x: Tensor, levels: Sequence[Level], *, cond: Condition | None = None, guesses: int = 1
) -> Tensor:
    """The sample at the first of `levels` from which the first-order sampler arrives at x (B, ...) at the last.

    `guesses` network calls a step. Raises ConfigError for none, DataError for an x that is not finite.
    """
    if guesses < 1:
        raise ConfigError(f"guesses {guesses}: at least 1 a step is wanted")
    check_finite("x", x)
    for low, high in pairwise(reversed(levels)):
        up = high.row.a / low.row.a * x
        for _ in range(guesses):
            eps = reader(up, high.t, cond).eps
            up = mix(Pair((x - low.row.b * eps) / low.row.a, eps), high.row)
        x = up
    return x


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """The point a `share` of the way along the arc from one latent (B, ...) to another, sample by sample.

    Noise interpolated along the arc keeps its norm (Shoemake 1985); on a line it would shrink. Both ends are exact,
    and parallel latents are joined by the line.
    """
    if share in (0, 1):
        return (other if share else one).clone()
    a, b = one.flatten(1).double(), other.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-300)
    angle = cosine.clamp(-1, 1).arccos()
    sine = angle.sin()
    straight = sine < 1e-9
    safe = torch.where(straight, 1.0, sine)
    first = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / safe)
    second = torch.where(straight, share, (share * angle).sin() / safe)
    return (first[:, None] * a + second[:, None] * b).reshape(one.shape).to(one.dtype)
