"""The forward process between two levels, and its inverse given the picture: q(xₜ | xₛ) and q(xₛ | xₜ, x₀).

xₜ = r·xₛ + √β·z,   r = αₜ/αₛ,   β = σₜ² - r²σₛ²        (Ho et al. 2020, arXiv 2006.11239, eq. 2)
"""

import math
from typing import NamedTuple

from diffusion_core.errors import RefusedError
from diffusion_core.pair import Numbers
from diffusion_core.schedule import Level


class Posterior(NamedTuple):
    """q(xₛ | xₜ, x₀) = N(x0·x₀ + xt·xₜ, std²), all plain numbers (Ho et al. 2020, eq. 6 and 7)."""

    x0: float
    xt: float
    std: float


def jump(level: Level, to: Level) -> Numbers:
    """The forward process from a level to a noisier one, as (factor of the sample, standard deviation of the noise).

    Raises RefusedError where `to` is less noisy.
    """
    out_of_noise = math.inf  # so that it is refused
    kept = to.row.a and (to.row.a / level.row.a if level.row.a else out_of_noise)
    added = to.row.b**2 - (kept * level.row.b) ** 2
    if added < -1e-12 * to.row.b**2:
        raise RefusedError(f"no forward jump from t = {level.t:g} to t = {to.t:g}: there is less noise there")
    return Numbers(kept, math.sqrt(max(0.0, added)))


def posterior(level: Level, to: Level) -> Posterior:
    """The law of the sample at the less noisy level `to`, given the sample at `level` and the clean picture.

    Raises RefusedError where `to` is noisier or `level` is clean.
    """
    if level.clean:
        raise RefusedError(f"no way back from t = {level.t:g}: there is no noise to take away")
    kept, spread = jump(to, level)
    share = (to.row.b / level.row.b) ** 2
    return Posterior(to.row.a * spread**2 / level.row.b**2, kept * share, spread * to.row.b / level.row.b)
