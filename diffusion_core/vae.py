"""KL autoencoders (Kingma and Welling 2014, arXiv 1312.6114; as codecs: Rombach et al. 2022, arXiv 2112.10752).

The encoder says μ(x) and ln σ²(x) of a Gaussian, the decoder makes a picture x̂ of one draw from it; both are trained by

    |x - x̂|² or |x - x̂|  +  w · d(x, x̂)  +  kl · KL(N(μ, σ²) ‖ N(0, 1))  -  λ D(x̂),     x̂ = decode(μ + σε),  ε ~ N(0, 1)

a pixel. The perceptual distance d and the critic D are optional; the critic is trained beside the codec, on the same x̂.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.codec import Codec, Moments, Pixel
from diffusion_core.critic import Adversarial, balance, codec_loss, critic_loss
from diffusion_core.errors import ConfigError, DataError
from diffusion_core.nets.autoencoder import Decoder, Encoder, Residual
from diffusion_core.noise import Noise
from diffusion_core.objective import Batch, Objective
from diffusion_core.perceptual import Perceptual
from diffusion_core.spec import Blueprint
from diffusion_core.spread import Spread


class KlCodec(Codec):
    """A codec whose raw latent is a Gaussian, N(mean, exp(log-variance)), that the encoder gives in one tensor.

    The latent is shifted and scaled to zero mean and unit variance by two numbers a channel, z = (raw - shift) * scale,
    recorded as buffers by `normalize` after training.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, channels: int, latent: int, factor: int):
        super().__init__()
        self.channels, self.latent, self.factor = channels, latent, factor
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("shift", torch.zeros(latent, 1, 1))
        self.register_buffer("scale", torch.ones(latent, 1, 1))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, c, h, w) of the raw latent, before shift and scale.

        Raises ConfigError for pictures whose channels or sides the codec cannot take.
        """
        self.latent_shape(x.shape[1:])
        mean, log_var = self.encoder(x).chunk(2, 1)
        return mean, log_var.clamp(-30, 20)

    def raw(self, x: Tensor) -> Moments:
        """The moments of the raw latents of pictures x."""
        mean, log_var = self.posterior(x)
        return Moments(mean, (log_var / 2).exp())

    def encode(self, x: Tensor) -> Moments:
        mean, std = self.raw(x)
        return Moments((mean - self.shift) * self.scale, std * self.scale)

    def decode(self, z: Tensor) -> Tensor:
        if z.shape[1] != self.latent:
            raise ConfigError(f"latents of {z.shape[1]} channels; the codec's have {self.latent}")
        return self.reconstruct(z / self.scale + self.shift)

    def reconstruct(self, raw: Tensor) -> Tensor:
        """Pictures of raw latents."""
        decoded: Tensor = self.decoder(raw)
        return decoded

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        channels, height, width = image_shape
        if channels != self.channels:
            raise ConfigError(f"pictures of {channels} channels; the codec takes {self.channels}")
        if height % self.factor or width % self.factor:
            raise ConfigError(f"pictures of {height}x{width} cannot be divided by {self.factor}, the codec's factor")
        return self.latent, height // self.factor, width // self.factor

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last convolution."""
        return [module for module in self.decoder.modules() if isinstance(module, nn.Conv2d)][-1].weight

    @torch.no_grad()
    def normalize(self, moments: Iterable[Moments]) -> None:
        """Set shift and scale from the raw moments of the training pictures, taken one batch at a time.

        Raises DataError for latents that are not finite or of a channel that is the same in all pictures.
        """
        spread = Spread()
        for batch in moments:
            spread.add(batch)
        mean, std = spread.channels()
        if not std.all():
            raise DataError(f"channels {(std == 0).nonzero().flatten().tolist()} of the latent are constant")
        self.shift.copy_(mean[:, None, None])
        self.scale.copy_(std.reciprocal()[:, None, None])


class KlVae(KlCodec):
    """A small convolutional autoencoder; each of `widths` after the first halves the side.

    Raises ConfigError for widths that 8, the groups of its norms, does not divide.
    """

    def __init__(self, channels: int, latent: int = 4, widths: tuple[int, ...] = (32, 64, 96)):
        _check_sizes(channels, latent, widths, groups=8)
        down: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for inner, outer in zip(widths, widths[1:], strict=False):
            down += [Residual(inner), nn.Conv2d(inner, outer, 4, stride=2, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(latent, widths[-1], 3, padding=1)]
        for outer, inner in zip(widths[::-1], widths[-2::-1], strict=False):
            up += [Residual(outer), nn.ConvTranspose2d(outer, inner, 4, stride=2, padding=1)]
        super().__init__(
            nn.Sequential(*down, Residual(widths[-1]), nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)),
            nn.Sequential(*up, Residual(widths[0]), nn.Conv2d(widths[0], channels, 3, padding=1)),
            channels=channels,
            latent=latent,
            factor=2 ** (len(widths) - 1),
        )


