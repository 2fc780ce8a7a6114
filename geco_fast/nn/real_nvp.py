"""Conditional Real NVP: a stack of affine couplings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geco_fast import ops
from geco_fast._checks import check_count, check_shape
from geco_fast.nn._arguments import check_batch
from geco_fast.nn.coupling import AffineCoupling, Conditioner


class ConditionalRealNVP(nn.Module):
    r"""Density :math:`q(z \mid v)` as a stack of affine couplings over standard normal noise.

    Parameters
    ----------
    features, context_features : int
        Features of `z` (at least 2) and of the context `v`.
    couplings : int
        Number of coupling layers; their masks alternate.
    hidden_features : sequence of int
        Widths of each conditioner's hidden layers.
    reversible : bool
        Keep activation memory constant in depth: only the output is stored, and the backward pass
        recomputes each layer's input from it, at the price of running each conditioner once more.
        The gradients are the same up to rounding; there is no double backward.
    scale_map, clamp, activation
        As of `AffineCoupling`.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its range.

    Notes
    -----
    Dinh et al., "Density estimation using Real NVP" (2017); reversible as in Gomez et al., "The
    reversible residual network" (2017). Where `reversible`, hooks on a layer's forward run once,
    without gradients; a hook must not change the layer's output.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> flow = gf.nn.ConditionalRealNVP(8, 4, couplings=4, hidden_features=(32,))
    >>> context = torch.randn(16, 4)
    >>> z, log_q = flow.sample_and_log_prob(context)
    >>> bool(torch.allclose(flow.log_prob(z, context), log_q, atol=1e-4))
    True
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        couplings: int = 8,
        hidden_features: Sequence[int] = (512, 512),
        reversible: bool = False,
        scale_map: str = "tanh",
        clamp: float = 2.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.features = check_count("features", features, least=2)
        self.context_features = check_count("context_features", context_features)
        self.reversible = reversible
        self.layers: Sequence[AffineCoupling] = nn.ModuleList(  # type: ignore[assignment]
            AffineCoupling(
                features,
                context_features=context_features,
                hidden_features=hidden_features,
                scale_map=scale_map,
                clamp=clamp,
                mask=("first", "second")[i % 2],
                activation=activation,
            )
            for i in range(check_count("couplings", couplings))
        )

    def extra_repr(self) -> str:
        return f"{self.features}, {self.context_features}, reversible={self.reversible}"

    def sample_and_log_prob(
        self, context: Tensor, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw one sample for each context, with its log density.

        Parameters
        ----------
        context : Tensor
            ``[B, context_features]``.
        noise : Tensor, optional
            Standard normal ``[B, features]``; drawn if None.

        Returns
        -------
        z : Tensor
            ``[B, features]``.
        log_prob : Tensor
            ``log q(z | context)``, ``[B]``, in nats.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype is wrong.
        """
        batch = check_batch("context", context, (self.context_features,), "context_features")
        if noise is None:
            noise = torch.randn(batch, self.features, dtype=context.dtype, device=context.device)
        check_shape("noise", noise, (batch, self.features), "[B, features]")
        z, log_det = self._run(noise, context, inverse=False)
        return z, standard_normal_log_prob(noise) - log_det

    def log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        """Log density ``log q(z | context)``, ``[B]``, in nats.

        Parameters
        ----------
        z : Tensor
            ``[B, features]``.
        context : Tensor
            ``[B, context_features]``.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype is wrong.
        """
        self.layers[0].check("z", z, context)
        noise, log_det = self._run(z, context, inverse=True)
        return standard_normal_log_prob(noise) + log_det

    def _run(self, x: Tensor, context: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        if not (self.reversible and torch.is_grad_enabled()):
            return _chain(self.layers, x, context, inverse=inverse)
        conditioners = [layer.conditioner() for layer in self.layers]
        flat = [p for weights, biases, extra in conditioners for p in (*weights, *biases, extra)]
        return _Reversible.apply(self.layers, inverse, x, context, *flat)


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """Log density of ``x [B, features]`` under a standard normal, ``[B]``, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = x.to(wide).square().sum(dim=1)
    return -0.5 * (squares + x.shape[1] * math.log(2 * math.pi))


def _chain(
    layers: Sequence[AffineCoupling], x: Tensor, context: Tensor, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    log_dets = []
    for layer in reversed(layers) if inverse else layers:
        x, log_det = layer.inverse(x, context) if inverse else layer(x, context)
        log_dets.append(log_det)
    return x, torch.stack(log_dets).sum(0)


class _Reversible(torch.autograd.Function):
    """A stack of couplings that stores its output alone, and runs backwards through its inverse."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        layers: Sequence[AffineCoupling],
        inverse: bool,
        x: Tensor,
        context: Tensor,
        *flat: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, log_det = _chain(layers, x, context, inverse=inverse)
        ctx.layers, ctx.inverse = layers, inverse
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        ctx.save_for_backward(y, context, *flat)
        return y, log_det

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ConditionalRealNVP has no double backward where reversible=True; "
                "use reversible=False"
            )
        y, context, *flat = ctx.saved_tensors
        size = len(flat) // len(ctx.layers)
        needs_context, *needs_flat = ctx.needs_input_grad[3:]
        grad_context = torch.zeros_like(context) if needs_context else None
        grad_flat: list[Tensor | None] = [None] * len(flat)
        order = [(layer, slice(i * size, (i + 1) * size)) for i, layer in enumerate(ctx.layers)]
        with torch.autocast(**ctx.autocast):
            for layer, own in order if ctx.inverse else reversed(order):
                y, grad_y, (grad_own_context, *grad_flat[own]) = _step_back(
                    layer,
                    ctx.inverse,
                    y,
                    [context, *flat[own]],
                    [needs_context, *needs_flat[own]],
                    grad_y,
                    grad_log_det,
                )
                if grad_context is not None and grad_own_context is not None:
                    grad_context += grad_own_context
        return None, None, grad_y, grad_context, *grad_flat


def _step_back(
    layer: AffineCoupling,
    inverse: bool,
    y: Tensor,
    operands: list[Tensor],
    needed: Sequence[bool],
    grad_y: Tensor,
    grad_log_det: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Recompute a layer's input from its output; with the gradients of input and operands.

    The kept part is the same on both sides, so the conditioner runs once for both purposes.
    """
    kept, changed = layer.split(y.detach())
    kept = kept.detach().requires_grad_()
    operands = [p.detach().requires_grad_(n) for p, n in zip(operands, needed, strict=True)]
    context, *flat = operands
    depth = (len(flat) - 1) // 2
    conditioner = Conditioner(tuple(flat[:depth]), tuple(flat[depth:-1]), flat[-1])
    affine = partial(ops.affine_coupling, scale_map=layer.scale_map, clamp=layer.clamp)
    with torch.enable_grad():
        log_scale, shift = layer.scale_and_shift(kept, context, conditioner)
    source, _ = affine(changed, log_scale.detach(), shift.detach(), inverse=not inverse)
    source.requires_grad_()
    with torch.enable_grad():
        target, log_det = affine(source, log_scale, shift, inverse=inverse)
    grad_kept, grad_changed = layer.split(grad_y)
    wanted = [kept, source, *(p for p in operands if p.requires_grad)]
    found = iter(torch.autograd.grad((target, log_det), wanted, (grad_changed, grad_log_det)))
    grad_x = layer.join(next(found) + grad_kept, next(found))
    x = layer.join(kept.detach(), source.detach())
    return x, grad_x, [next(found) if p.requires_grad else None for p in operands]
