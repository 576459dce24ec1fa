"""Codecs: pictures <-> what is diffused. Pixel space is the identity codec.

A codec gives the *moments* of the latent rather than one sample of it, so a cache of latents freezes no noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_core.noise import Noise, Stream


class Moments(NamedTuple):
    """Mean and standard deviation of a latent given its picture, both (B, c, h, w)."""

    mean: Tensor
    std: Tensor

    def draw(self, noise: Noise) -> Tensor:
        """One latent a row, each from its own noise."""
        return self.mean + self.std * noise.normal(self.mean.shape[1:], Stream.LATENT).to(self.mean)


class Codec(nn.Module, ABC):
    """Pictures (B, C, H, W) in [-1, 1] <-> latents (B, c, h, w) of unit variance."""

    @abstractmethod
    def encode(self, x: Tensor) -> Moments:
        """The moments of the latents of pictures x."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """The pictures of latents z."""

    @abstractmethod
    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """(c, h, w) for pictures of shape (C, H, W); raises ConfigError for pictures this codec cannot take."""


class Pixel(Codec):
    """The identity: diffusion in pixel space."""

    def encode(self, x: Tensor) -> Moments:
        return Moments(x, torch.zeros_like(x))

    def decode(self, z: Tensor) -> Tensor:
        return z

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        channels, height, width = image_shape
        return channels, height, width
