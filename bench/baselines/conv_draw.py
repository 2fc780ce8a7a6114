"""ConvDraw written the plain way: inputs concatenated, nothing hoisted, no operator of ours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from geco_fast.nn import Conv2d, ConvDraw, ConvLSTMCell
from geco_fast.nn.conv_draw import LOG_STD_LIMIT
from geco_fast.objectives import VAEOutput


class PlainConvDraw(ConvDraw):
    """The same function of the same parameters as `ConvDraw`, in PyTorch's own operations."""

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, noise: Tensor | None = None
    ) -> VAEOutput:
        batch = x.shape[0]
        if noise is None:
            noise = self.noise(batch)
        if self.context_shape is not None and context.shape[1:] == self.context_shape:
            first, _, second = self.context_encoder
            context = F.pixel_unshuffle(context, self.downsample)
            context = _conv(second, F.elu(_conv(first, context)))
        given = [] if context is None else [context]
        x = F.pixel_unshuffle(x, self.downsample)
        h_e = self.inference_h.expand(batch, -1, -1, -1)
        c_e = self.inference_c.expand(batch, -1, -1, -1)
        h_d = self.generator_h.expand(batch, -1, -1, -1)
        c_d = self.generator_c.expand(batch, -1, -1, -1)
        canvas = self.canvas.expand(batch, -1, -1, -1)
        kl = 0.0
        for t in range(self.steps):
            core = self.cores[t % len(self.cores)]
            h_e, c_e = _lstm(core.inference, [x, *given, x - canvas, h_d], h_e, c_e)
            q_mean, q_log_std = _gaussian(core.posterior, h_e)
            p_mean, p_log_std = _gaussian(core.prior, h_d)
            z = q_mean + q_log_std.exp() * noise[t]
            ratio = (2 * (q_log_std - p_log_std)).exp()
            distance = ((q_mean - p_mean) / p_log_std.exp()).square()
            kl = kl + (0.5 * (ratio + distance - 1) + p_log_std - q_log_std).sum((1, 2, 3))
            h_d, c_d = _lstm(core.generator, [*given, canvas, z], h_d, c_d)
            canvas = canvas + _conv(core.canvas, h_d)
        squared_error = (x - canvas).square().sum((1, 2, 3))
        constant = self.log_sigma + 0.5 * math.log(2 * math.pi)
        log_likelihood = -0.5 * squared_error / (2 * self.log_sigma).exp()
        log_likelihood = log_likelihood - x[0].numel() * constant
        return VAEOutput(F.pixel_shuffle(canvas, self.downsample), kl, log_likelihood)


def _conv(layer: Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)


def _gaussian(head: Conv2d, h: Tensor) -> tuple[Tensor, Tensor]:
    mean, raw = _conv(head, h).chunk(2, dim=1)
    return mean, LOG_STD_LIMIT * torch.tanh(raw / LOG_STD_LIMIT)


def _lstm(cell: ConvLSTMCell, inputs: list[Tensor], h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    padding = (cell.kernel_size[0] // 2, cell.kernel_size[1] // 2)
    gates = F.conv2d(torch.cat([*inputs, h], dim=1), cell.weight, cell.bias, padding=padding)
    i, f, g, o = gates.chunk(4, dim=1)
    c = torch.sigmoid(f + cell.forget_bias) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c
