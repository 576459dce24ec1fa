"""Learned uncertainty: how hard each noise level is, so that none drowns the others in training.

The loss L at a noise level becomes L/exp(u) + u with a log-variance u that is learned beside the network
(Karras et al. 2024, arXiv 2312.02696, eq. 14 to 16 and 21; Kendall and Gal 2018, arXiv 1705.07115). Where its
derivative 1 - E[L]/exp(u) vanishes, u = ln E[L]: every level then weighs on the gradient with a mean loss of 1.
"""

from torch import Tensor, nn

from diffusion_core.nets.magnitude import FourierFeatures


class Uncertainty(nn.Module):
    """The log-variance u of the loss at a noise level: one linear map of `width` Fourier features; 0 at init."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.features = FourierFeatures(width)
        self.read = nn.Linear(width, 1)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def forward(self, c: Tensor) -> Tensor:
        """The number c (B,) by which a network is told the noise level -> u (B,)."""
        u: Tensor = self.read(self.features(c)).squeeze(1)
        return u
