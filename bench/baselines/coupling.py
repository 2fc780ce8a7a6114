"""Affine coupling layers of the flow libraries, with the weights of ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geco_fast.bench.baselines.nvp_vae import plain_coupling, standard_normal
from geco_fast.bench.rivals import Rival
from geco_fast.nn import AffineCoupling, ConditionalRealNVP
from geco_fast.reference.affine_coupling import SCALE_MAPS


def mlp(layer: AffineCoupling, rows: Tensor | None = None) -> nn.Sequential:
    """The conditioner as a chain of modules; `rows` are the order of its outputs."""
    parts: list[nn.Module] = []
    for source in layer.layers:
        linear = nn.Linear(source.in_features, source.out_features)
        last = source is layer.layers[-1]
        order = slice(None) if rows is None or not last else rows
        with torch.no_grad():
            linear.weight.copy_(source.weight[order])
            linear.bias.copy_(source.bias[order])
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def rows(layer: AffineCoupling, order: str) -> Tensor:
    """Where a library looks for shift t and scale s: "ts" in two blocks, "tsts" in turn."""
    changed = layer.features - layer.features // 2
    scale, shift = torch.arange(2 * changed).chunk(2)
    if order == "ts":
        return torch.cat([shift, scale])
    return torch.stack([shift, scale], dim=1).flatten()


class PlainAffineCoupling(nn.Module):
    """The same layer in PyTorch's own operations."""

    def __init__(self, layer: AffineCoupling) -> None:
        super().__init__()
        self.net = mlp(layer)
        self.split = layer.features // 2
        self.scale_map = layer.scale_map
        self.clamp = layer.clamp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x[:, : self.split], x[:, self.split :]
        raw, shift = self.net(kept).chunk(2, dim=1)
        log_scale = SCALE_MAPS[self.scale_map](raw, self.clamp)
        y = torch.cat([kept, changed * torch.exp(log_scale) + shift], dim=1)
        return y, log_scale.sum(1)


