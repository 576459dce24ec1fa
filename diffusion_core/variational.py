"""The variational bound of a chain: what every step back costs in code length, and training by it.

    -ln p(x₀) <= KL(q(x_T | x₀) ‖ N(0, σ_T²)) + Σ KL(q(xₛ | xₜ, x₀) ‖ p(xₛ | xₜ)) - ln p(x₀ | x₁)
                 L_T                           L_{T-1} ... L_1                     L_0

(Ho et al. 2020, arXiv 2006.11239, eq. 5.) p steps back as the sampler with renoise `ancestral` or `learned` does, from
the noise that it starts from. Data are continuous: p(x₀ | x₁) is a Gaussian density, not the probability of an 8-bit
value, so that for pictures of 2⁸ values in [-1, 1] a discretized model's bits are about 7 more a dimension.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_core.chain import jump, posterior
from diffusion_core.denoiser import Condition, Denoiser, Reader
from diffusion_core.errors import ConfigError
from diffusion_core.grid import Uniform
from diffusion_core.noise import Noise, Stream
from diffusion_core.objective import Look, Regression
from diffusion_core.pair import Pair, mix
from diffusion_core.schedule import Level
from diffusion_core.weighting import Flat, Weight, WholeSteps

BIT = math.log(2)  # in nats


def gaussian_kl(mean: Tensor, log_var: Tensor, other_mean: Tensor, other_log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) ‖ N(other_mean, exp(other_log_var))) of each number, in nats."""
    off = (mean - other_mean).square() * (-other_log_var).exp()
    return (other_log_var - log_var + (log_var - other_log_var).exp() + off - 1) / 2


def gaussian_cost(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-ln N(x; mean, exp(log_var)) of each number, in nats."""
    return (math.log(2 * math.pi) + log_var + (x - mean).square() * (-log_var).exp()) / 2


class Chain:
    """The steps back along the levels of a grid, numbered from 0 at the noisy end, as tables of their numbers.

    A fixed variance is the posterior's; a learned one lies between it and the forward step's, their logarithms in
    `low` and `high` (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15). In the last step, into the clean picture, the
    posterior has none: there `low` is that of the step before, and a fixed variance is the forward step's.
    With a fixed variance a grid of equal steps in t never gets tight however fine it is; one even in log-SNR does.
    Raises ConfigError for fewer than two steps or levels that do not end clean.
    """

    def __init__(self, levels: Sequence[Level]):
        if len(levels) < 3 or not levels[-1].clean:
            raise ConfigError(f"{len(levels)} levels that end at t = {levels[-1].t:g}: 3 are wanted, the last clean")
        self.levels = tuple(levels)
        back = [posterior(level, to) for level, to in pairwise(levels)]
        low = [2 * math.log(one.std) for one in back[:-1]]
        self._mean = _table([one.x0 for one in back]), _table([one.xt for one in back])
        self.low = _table([*low, low[-1]])
        self.high = _table([2 * math.log(jump(to, at).b) for at, to in pairwise(levels)])

    @property
    def steps(self) -> int:
        """How many steps back there are."""
        return len(self.levels) - 1

    def cost(self, step: Tensor, x: Tensor, pair: Pair, seen: Pair) -> Tensor:
        """L_{T-1} to L_0 for steps (B,) 0 to T - 1, in nats of each number (B, ...).

        x is the sample at the noisy end of the step, `pair` what it is made of and `seen` what the denoiser says
        of it, with a `spread` where the variance is learned.
        """
        last = step == self.steps - 1
        of_x0, of_x, low, high = (_at(table, step, x) for table in (*self._mean, self.low, self.high))
        wanted, mean = of_x0 * pair.x0 + of_x * x, of_x0 * seen.x0 + of_x * x
        last = last.to(x.device).reshape(low.shape)
        log_var = torch.where(last, high, low) if seen.spread is None else low + (high - low) * seen.spread
        return torch.where(last, gaussian_cost(pair.x0, mean, log_var), gaussian_kl(wanted, low, mean, log_var))

    def start_cost(self, x: Tensor) -> Tensor:
        """L_T: how far the noised pictures x (B, ...) are from the noise that sampling starts from, in nats each."""
        a, b = self.levels[0].row
        log_var = torch.full_like(x, 2 * math.log(b))
        return gaussian_kl(a * x, log_var, torch.zeros_like(x), log_var)


@torch.no_grad()
def bound(reader: Reader, x: Tensor, levels: Sequence[Level], noise: Noise, cond: Condition | None = None) -> Tensor:
    """The terms L_T, L_{T-1}, ..., L_0 of pictures x (B, ...) in bits a dimension (B, T + 1); their sum is the bound.

    Every term but the first is one draw of an expectation over noise, one network call each; `levels` are those of
    a sampler's grid.
    """
    chain = Chain(levels)
    terms = [chain.start_cost(x)]
    for step, level in enumerate(levels[:-1]):
        pair = Pair(x, noise.normal(x.shape[1:], Stream.RENOISE + step).to(x))
        noisy = mix(pair, level.row)
        steps = torch.full((len(x),), step)
        terms.append(chain.cost(steps, noisy, pair, reader(noisy, level.t, cond)))
    return torch.stack([term.flatten(1).mean(1) for term in terms], 1) / BIT


class Hybrid(Regression):
    """L_simple + λ·L_vlb: a variance is learned beside the mean (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 16).

    L_vlb is in bits a dimension and estimated by `steps` times the cost of one step. Its gradient does not reach the
    mean (section 3.1). Raises ConfigError for a denoiser of fixed variance, which it has nothing to teach.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: int = 1000,
        weight: Weight = Flat(),  # noqa: B008 (a frozen value)
        share: float = 1e-3,
        drop_cond: float = 0.1,
    ):
        if denoiser.variance != "learned":
            raise ConfigError("the hybrid loss with a denoiser of fixed variance: build it with variance 'learned'")
        if share <= 0:
            raise ConfigError(f"share {share}: a number above 0 is wanted")
        super().__init__(denoiser, WholeSteps(steps), weight, drop_cond)
        self.share = share
        self.chain = Chain(Uniform().levels(denoiser.schedule, steps, denoiser.first))

    def each(self, look: Look) -> Tensor:
        """The hybrid loss of every sample (B,)."""
        step = (self.chain.steps * (1 - look.t / self.denoiser.first)).round().long()
        fixed = Pair(look.seen.x0.detach(), look.seen.eps.detach(), look.seen.spread)
        bits = self.chain.cost(step, look.x, look.pair, fixed).flatten(1).mean(1) / BIT
        return super().each(look) + self.share * self.chain.steps * bits


def _table(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _at(table: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """The entries for steps (B,), to be broadcast over the numbers of every sample."""
    return table.to(step.device)[step].to(like).reshape(-1, *(1,) * (like.ndim - 1))