class LdmVae(KlCodec):
    """The autoencoder of latent diffusion (Rombach et al. 2022, appendix G); each of `widths` after the first halves.

    `depth` residuals a level in the encoder and one more in the decoder, norms of `groups` groups, `attention` in the
    middle, 1x1 convolutions after the encoder (`quant`) and before the decoder (`post_quant`); `checkpointing` trades
    a second forward pass for the memory of activations. Raises ConfigError for widths that `groups` does not divide.
    """

    def __init__(
        self,
        channels: int,
        latent: int = 4,
        widths: tuple[int, ...] = (128, 256, 512, 512),
        depth: int = 2,
        groups: int = 32,
        attention: bool = True,
        quant: bool = True,
        post_quant: bool = True,
        checkpointing: bool = False,
    ):
        _check_sizes(channels, latent, widths, groups)
        if depth < 1:
            raise ConfigError(f"depth {depth}: at least 1 residual a level is wanted")
        super().__init__(
            Encoder(channels, latent, widths, depth, groups, attention, quant, checkpointing),
            Decoder(channels, latent, widths, depth, groups, attention, post_quant, checkpointing),
            channels=channels,
            latent=latent,
            factor=2 ** (len(widths) - 1),
        )


def _check_sizes(channels: int, latent: int, widths: tuple[int, ...], groups: int) -> None:
    if min(channels, latent, groups) < 1:
        raise ConfigError(f"channels {channels}, latent {latent}, groups {groups}: each is at least 1")
    if not widths or any(width < 1 or width % groups for width in widths):
        raise ConfigError(
            f"widths {list(widths)}: at least one is wanted, each a multiple of {groups}, the norm groups"
        )


class VaeLoss(Objective):
    """Error plus `kl` times the divergence from a standard normal, both a pixel, and the optional terms.

    `batch` is the plan's, in which the images are counted after which the critic starts. Raises ConfigError for a
    negative `kl` and what `perceptual` and `adversarial` raise when they are built.
    """

    def __init__(
        self,
        vae: KlCodec,
        kl: float,
        *,
        reconstruction: Literal["mse", "l1"] = "mse",
        perceptual: Perceptual | None = None,
        adversarial: Adversarial | None = None,
        batch: int = 1,
    ):
        if kl < 0:
            raise ConfigError(f"kl {kl}: a weight of 0 or more is wanted")
        self.vae, self.kl, self.batch = vae, kl, batch
        self.error = F.mse_loss if reconstruction == "mse" else F.l1_loss
        self.perceptual, self.adversarial = perceptual, adversarial
        self.modules = {"vae": vae}
        if perceptual is not None:
            self.distance = perceptual.build().to(vae.shift.device)
        if adversarial is not None:
            self.critic = adversarial.build(vae.channels).to(vae.shift.device)
            self.modules = {"vae": vae, "critic": self.critic}

    def losses(self, batch: Batch, step: int, noise: Noise) -> Iterator[tuple[str, Tensor]]:
        """The codec's loss and, once the critic has started, the critic's on the same reconstructions."""
        mean, log_var = self.vae.posterior(batch.x)
        made = self.vae.reconstruct(Moments(mean, (log_var / 2).exp()).draw(noise))
        loss = self.error(made, batch.x)
        if self.perceptual is not None:
            loss = loss + self.perceptual.weight * self.distance(made, batch.x).mean()
        divergence = self.kl * kl_divergence(mean, log_var) / batch.x[0].numel()
        if self.adversarial is None or step * self.batch < self.adversarial.start_images:
            yield "vae", loss + divergence
            return
        taken = codec_loss(self.critic, made)
        share = self.adversarial.weight * balance(loss, taken, self.vae.last_layer)
        yield "vae", loss + divergence + share * taken
        yield "critic", critic_loss(self.critic, batch.x, made)


def kl_divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) in nats, summed over the latent, mean over the batch."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1).mean()


class CodecSpec(Blueprint):
    """A codec not yet built."""

    known: ClassVar[Mapping[str, type]] = {"pixel": Pixel, "kl_vae": KlVae, "ldm_vae": LdmVae}

    def shaped(self, channels: int) -> Self:
        """The same codec for pictures of so many channels."""
        return self if self.kind == "pixel" else self.extended(channels=channels)
