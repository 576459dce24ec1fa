"""Adversarial terms: a critic learns to tell pictures from reconstructions, the codec to be taken for a picture.

    critic   E[max(0, 1 - D(x))] + E[max(0, 1 + D(x̂))]        hinge loss (Lim and Ye 2017, arXiv 1705.02894, eq. 5)
    codec    -λ E[D(x̂)],   λ = weight · |∇L_rec| / (|∇L_adv| + 10⁻⁶)

Both gradients are those of the decoder's last layer, so that the critic pulls with a fixed share of the force of the
reconstruction (Esser et al. 2021, arXiv 2012.09841, eq. 7).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffusion_core.errors import ConfigError
from diffusion_core.nets.critic import PatchCritic
from diffusion_core.parallel import World
from diffusion_core.spec import Kind

TINY, MOST = 1e-6, 1e4  # λ/weight is bounded: a critic without a gradient would make it infinite


class Adversarial(Kind, ABC):
    """A critic to be built, the `weight` of its term and from how many images on it counts."""

    weight: float
    start_images: int

    @abstractmethod
    def build(self, channels: int) -> nn.Module:
        """A critic with fresh weights of pictures of so many channels."""

    @property
    @abstractmethod
    def smallest(self) -> int:
        """The shortest side of a picture that the critic can see, in pixels."""


@dataclass(frozen=True)
class Patch(Adversarial):
    """A critic of patches (Isola et al. 2017): `layers` halvings from `width` channels on, with group norm or none."""

    weight: float = 0.5
    start_images: int = 0
    width: int = 64
    layers: int = 3
    norm: Literal["group", "none"] = "group"

    def __post_init__(self) -> None:
        if self.weight < 0 or self.start_images < 0:
            raise ConfigError(f"weight {self.weight}, start_images {self.start_images}: 0 or more are wanted")

    def build(self, channels: int) -> PatchCritic:
        return PatchCritic(channels, self.width, self.layers, self.norm)

    @property
    def smallest(self) -> int:
        return 3 << self.layers


def critic_loss(critic: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """The hinge loss of a critic on pictures and reconstructions (B, C, H, W), neither of which gets a gradient."""
    loss: Tensor = (1 - critic(real)).relu().mean() + (1 + critic(made.detach())).relu().mean()
    return loss


def codec_loss(critic: nn.Module, made: Tensor) -> Tensor:
    """Minus what the critic says of reconstructions (B, C, H, W); its own weights get no gradient."""
    frozen = {name: tensor.detach() for name, tensor in critic.state_dict(keep_vars=True).items()}
    said: Tensor = functional_call(critic, frozen, (made,))
    return -said.mean()


def balance(reconstruction: Tensor, adversarial: Tensor, layer: Tensor) -> Tensor:
    """λ/weight: how many times larger the reconstruction's gradient in a layer is, at most 10⁴ (Esser et al. 2021).

    The norms are those of the gradients' means over the ranks, so that any number of workers finds the same.
    """
    if not reconstruction.requires_grad:  # nothing is being trained: the loss is only looked at
        return torch.ones_like(reconstruction)
    ours, theirs = (
        World.current().average(torch.autograd.grad(loss, layer, retain_graph=True)[0]).norm()
        for loss in (reconstruction, adversarial)
    )
    ratio: Tensor = ours / (theirs + TINY)
    return ratio.clamp(max=MOST).detach()
