"""ConvLSTM cells of other libraries, with the weights of ours."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geco_fast.bench.entrants import FORWARD, Results, Step
from geco_fast.bench.rivals import Rival


class PlainCell(nn.Module):
    """One convolution over the concatenation of input and state, then the gates."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(cell.weight.detach().clone())
        self.bias = nn.Parameter(cell.bias.detach().clone())
        self.padding = tuple(size // 2 for size in cell.kernel_size)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.conv2d(torch.cat([x, h], dim=1), self.weight, self.bias, padding=self.padding)
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class PlainSequence(nn.Module):
    """A cell over the steps of a sequence ``[T, B, C, H, W]``, from a state of zeros."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros_like(x[0])
        outputs = []
        for frame in x:
            h, c = self.cell(frame, h, c)
            outputs.append(h)
        return torch.stack(outputs)


class _Torch(nn.Module):
    """conv-lstm's cell, whose gates are i, f, o, g; in channels-last, which oneDNN likes best."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        import conv_lstm

        self.cell = conv_lstm.ConvLSTMCell(
            cell.in_channels, cell.hidden_channels, cell.kernel_size[0], True
        )
        order = [0, 1, 3, 2]
        with torch.no_grad():
            for name in ("weight", "bias"):
                ours, theirs = getattr(cell, name), getattr(self.cell.conv, name)
                theirs.copy_(ours.unflatten(0, (4, -1))[order].flatten(0, 1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(x, (h, c))


class _Flax:
    """flax.linen's cell under jit, on NHWC arrays; gates i, g, f, o and a forget bias of 1."""

    def __init__(self, cell: Any) -> None:
        import flax.linen
        import jax.extend
        import jax.numpy as jnp

        # XLA reads how many threads to start when its client is made, and keeps them.
        os.environ.update(PJRT_NPROC=str(torch.get_num_threads()))
        jax.extend.backend.clear_backends()

        def gates(parameter: Tensor) -> Tensor:
            return parameter.detach().unflatten(0, (4, -1))[[0, 2, 1, 3]].flatten(0, 1)

        weight = gates(cell.weight).permute(2, 3, 1, 0)  # HWIO
        bias = cell.bias.detach().clone().unflatten(0, (4, -1))
        bias[1] -= 1
        bias = bias[[0, 2, 1, 3]].flatten()
        split = cell.in_channels
        self.parameters = {
            "params": {
                "ih": {
                    "kernel": jnp.array(weight[:, :, :split].numpy()),
                    "bias": jnp.array(bias.numpy()),
                },
                "hh": {
                    "kernel": jnp.array(weight[:, :, split:].numpy()),
                    "bias": jnp.zeros(bias.shape[0]),
                },
            }
        }
        self.cell = flax.linen.ConvLSTMCell(cell.hidden_channels, cell.kernel_size)

    def entrant(self, inputs: tuple[Tensor, ...]) -> _FlaxEntrant:
        return _FlaxEntrant(self, inputs)


def _to_jax(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.array(tensor.permute(0, 2, 3, 1).contiguous().numpy())


def _to_torch(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)


class _FlaxEntrant:
    """Forward, or forward and the vector-Jacobian product, as one compiled function."""

    permuted = True
    on_torch = False

    def __init__(self, module: _Flax, inputs: tuple[Tensor, ...]) -> None:
        import jax

        from geco_fast.bench.modules import random_upstream

        x, h, c = inputs
        self.arguments = (module.parameters, *(_to_jax(tensor) for tensor in (x, h, c)))
        upstream = tuple(_to_jax(tensor) for tensor in random_upstream((h, c)))

        def forward(parameters: Any, x: Any, h: Any, c: Any) -> Any:
            (c_next, h_next), _ = module.cell.apply(parameters, (c, h), x)
            return h_next, c_next

        def both(*arguments: Any) -> Any:
            results, pull = jax.vjp(forward, *arguments)
            return results, pull(upstream)

        self.forward, self.both = jax.jit(forward), jax.jit(both)

    def step(self, direction: str) -> Step:
        import jax

        function = self.forward if direction == FORWARD else self.both
        return lambda: jax.block_until_ready(function(*self.arguments))

    def results(self, seed: int, direction: str) -> Results:
        if direction == FORWARD:
            return Results([_to_torch(a) for a in self.forward(*self.arguments)], [])
        values, (parameters, *inputs) = self.both(*self.arguments)
        ih, hh = parameters["params"]["ih"], parameters["params"]["hh"]
        # Both biases have one gradient; ours is one bias.
        own = [ih["kernel"], hh["kernel"], ih["bias"]]
        flat = torch.cat([torch.from_numpy(np.array(array)).flatten() for array in own])
        gradients = [_to_torch(array) for array in inputs]
        return Results([_to_torch(a) for a in values], [*gradients, flat.sort().values])


CELL_RIVALS = {
    "conv-lstm": Rival(lambda module: _Torch(module.cell), permuted=True, tolerance=1e-5),
    "flax": Rival(
        lambda module: _Flax(module.cell),
        permuted=True,
        tolerance=1e-5,
        note="its memory is not torch's",
    ),
}

SEQUENCE_RIVALS = {
    "conv-lstm": Rival(
        lambda module: PlainSequence(_Torch(module.cell.cell)), permuted=True, tolerance=1e-5
    ),
}
