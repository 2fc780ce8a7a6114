"""ConvDraw: a recurrent VAE that draws an image onto a canvas in several steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from geco_fast import ops
from geco_fast._checks import check_count, check_floating
from geco_fast.nn._arguments import check_batch, odd_kernel
from geco_fast.nn._vae import ImageVAE
from geco_fast.nn.conv import Conv2d
from geco_fast.nn.conv_lstm import ConvLSTMCell, channels_inside, run_step
from geco_fast.objectives import VAEOutput

LOG_STD_LIMIT = 5.0


class ConvDraw(ImageVAE):
    r"""Convolutional DRAW, conditional or not.

    Images are cut into patches (`torch.nn.PixelUnshuffle`), so that everything runs at
    ``h, w = H / downsample, W / downsample``, with ``P = C * downsample**2`` patch channels; the
    canvas :math:`r` lives there too until the end. With patches :math:`x` and context :math:`v`,
    one step is

    .. math::
        h_e &\leftarrow \mathrm{ConvLSTM}([x, v, x - r, h_d], h_e) \\
        z &\sim q(z \mid h_e), \qquad \text{prior } p(z \mid h_d) \text{ of the step before} \\
        h_d &\leftarrow \mathrm{ConvLSTM}([v, r, z], h_d) \\
        r &\leftarrow r + \mathrm{conv}(h_d)

    The initial states and canvas are learned. `x` and `v` are the same at every step, so their part
    of the cores' pre-activations is computed once a call.

    Parameters
    ----------
    image_shape : (int, int, int)
        ``(C, H, W)``, with H and W divisible by `downsample`.
    hidden_channels, latent_channels : int
        Channels of the cores' states, and of one step's latent variable.
    steps : int
        Number of drawing steps.
    kernel_size : int or (int, int)
        Odd kernel of the cores and heads.
    downsample : int
        Side of the patches.
    context_channels : int
        Channels of the context; 0 makes the model unconditional.
    shared_cores : bool
        Whether all steps share one set of weights, or each has its own.
    context_shape : (int, int, int), optional
        ``(Cc, H, W)`` of context images, which a small encoder then brings to `context_channels`.
    recompute : bool
        Keep of each step nothing but the states and the canvas, and compute the rest once more in
        the backward pass: less memory for about a third more time. The results are the same.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its range.

    Notes
    -----
    Gregor et al., "Towards conceptual compression" (2016); conditional as in Eslami et al., "Neural
    scene representation and rendering" (2018). Log standard deviations are bounded smoothly to
    (-5, 5).

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> model = gf.nn.ConvDraw((1, 28, 28), hidden_channels=16, steps=4)
    >>> output = model(torch.rand(2, 1, 28, 28))
    >>> output.reconstruction.shape, output.kl.shape
    (torch.Size([2, 1, 28, 28]), torch.Size([2]))
    >>> model.sample(3).shape
    torch.Size([3, 1, 28, 28])
    """

    noise_batch_dim: ClassVar[int] = 1

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        hidden_channels: int = 64,
        latent_channels: int = 8,
        steps: int = 8,
        kernel_size: int | Sequence[int] = 5,
        downsample: int = 4,
        context_channels: int = 0,
        shared_cores: bool = True,
        context_shape: Sequence[int] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__(image_shape, context_shape)
        self.recompute = recompute
        channels, height, width = self.image_shape
        self.hidden_channels = check_count("hidden_channels", hidden_channels)
        self.latent_channels = check_count("latent_channels", latent_channels)
        self.steps = check_count("steps", steps)
        self.downsample = check_count("downsample", downsample)
        self.context_channels = check_count("context_channels", context_channels, least=0)
        kernel = odd_kernel(kernel_size)
        if height % downsample or width % downsample:
            raise ValueError(
                f"image_shape must have a height and width divisible by downsample={downsample}, "
                f"got {self.image_shape}"
            )
        if self.context_shape is not None and context_channels == 0:
            raise ValueError("context_channels must be >= 1 where context_shape is given, got 0")

        patch_channels = channels * downsample**2
        self.spatial = (height // downsample, width // downsample)
        self.cores: Sequence[_Core] = nn.ModuleList(  # type: ignore[assignment]
            _Core(patch_channels, hidden_channels, latent_channels, context_channels, kernel)
            for _ in range(1 if shared_cores else steps)
        )
        state = (1, hidden_channels, *self.spatial)
        self.inference_h = nn.Parameter(torch.zeros(state))
        self.inference_c = nn.Parameter(torch.zeros(state))
        self.generator_h = nn.Parameter(torch.zeros(state))
        self.generator_c = nn.Parameter(torch.zeros(state))
        self.canvas = nn.Parameter(torch.full((1, patch_channels, *self.spatial), 0.5))
        self.context_encoder: nn.Module | None = None
        if self.context_shape is not None:
            self.context_encoder = nn.Sequential(
                Conv2d(self.context_shape[0] * downsample**2, context_channels, 3, padding=1),
                nn.ELU(),
                Conv2d(context_channels, context_channels, 3, padding=1),
            )

    def _noise_shape(self, n: int) -> tuple[int, ...]:
        return (self.steps, n, self.latent_channels, *self.spatial)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, noise: Tensor | None = None
    ) -> VAEOutput:
        """Encode and reconstruct.

        Parameters
        ----------
        x : Tensor
            Images ``[B, C, H, W]``.
        context : Tensor, optional
            ``[B, context_channels, H / downsample, W / downsample]``, or images of `context_shape`.
            Required where the model is conditional.
        noise : Tensor, optional
            Standard normal ``[steps, B, latent_channels, H / downsample, W / downsample]``, as
            `noise` draws it; drawn if None.

        Returns
        -------
        VAEOutput
            `reconstruction` ``[B, C, H, W]``, the decoder's mean; `kl` and `log_likelihood`
            ``[B]``, in nats, summed over steps and over pixels.
        """
        batch = self._check_image(x)
        context = self._encode_context(context, batch)
        noise = self._given_or_drawn(noise, batch)
        x = channels_inside(to_patches(x, self.downsample))
        invariant = x if context is None else torch.cat([x, context], dim=1)
        inference = [core.inference.prepare(self.spatial, invariant) for core in self.cores]
        generator = [core.generator.prepare(self.spatial, context) for core in self.cores]

        def draw(i: int, noise: Tensor, canvas: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            h_e, c_e, h_d, c_d = states
            core = self.cores[i]
            h_e, c_e = inference[i](torch.cat([x - canvas, h_d], dim=1), h_e, c_e)
            q_mean, q_log_std = core.posterior(h_e)
            p_mean, p_log_std = core.prior(h_d)
            z, kl = ops.gaussian_latent(q_mean, q_log_std, p_mean, p_log_std, noise)
            h_d, c_d = generator[i](torch.cat([canvas, z], dim=1), h_d, c_d)
            return kl, canvas + core.canvas(h_d), h_e, c_e, h_d, c_d

        learned = (self.inference_h, self.inference_c, self.generator_h, self.generator_c)
        canvas, *states = _for_each(batch, self.canvas, *learned)
        kls = []
        for t, noise_t in enumerate(noise.unbind(0)):
            inputs = (t % len(self.cores), noise_t, canvas, *states)
            kl, canvas, *states = run_step(draw, *inputs, recompute=self.recompute)
            kls.append(kl)
        log_likelihood = self._log_likelihood(x, canvas)
        reconstruction = from_patches(canvas, self.downsample)
        return VAEOutput(reconstruction, torch.stack(kls).sum(0), log_likelihood)

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
            One context for each image, as in `forward`.
        noise : Tensor, optional
            As in `forward`.
        """
        context = self._encode_context(context, n)
        noise = self._given_or_drawn(noise, n)
        generator = [core.generator.prepare(self.spatial, context) for core in self.cores]
        h_d, c_d, canvas = _for_each(n, self.generator_h, self.generator_c, self.canvas)
        for t, noise_t in enumerate(noise.unbind(0)):
            i = t % len(self.cores)
            core = self.cores[i]
            mean, log_std = core.prior(h_d)
            z = mean + log_std.exp() * noise_t
            h_d, c_d = generator[i](torch.cat([canvas, z], dim=1), h_d, c_d)
            canvas = canvas + core.canvas(h_d)
        return from_patches(canvas, self.downsample)

    def _encode_context(self, context: Tensor | None, batch: int) -> Tensor | None:
        if not self.context_channels:
            if context is not None:
                raise ValueError("context must be None where context_channels is 0")
            return None
        if context is None:
            raise ValueError(
                f"context must be given where context_channels is {self.context_channels}, got None"
            )
        check_floating("context", context)
        if self.context_encoder is not None and context.shape[1:] == self.context_shape:
            context = self.context_encoder(to_patches(context, self.downsample))
        shape = (self.context_channels, *self.spatial)
        why = "context_channels at the patches' resolution, or images of context_shape"
        check_batch("context", context, shape, why, batch=batch)
        return channels_inside(context)


