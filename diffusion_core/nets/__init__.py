"""Networks: net(x, c, cond) -> a tensor like x, with x (B, C, H, W), c (B,) and cond {"label": (B,)}."""

from collections.abc import Mapping
from typing import ClassVar

from diffusion_core.nets.dit import DiT
from diffusion_core.spec import Blueprint


class NetSpec(Blueprint):
    """A network not yet built."""

    known: ClassVar[Mapping[str, type]] = {"dit": DiT}
