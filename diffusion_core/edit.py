"""SDEdit (Meng et al. 2022, arXiv 2108.01073, algorithm 1): noise a picture part of the way, then sample back.

Low strengths keep the picture, high ones only its outline; the noise hides what the strength lets go.
"""

from collections.abc import Sequence

from torch import Tensor

from diffusion_core.errors import ConfigError
from diffusion_core.noise import Noise, Stream
from diffusion_core.pair import Pair, mix
from diffusion_core.schedule import CLEAN, Level


def partial(x0: Tensor, levels: Sequence[Level], strength: float, noise: Noise) -> tuple[Tensor, Sequence[Level]]:
    """Where to sample from, and along which levels, to edit pictures or latents x0 (B, ...).

    From the first level whose time is `strength` or less: 0 gives the pictures themselves and nothing left to do,
    1 the whole of `levels` from the noise that unconditional sampling starts from, with what little of the pictures
    its first level still shows. Raises ConfigError for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength {strength}: a number in [0, 1] is wanted")
    place = next((place for place, level in enumerate(levels) if level.t <= strength), None)
    if strength == 0 or place is None or levels[place].clean:
        return x0, (CLEAN,)
    start = noise.normal(x0.shape[1:], Stream.START).to(x0)
    return mix(Pair(x0, start), levels[place].row), levels[place:]