def _for_each(batch: int, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Learned starting values ``[1, ...]`` as ``[batch, ...]``."""
    return tuple(channels_inside(p.expand(batch, -1, -1, -1)) for p in parameters)


def to_patches(x: Tensor, side: int) -> Tensor:
    """`pixel_unshuffle`, which PyTorch gets wrong for an empty batch."""
    batch, channels, height, width = x.shape
    height, width = height // side, width // side
    x = x.reshape(batch, channels, height, side, width, side).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * side**2, height, width)


def from_patches(x: Tensor, side: int) -> Tensor:
    """`pixel_shuffle`, which PyTorch gets wrong for an empty batch."""
    batch, channels, height, width = x.shape
    channels = channels // side**2
    x = x.reshape(batch, channels, side, side, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels, height * side, width * side)


class _Core(nn.Module):
    """The weights of one step: two ConvLSTM cells and three heads."""

    def __init__(
        self, patch: int, hidden: int, latent: int, context: int, kernel: tuple[int, int]
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        # Time-invariant channels come first, as `ConvLSTMCell.prepare` wants them.
        self.inference = ConvLSTMCell(2 * patch + context + hidden, hidden, kernel)
        self.generator = ConvLSTMCell(context + patch + latent, hidden, kernel)
        self.posterior = _GaussianHead(hidden, 2 * latent, kernel, padding=padding)
        self.prior = _GaussianHead(hidden, 2 * latent, kernel, padding=padding)
        self.canvas = Conv2d(hidden, patch, kernel, padding=padding)


class _GaussianHead(Conv2d):
    """Convolution to a mean and a softly bounded log standard deviation."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean, raw = super().forward(input).chunk(2, dim=1)
        return mean, LOG_STD_LIMIT * torch.tanh(raw / LOG_STD_LIMIT)