class PlainRealNVP(nn.Module):
    """The same flow in PyTorch's own operations: each layer projects the context itself."""

    def __init__(self, flow: ConditionalRealNVP) -> None:
        super().__init__()
        self.flow = copy.deepcopy(flow)

    def forward(self, noise: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        z, log_q = noise, standard_normal(noise)
        for layer in self.flow.layers:
            z, log_det = plain_coupling(layer, z, context)
            log_q = log_q - log_det
        return z, log_q


class Adapted(nn.Module):
    """A library's layer, called as ours is."""

    def __init__(self, layer: nn.Module, call: Callable[[Any, Tensor], tuple[Tensor, Tensor]]):
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.call(self.layer, x)


def _freia(layer: AffineCoupling) -> nn.Module:
    from FrEIA.modules import AffineCouplingOneSided

    theirs = AffineCouplingOneSided(
        [(layer.features,)],
        subnet_constructor=lambda *_: mlp(layer),
        clamp=layer.clamp,
        clamp_activation="TANH",
    )

    def call(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        (y,), log_det = module([x])
        return y, log_det

    return Adapted(theirs, call)


def _zuko(layer: AffineCoupling) -> nn.Module:
    from zuko.flows.coupling import GeneralCouplingTransform

    theirs = GeneralCouplingTransform(
        layer.features,
        mask=torch.arange(layer.features) < layer.features // 2,
        hidden_features=tuple(linear.out_features for linear in layer.layers[:-1]),
    )
    theirs.hyper.load_state_dict(mlp(layer, rows(layer, "tsts")).state_dict())
    return Adapted(theirs, lambda module, x: module().call_and_ladj(x))


def _normflows(layer: AffineCoupling) -> nn.Module:
    import normflows

    theirs = normflows.flows.AffineCouplingBlock(mlp(layer, rows(layer, "tsts")), scale_map="exp")
    return Adapted(theirs, lambda module, x: module(x))


def _pyro(layer: AffineCoupling) -> nn.Module:
    from pyro.distributions.transforms import AffineCoupling as Theirs
    from pyro.nn import DenseNN

    widths: Sequence[int] = [linear.out_features for linear in layer.layers[:-1]]
    changed = layer.features - layer.features // 2
    net = DenseNN(layer.features // 2, list(widths), [changed, changed])
    ordered = [part for part in mlp(layer, rows(layer, "ts")) if isinstance(part, nn.Linear)]
    for linear, source in zip(net.layers, ordered, strict=True):
        linear.load_state_dict(source.state_dict())

    def call(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # It would return the last result for the same tensor; in training each batch is a new one.
        module._cached_x_y = (None, None)
        y = module(x)
        return y, module.log_abs_det_jacobian(x, y)

    return Adapted(Theirs(layer.features // 2, net), call)


def _nflows(layer: AffineCoupling) -> nn.Module:
    from nflows.transforms.coupling import AffineCouplingTransform

    class Net(nn.Module):
        def __init__(self, *_: Any) -> None:
            super().__init__()
            self.net = mlp(layer, rows(layer, "ts"))

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.net(x)

    mask = torch.arange(layer.features) >= layer.features // 2
    return Adapted(AffineCouplingTransform(mask.int(), Net), lambda module, x: module(x))


def joined_mlp(layer: AffineCoupling, order: Tensor | None = None) -> nn.Sequential:
    """The conditioner over kept features and context side by side, as the libraries have it."""
    chain = mlp(layer, order)
    first = chain[0]
    assert layer.context_projection is not None
    weight = torch.cat([first.weight, layer.context_projection.weight], dim=1).detach()
    wide = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        wide.weight.copy_(weight)
        wide.bias.copy_(first.bias)
    return nn.Sequential(wide, *chain[1:])


class Stack(nn.Module):
    """A flow of a library's layers, each `call`ed with x and context; they change the second half.

    Our masks alternate, so the halves of the features change places around every other layer.
    """

    def __init__(
        self,
        flow: ConditionalRealNVP,
        make: Callable[[AffineCoupling], nn.Module],
        call: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(layer) for layer in flow.layers)
        self.masks = [layer.mask for layer in flow.layers]
        self.call = call

    def forward(self, noise: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        z, log_q = noise, standard_normal(noise)
        half = z.shape[1] // 2
        for layer, mask in zip(self.layers, self.masks, strict=True):
            z = z if mask == "first" else z.roll(half, 1)
            z, log_det = self.call(layer, z, context)
            z = z if mask == "first" else z.roll(half, 1)
            log_q = log_q - log_det
        return z, log_q


def _freia_flow(module: nn.Module) -> nn.Module:
    from FrEIA.modules import AffineCouplingOneSided

    def make(layer: AffineCoupling) -> nn.Module:
        return AffineCouplingOneSided(
            [(layer.features,)],
            dims_c=[(layer.context_features,)],
            subnet_constructor=lambda *_: joined_mlp(layer),
            clamp=layer.clamp,
            clamp_activation="TANH",
        )

    def call(layer: Any, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        (y,), log_det = layer([z], c=[context])
        return y, log_det

    return Stack(module.flow, make, call)


def _nflows_flow(module: nn.Module) -> nn.Module:
    from nflows.transforms.coupling import AffineCouplingTransform

    def make(layer: AffineCoupling) -> nn.Module:
        class Net(nn.Module):
            def __init__(self, *_: Any) -> None:
                super().__init__()
                self.net = joined_mlp(layer, rows(layer, "ts"))

            def forward(self, x: Tensor, context: Tensor) -> Tensor:
                return self.net(torch.cat([x, context], dim=1))

        mask = torch.arange(layer.features) >= layer.features // 2
        return AffineCouplingTransform(mask.int(), Net)

    return Stack(module.flow, make, lambda layer, z, context: layer(z, context))


OTHER = math.inf
FLOW_RIVALS = {
    "FrEIA": Rival(_freia_flow, permuted=True),
    "nflows": Rival(_nflows_flow, tolerance=OTHER, note="scale by a sigmoid instead of tanh"),
}
# By the scale map of ours that a library's is, or is nearest to.
RIVALS: dict[str, dict[str, Rival]] = {
    "tanh": {
        "FrEIA": Rival(_freia),
        "zuko": Rival(
            _zuko, tolerance=OTHER, note="scale bounded by a / (1 + |a / 6.9|) instead of tanh"
        ),
    },
    "exp": {
        "normflows": Rival(_normflows, permuted=True),
        "pyro": Rival(_pyro, permuted=True, note="clamps log scales outside of [-5, 3]"),
    },
    "sigmoid": {
        "nflows": Rival(_nflows, tolerance=OTHER, note="adds 1e-3 to the scale"),
    },
}
