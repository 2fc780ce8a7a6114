"""What the image models share: shapes, noise, the Gaussian decoder and its likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from geco_fast import ops
from geco_fast._checks import check_shape
from geco_fast.nn._arguments import check_batch, check_image_shape


class ImageVAE(nn.Module):
    """Base of the VAEs over images, with decoder ``N(x | g(z), sigma^2 I)``, one global sigma.

    Parameters
    ----------
    image_shape : (int, int, int)
        ``(C, H, W)``.
    context_shape : (int, int, int), optional
        ``(Cc, H, W)`` of the image that the model is conditioned on, as large as the image itself.
    least : int
        Smallest height and width that the model takes.

    Attributes
    ----------
    log_sigma : Parameter
        Log standard deviation of the decoder, a scalar; starts at -1.
    noise_batch_dim : int
        Which dimension of the `noise` is the batch.
    """

    noise_batch_dim: ClassVar[int] = 0

    def __init__(
        self,
        image_shape: Sequence[int],
        context_shape: Sequence[int] | None = None,
        *,
        least: int = 1,
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape("image_shape", image_shape, least=least)
        self.context_shape: tuple[int, int, int] | None = None
        if context_shape is not None:
            self.context_shape = check_image_shape("context_shape", context_shape)
            if self.context_shape[1:] != self.image_shape[1:]:
                raise ValueError(
                    f"context_shape must have the height and width of image_shape "
                    f"{self.image_shape}, got {self.context_shape}"
                )
        # About the spread of pixels in [0, 1]; sigma 1 would take long to learn away.
        self.log_sigma = nn.Parameter(torch.tensor(-1.0))

    def _noise_shape(self, n: int) -> tuple[int, ...]:
        raise NotImplementedError

    def noise(
        self,
        n: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the standard normal noise that one call for ``n`` images takes.

        Parameters
        ----------
        n : int
            Batch size.
        generator : Generator, optional
            Source of randomness; the device's default generator if None.
        dtype, device : optional
            Those of the parameters if None.
        """
        noise = torch.empty(
            self._noise_shape(n),
            dtype=dtype or self.log_sigma.dtype,
            device=device or self.log_sigma.device,
        )
        return noise.normal_(generator=generator)

    def _given_or_drawn(self, noise: Tensor | None, n: int) -> Tensor:
        if noise is None:
            return self.noise(n)
        check_shape("noise", noise, self._noise_shape(n), "that of noise(batch size)")
        return noise

    def _check_image(self, x: Tensor) -> int:
        return check_batch("x", x, self.image_shape, "image_shape")

    def _log_likelihood(self, x: Tensor, mean: Tensor) -> Tensor:
        squared_error = ops.squared_error(x, mean, reduction="sum")
        log_sigma = self.log_sigma.to(squared_error.dtype)
        constant = log_sigma + 0.5 * math.log(2 * math.pi)
        pixels = math.prod(self.image_shape)
        return -0.5 * squared_error * torch.exp(-2 * log_sigma) - pixels * constant
