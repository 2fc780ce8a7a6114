"""VAE with a convolutional encoder and decoder and a Real NVP posterior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geco_fast._checks import check_count
from geco_fast.nn._arguments import check_batch
from geco_fast.nn._vae import ImageVAE
from geco_fast.nn.conv import Conv2d
from geco_fast.nn.real_nvp import ConditionalRealNVP, standard_normal_log_prob
from geco_fast.objectives import VAEOutput


class NVPVAE(ImageVAE):
    r"""VAE+NVP: standard normal prior, conditional Real NVP posterior, convolutional decoder.

    Parameters
    ----------
    image_shape : (int, int, int)
        ``(C, H, W)``, with H and W at least 8.
    latent_features : int
        Size of the latent vector, at least 2.
    couplings : int
        Number of coupling layers of the posterior.
    hidden_features : sequence of int
        Widths of the hidden layers of each coupling's conditioner.
    context_shape : (int, int, int), optional
        ``(Cc, H, W)`` of context images, on which encoder and decoder are then conditioned.
    hidden_channels : int
        Channels of the convolutions at half resolution; twice as many below.
    encoder_features : int
        Features that the posterior is conditioned on, and the decoder on the context's.
    reversible : bool
        As of `ConditionalRealNVP`.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its range.

    Notes
    -----
    Rezende and Viola, "Taming VAEs" (2018), section 5. The KL is a one-sample Monte Carlo estimate,
    ``log q(z | x) - log p(z)``: unbiased, and so not always positive for one image.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> model = gf.nn.NVPVAE((1, 28, 28), latent_features=8, couplings=2, hidden_features=(32,))
    >>> output = model(torch.rand(2, 1, 28, 28))
    >>> output.reconstruction.shape, output.kl.shape
    (torch.Size([2, 1, 28, 28]), torch.Size([2]))
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        latent_features: int = 64,
        couplings: int = 8,
        hidden_features: Sequence[int] = (512, 512),
        context_shape: Sequence[int] | None = None,
        hidden_channels: int = 32,
        encoder_features: int = 256,
        reversible: bool = False,
    ) -> None:
        super().__init__(image_shape, context_shape, least=8)
        channels, height, width = self.image_shape
        self.latent_features = check_count("latent_features", latent_features, least=2)
        check_count("hidden_channels", hidden_channels)
        check_count("encoder_features", encoder_features)
        context_channels = 0 if self.context_shape is None else self.context_shape[0]
        size = (height, width, hidden_channels, encoder_features)
        self.encoder = _encoder(channels + context_channels, *size)
        self.context_encoder = _encoder(context_channels, *size) if context_channels else None
        self.flow = ConditionalRealNVP(
            latent_features,
            encoder_features,
            couplings=couplings,
            hidden_features=hidden_features,
            reversible=reversible,
        )
        wide, coarse = 2 * hidden_channels, (_eighth(height), _eighth(width))
        decoder_features = latent_features + (encoder_features if context_channels else 0)
        self.decoder = nn.Sequential(
            nn.Linear(decoder_features, wide * coarse[0] * coarse[1]),
            nn.ELU(),
            nn.Unflatten(1, (wide, *coarse)),
            nn.ConvTranspose2d(wide, wide, 4, stride=2, padding=1),
            nn.ELU(),
            nn.ConvTranspose2d(wide, wide, 4, stride=2, padding=1),
            nn.ELU(),
            nn.ConvTranspose2d(wide, hidden_channels, 4, stride=2, padding=1),
            nn.ELU(),
            Conv2d(hidden_channels, channels, 3, padding=1),
        )
        # Their results take the weights' layout, in which the CPU's convolutions work.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _noise_shape(self, n: int) -> tuple[int, ...]:
        return (n, self.latent_features)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, noise: Tensor | None = None
    ) -> VAEOutput:
        """Encode and reconstruct.

        Parameters
        ----------
        x : Tensor
            Images ``[B, C, H, W]``.
        context : Tensor, optional
            Images ``[B, Cc, H, W]`` of `context_shape`; required where the model has one.
        noise : Tensor, optional
            Standard normal ``[B, latent_features]``; drawn if None.

        Returns
        -------
        VAEOutput
            `reconstruction` ``[B, C, H, W]``, the decoder's mean; `kl` (estimated) and
            `log_likelihood` ``[B]``, in nats, summed over pixels.
        """
        batch = self._check_image(x)
        self._check_context(context, batch)
        noise = self._given_or_drawn(noise, batch)
        features = self.encoder(x if context is None else torch.cat([x, context], dim=1))
        z, log_q = self.flow.sample_and_log_prob(features, noise=noise)
        mean = self._decode(z, context)
        kl = log_q - standard_normal_log_prob(z)
        return VAEOutput(mean, kl, self._log_likelihood(x, mean))

    @torch.no_grad()
    def sample(
        self, n: int, context: Tensor | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Draw ``n`` images ``[n, C, H, W]`` from the prior: the decoder's mean, not clamped.

        Parameters
        ----------
        n : int
            How many.
        context : Tensor, optional
            One context image for each, as in `forward`.
        noise : Tensor, optional
            The latent vectors, standard normal ``[n, latent_features]``; drawn if None.
        """
        self._check_context(context, n)
        return self._decode(self._given_or_drawn(noise, n), context)

    def _decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        if self.context_encoder is not None:
            z = torch.cat([z, self.context_encoder(context)], dim=1)
        _, height, width = self.image_shape
        return self.decoder(z)[:, :, :height, :width]

    def _check_context(self, context: Tensor | None, batch: int) -> None:
        if (context is None) != (self.context_shape is None):
            raise ValueError(
                f"context must be {'given' if context is None else 'None'} where context_shape is "
                f"{self.context_shape}"
            )
        if context is not None and self.context_shape is not None:
            why = "context_shape, one for each image"
            check_batch("context", context, self.context_shape, why, batch=batch)


def _eighth(size: int) -> int:
    return -(-size // 8)


def _encoder(channels: int, height: int, width: int, hidden: int, features: int) -> nn.Module:
    wide = 2 * hidden
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Conv2d(hidden, wide, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Conv2d(wide, wide, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(wide * _eighth(height) * _eighth(width), features),
        nn.ELU(),
    )
