"""Networks: net(x, c, cond) -> a tensor like x.

x (B, C, H, W), c (B,) the number that tells the noise level, and cond none or what is known of {"label": (B,),
"text": (B, L, D), "mask": (B, L)}: classes (-1 is none), words, and which of them are real.
"""

from collections.abc import Mapping
from typing import ClassVar

from diffusion_core.nets.dit import DiT
from diffusion_core.nets.edm2 import Edm2
from diffusion_core.nets.lean import Lean
from diffusion_core.nets.mmdit import MMDiT
from diffusion_core.nets.unet import UNet
from diffusion_core.nets.uvit import UViT
from diffusion_core.spec import Blueprint


class NetSpec(Blueprint):
    """A network not yet built."""

    known: ClassVar[Mapping[str, type]] = {
        "dit": DiT,
        "edm2": Edm2,
        "lean": Lean,
        "mmdit": MMDiT,
        "unet": UNet,
        "uvit": UViT,
    }
