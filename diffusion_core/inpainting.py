"""Inpainting: some of the picture is known, so nothing else is ever read there.

x₀ is the known picture under the mask, at every level; the noise read there is then whatever else is in x. Every
renoise rule therefore draws the known part from q(xₛ | xₜ, x₀ = known), and it ends at the known picture itself.
RePaint (Lugmayr et al. 2022, arXiv 2201.09865) is this guide with Ancestral(1) on a grid that jumps back to noise
and repeats its steps: each time, the unknown part comes to agree better with the known one.
"""

import torch
from torch import Tensor

from diffusion_core.denoiser import Condition, Reader, Said
from diffusion_core.errors import ConfigError
from diffusion_core.guidance import Guide
from diffusion_core.target import X0


class Inpaint(Guide):
    """A reader that reads `known` (B or 1, C, H, W) wherever `mask` (B or 1, C or 1, H, W), of bools, is true.

    It must be the outermost guide. Under the mask the clean end is `known` bit for bit with solvers that hold x₀ or
    what the reader says, else up to rounding. Raises ConfigError for a mask that is not of bools or another shape.
    """

    known: Tensor
    mask: Tensor

    def __init__(self, denoiser: Reader, known: Tensor, mask: Tensor):
        super().__init__(denoiser)
        if mask.dtype != torch.bool:
            raise ConfigError(f"mask of {mask.dtype}; torch.bool is wanted, true where the picture is known")
        try:
            torch.broadcast_shapes(known.shape, mask.shape)
        except RuntimeError:
            raise ConfigError(f"mask {tuple(mask.shape)} does not fit the known picture {tuple(known.shape)}") from None
        self.target = X0()
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def read(self, x: Tensor, t: Tensor | float, cond: Condition | None) -> Said:
        """x₀ in x (B, ...) at times t (B,) or at one for all, the known picture under the mask."""
        x0, _, spread = self.denoiser(x, t, cond)
        return Said(torch.where(self.mask, self.known.to(x0.dtype), x0), spread)
