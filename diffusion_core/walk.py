"""The only sampling loop in the library: from level to level, hold a pair, turn its noise, mix it where it lands.

It adds and scales what it is given and nothing else, so it runs on tensors and on anything else that can be added
and scaled: given linear forms, it writes down the table of coefficients by which sampling is done (table.py).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_core.chain import jump
from diffusion_core.errors import ConfigError
from diffusion_core.pair import mix
from diffusion_core.renoise import Keep, Renoise
from diffusion_core.schedule import Level, Schedule
from diffusion_core.solver import Denoise, Kept, Leg, Memory, Solver

Draw = Callable[[int, int], Tensor]  # (step, number of the draw in it) -> standard normal noise like x


def no_noise(step: int, number: int) -> Tensor:
    """The draw of a path that needs none; raises ConfigError when it is asked for."""
    raise ConfigError(f"step {step} draws fresh noise; give the sampler a Noise")


def walk(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    solver: Solver,
    schedule: Schedule,
    *,
    renoise: Renoise = Keep(),  # noqa: B008 (a frozen value)
    draw: Draw = no_noise,
    memory: Memory = Memory(),  # noqa: B008
    settle: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Carry x (B, ...), a sample at the first level, along the levels and return it at the last.

    A leg that goes up, toward noise, is a jump of the forward process and asks the network nothing. `memory` is what
    a multistep solver already knows. `settle` is shown every value that outlives its step.
    """
    for step, (level, to) in enumerate(pairwise(levels)):

        def fresh(number: int, step: int = step) -> Tensor:
            return draw(step, number)

        if to.log_snr < level.log_snr:
            kept, spread = jump(level, to)
            x, memory = settle(kept * x + spread * fresh(0)), Memory()
            continue
        pair, memory = solver.hold(denoise, x, Leg(level, to, schedule, len(levels) - 1), memory, fresh)
        x = settle(mix(renoise.turn(pair, level, to, fresh), to.row))
        memory = Memory(tuple(Kept(place, settle(reading)) for place, reading in memory.kept))
    return x
