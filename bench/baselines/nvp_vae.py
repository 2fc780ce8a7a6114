"""VAE+NVP written the plain way: no operator of ours, nothing hoisted."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from geco_fast.nn import NVPVAE, AffineCoupling, Conv2d
from geco_fast.objectives import VAEOutput


class PlainNVPVAE(NVPVAE):
    """The same function of the same parameters as `NVPVAE`, in PyTorch's own operations."""

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, noise: Tensor | None = None
    ) -> VAEOutput:
        if noise is None:
            noise = self.noise(x.shape[0])
        features = self.encoder(x if context is None else torch.cat([x, context], dim=1))
        z = noise
        log_q = standard_normal(noise)
        for layer in self.flow.layers:
            z, log_det = plain_coupling(layer, z, features)
            log_q = log_q - log_det
        decoded = z
        if self.context_encoder is not None:
            decoded = torch.cat([z, self.context_encoder(context)], dim=1)
        for part in self.decoder:
            decoded = _conv(part, decoded) if isinstance(part, Conv2d) else part(decoded)
        _, height, width = self.image_shape
        mean = decoded[:, :, :height, :width]
        squared_error = (x - mean).square().sum((1, 2, 3))
        constant = self.log_sigma + 0.5 * math.log(2 * math.pi)
        log_likelihood = -0.5 * squared_error * torch.exp(-2 * self.log_sigma)
        log_likelihood = log_likelihood - x[0].numel() * constant
        return VAEOutput(mean, log_q - standard_normal(z), log_likelihood)


def standard_normal(x: Tensor) -> Tensor:
    """Log density of ``[B, features]`` under a standard normal."""
    return -0.5 * (x.square().sum(1) + x.shape[1] * math.log(2 * math.pi))


def _conv(layer: Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)


def plain_coupling(layer: AffineCoupling, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """A conditional coupling layer with the scale map "tanh", and its log determinant."""
    kept, changed = x[:, : layer.features // 2], x[:, layer.features // 2 :]
    if layer.mask == "second":
        kept, changed = changed, kept
    assert layer.context_projection is not None
    first, *rest = layer.layers
    hidden = first(kept) + layer.context_projection(context)
    for linear in rest:
        hidden = linear(torch.relu(hidden))
    raw, shift = hidden.chunk(2, dim=1)
    log_scale = layer.clamp * torch.tanh(raw)
    changed = changed * torch.exp(log_scale) + shift
    parts = (kept, changed) if layer.mask == "first" else (changed, kept)
    return torch.cat(parts, dim=1), log_scale.sum(1)
