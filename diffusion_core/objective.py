"""Objectives: which modules are trained, and a loss for each. Regression, distillation and codecs alike."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from diffusion_core.denoiser import Condition, Denoiser, without_condition
from diffusion_core.errors import ConfigError, DataError
from diffusion_core.noise import Noise, Stream
from diffusion_core.pair import Pair, Row, mix
from diffusion_core.uncertainty import Uncertainty
from diffusion_core.weighting import Times, Weight

NAMED = 8  # how many culprits an error names


class Batch(NamedTuple):
    """This rank's rows of one global batch: samples (B, C, H, W), conditions and the samples' ids (B,)."""

    x: Tensor
    cond: Condition
    ids: Tensor


class Objective(ABC):
    """What `fit` drives. It steps one module at a time, with all the others frozen.

    `modules` are trained, one optimizer each. `carried` are not, but must survive a restart (target networks).
    """

    modules: Mapping[str, nn.Module]
    carried: Mapping[str, nn.Module] = {}

    @abstractmethod
    def losses(self, batch: Batch, step: int, noise: Noise) -> Iterator[tuple[str, Tensor]]:
        """Each module to step and its scalar loss, in order; `noise` is bound to (seed, step, ids)."""

    def after_step(self, step: int) -> None:
        """Called when every module has been stepped, to move targets and annealing on."""
        del step


class Look(NamedTuple):
    """A noisy sample x (B, ...) at times t (B,), the pair it was made of and the pair a denoiser saw in it.

    `said` is the row of the reading that the denoiser's network says there.
    """

    t: Tensor
    x: Tensor
    pair: Pair
    seen: Pair
    said: Row


class Regression(Objective):
    """The whole of DDPM, EDM and flow-matching training: make the network say its reading of the hidden pair.

    The condition is dropped for a share `drop_cond` of the samples, so that guidance has an unconditional
    branch (Ho and Salimans 2022, algorithm 1). With an `uncertainty`, trained beside the denoiser, the loss L of
    each noise level becomes L/exp(u) + u (Karras et al. 2024, arXiv 2312.02696, eq. 21).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        times: Times,
        weight: Weight,
        drop_cond: float = 0.1,
        uncertainty: Uncertainty | None = None,
    ):
        if not 0 <= drop_cond < 1:
            raise ConfigError(f"drop_cond {drop_cond}: a share in [0, 1) is wanted")
        self.denoiser, self.times, self.weight, self.drop_cond = denoiser, times, weight, drop_cond
        self.uncertainty = uncertainty
        self.modules = {"denoiser": denoiser} | ({} if uncertainty is None else {"uncertainty": uncertainty})

    def losses(self, batch: Batch, step: int, noise: Noise) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's loss and then the uncertainty's; raises DataError for a batch that is not finite."""
        check_batch(batch)
        look = self._look(batch, noise)
        loss = self.each(look)
        if self.uncertainty is None:
            yield "denoiser", loss.mean()
            return
        told = self.denoiser.label(self.denoiser.schedule(look.t), look.t)
        u = self.uncertainty(told.to(loss)).to(loss)
        # The two gradients of the one loss, each cut off from the other's weights, as modules are stepped in turn.
        yield "denoiser", (loss / u.detach().exp()).mean()
        yield "uncertainty", (loss.detach() / u.exp() + u).mean()

    def each(self, look: Look) -> Tensor:
        """The weighted loss of every sample (B,)."""
        error = (mix(look.seen, look.said) - mix(look.pair, look.said)).square().flatten(1).mean(1)
        return self.weight(self.denoiser.schedule, look.t, look.said).to(error) * error

    def _look(self, batch: Batch, noise: Noise) -> Look:
        schedule = self.denoiser.schedule
        t = self.times(noise.uniform((), Stream.TIME), schedule, self.denoiser.first)
        pair = Pair(batch.x, noise.normal(batch.x.shape[1:], Stream.NOISE).to(batch.x))
        x = mix(pair, schedule(t))
        seen = self.denoiser(x, t, drop_condition(batch.cond, noise, self.drop_cond))
        return Look(t, x, pair, seen, self.denoiser.target(schedule, t))


def drop_condition(cond: Condition, noise: Noise, share: float) -> Condition:
    """The conditions with nothing asked for in about `share` of the samples: no class and no text."""
    return without_condition(cond, noise.uniform((), Stream.DROPOUT) < share)


def check_batch(batch: Batch) -> None:
    """Raise DataError naming the tensor and the samples if a picture or a condition holds NaN or infinity."""
    floating = {name: value for name, value in batch.cond.items() if value.is_floating_point()}
    for name, value in ({"x": batch.x} | floating).items():
        if value.sum().isfinite():  # one pass over the numbers; whose they are is asked only of a bad batch
            continue
        bad = batch.ids[~value.isfinite().flatten(1).all(1)].tolist()
        if bad:
            more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            raise DataError(f"{name} of samples {bad[:NAMED]}{more} holds numbers that are not finite")
