"""Convolutional LSTM: one cell, and one layer over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geco_fast import ops
from geco_fast._checks import check_count, check_floating, check_rank, describe
from geco_fast.nn._arguments import odd_kernel
from geco_fast.nn.conv import keeps_size

State = tuple[Tensor, Tensor]
Step = Callable[[Tensor | None, Tensor, Tensor], State]


def channels_inside(x: Tensor) -> Tensor:
    """Images in the layout that the CPU's convolutions work in; elsewhere as they are.

    Brought there once, they stay so from step to step.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x


def run_step(step: Callable[..., Any], *inputs: Any, recompute: bool) -> Any:
    """``step(*inputs)``, of which the graph keeps the inputs alone where `recompute`."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(step, *inputs, use_reentrant=False)
    return step(*inputs)


class ConvLSTMCell(nn.Module):
    """One step of a convolutional LSTM, with "same" zero padding and no peepholes.

    Parameters
    ----------
    in_channels, hidden_channels : int
        Channels of the input and of the state.
    kernel_size : int or (int, int)
        Odd height and width of the kernel.
    bias : bool
        Whether the pre-activations have a learned bias.
    forget_bias : float
        Constant added to the forget gate's pre-activation.
    device, dtype
        Where and in what type the parameters are made.

    Attributes
    ----------
    weight : Parameter
        ``[4 * hidden_channels, in_channels + hidden_channels, kh, kw]``; rows in the gate order
        i, f, g, o; columns input first, then hidden state. Initialised, as `bias` is, like the
        `torch.nn.Conv2d` over the concatenation of both.
    bias : Parameter or None
        ``[4 * hidden_channels]``.

    Raises
    ------
    TypeError, ValueError
        If a size is not a positive integer or the kernel is even.

    Notes
    -----
    Shi et al., "Convolutional LSTM network" (2015), eq. 3 without the peephole terms.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> cell = gf.nn.ConvLSTMCell(3, 16, 5)
    >>> h, c = cell(torch.randn(2, 3, 8, 8))
    >>> h.shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int | Sequence[int],
        *,
        bias: bool = True,
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = check_count("in_channels", in_channels)
        self.hidden_channels = check_count("hidden_channels", hidden_channels)
        self.kernel_size = odd_kernel(kernel_size)
        self.forget_bias = forget_bias
        shape = (4 * hidden_channels, in_channels + hidden_channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `torch.nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.hidden_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}, forget_bias={self.forget_bias}"
        )

    def forward(self, x: Tensor, state: State | None = None) -> State:
        """Advance by one step.

        Parameters
        ----------
        x : Tensor
            Input ``[B, in_channels, H, W]``.
        state : (Tensor, Tensor), optional
            Hidden and cell state ``(h, c)``, each ``[B, hidden_channels, H, W]``; zeros if None.

        Returns
        -------
        h, c : Tensor
            The next state.
        """
        h, c = self.zero_state(x) if state is None else state
        return ops.conv_lstm_step(x, h, c, self.weight, self.bias, forget_bias=self.forget_bias)

    def zero_state(self, x: Tensor) -> State:
        """The state ``(h, c)`` of zeros for an input ``[B, C, H, W]``, in its memory format."""
        check_floating("x", x)
        check_rank("x", x, (4,), "[B, C, H, W]")
        batch, _, height, width = x.shape
        zeros = x.new_zeros(batch, self.hidden_channels, height, width)
        # A contiguous state would turn a channels-last sequence contiguous at the first step.
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            zeros = zeros.contiguous(memory_format=torch.channels_last)
        return zeros, zeros

    def prepare(self, spatial: Sequence[int], invariant: Tensor | None = None) -> Step:
        """Do once what many steps share, and return the step that is left.

        Parameters
        ----------
        spatial : (int, int)
            Height and width of the state.
        invariant : Tensor, optional
            The first ``N`` input channels ``[B, N, H, W]``, where these are the same at every step.
            Convolution is linear, so their part of the pre-activations is computed here, once.

        Returns
        -------
        step : callable
            ``step(x, h, c) -> (h, c)``, with `x` the other ``in_channels - N`` input channels, or
            None where none are left.
        """
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        projection = None
        if invariant is not None:
            split = invariant.shape[1]
            projection = ops.conv2d(invariant, weight[:, :split].contiguous(), bias)
            weight, bias = weight[:, split:].contiguous(), None
        height, width = spatial
        prepared = ops.prepare_weight(weight, (height, width))

        def step(x: Tensor | None, h: Tensor, c: Tensor) -> State:
            return ops.conv_lstm_step(
                x, h, c, prepared, bias, forget_bias=self.forget_bias, x_projection=projection
            )

        return step

    @classmethod
    def from_module(cls, module: Any) -> ConvLSTMCell:
        """Make a cell with the weights of another library's, which computes the same function.

        The cell is recognised by its attributes; its gates and input channels are put in our order,
        and the weights are copied. Whatever the other's convention, the new cell is called
        ``cell(x, (h, c))`` and returns ``(h, c)``.

        Parameters
        ----------
        module : Module or mapping
            The cell; one of

            - four `Conv2d` called ``forget``, ``input``, ``output``, ``state`` over ``[h, x]``
              (iShohei220/torch-gqn);
            - one `Conv2d` called ``combined_conv`` over ``[h, x]``, gates f, i, o, g
              (jihoonl/VAEs);
            - one `Conv2d` called ``conv`` over ``[x, h]``, gates i, f, o, g, with ``hidden_dim``
              (conv-lstm on PyPI, ndrplz/ConvLSTM_pytorch);
            - the parameters of `flax.linen.ConvLSTMCell`: a mapping with ``ih`` and ``hh``, each of
              ``kernel`` ``[kh, kw, in, 4C]`` and, if any, ``bias``, gates i, g, f, o and a forget
              bias of 1; alone or under the key ``params``. Strides 1 and "SAME" padding.

        Returns
        -------
        ConvLSTMCell
            On the device and in the dtype of the source.

        Raises
        ------
        TypeError
            If the cell is none of these.
        ValueError
            If its convolution is not stride 1 with an odd kernel and "same" zero padding.
        """
        forget_bias = 0.0
        if isinstance(module, Mapping):
            weight, bias = _read_flax(module)
            order, forget_bias, hidden_first = "igfo", 1.0, False
        elif _has_convs(module, "forget", "input", "output", "state"):
            weight, bias = _read_convs(module.forget, module.input, module.output, module.state)
            order, hidden_first = "fiog", True
        elif _has_convs(module, "combined_conv"):
            weight, bias = _read_convs(module.combined_conv)
            order, hidden_first = "fiog", True
        elif _has_convs(module, "conv") and hasattr(module, "hidden_dim"):
            weight, bias = _read_convs(module.conv)
            order, hidden_first = "ifog", False
        else:
            raise TypeError(
                "module must be a ConvLSTM cell with convolutions forget, input, output and state, "
                "or combined_conv, or conv and hidden_dim, or a mapping of flax parameters with ih "
                f"and hh, got {type(module).__name__}"
            )
        hidden = weight.shape[0] // 4
        gates = [order.index(gate) for gate in "ifgo"]
        weight = weight.unflatten(0, (4, hidden))[gates].flatten(0, 1)
        if hidden_first:
            weight = torch.cat([weight[:, hidden:], weight[:, :hidden]], dim=1)
        cell = cls(
            weight.shape[1] - hidden,
            hidden,
            weight.shape[2:],
            bias=bias is not None,
            forget_bias=forget_bias,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            cell.weight.copy_(weight)
            if bias is not None:
                cell.bias.copy_(bias.unflatten(0, (4, hidden))[gates].flatten())
        return cell


def _has_convs(module: Any, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Conv2d) for name in names)


def _read_convs(*convs: Any) -> tuple[Tensor, Tensor | None]:
    for conv in convs:
        if not keeps_size(conv):
            raise ValueError(
                "module must convolve with stride 1, an odd kernel and same zero padding, "
                f"got {conv}"
            )
    biases = [conv.bias.detach() for conv in convs if conv.bias is not None]
    weight = torch.cat([conv.weight.detach() for conv in convs])
    return weight, torch.cat(biases) if biases else None


def _read_flax(parameters: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    parameters = parameters.get("params", parameters)
    try:
        # HWIO to OIHW; both libraries correlate, neither flips the kernel.
        kernels = [
            torch.tensor(np.asarray(parameters[part]["kernel"])).permute(3, 2, 0, 1)
            for part in ("ih", "hh")
        ]
    except (KeyError, TypeError, RuntimeError) as error:
        raise TypeError(
            "module must, as a mapping, hold flax parameters ih and hh with kernels "
            f"[kh, kw, in, 4C], got keys {list(parameters)}"
        ) from error
    biases = [
        torch.tensor(np.asarray(parameters[part]["bias"]))
        for part in ("ih", "hh")
        if "bias" in parameters[part]
    ]
    return torch.cat(kernels, dim=1), sum(biases[1:], biases[0]) if biases else None


class ConvLSTM(nn.Module):
    """A convolutional LSTM over a sequence.

    Parameters
    ----------
    in_channels, hidden_channels, kernel_size, bias, forget_bias
        As of `ConvLSTMCell`, which is the attribute `cell`.
    batch_first : bool
        Whether sequences are ``[B, T, C, H, W]`` rather than ``[T, B, C, H, W]``.
    recompute : bool
        Keep of each step nothing but its inputs, and compute the rest once more in the backward
        pass: less memory for about a third more time. The results are the same.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> lstm = gf.nn.ConvLSTM(3, 16, 5)
    >>> outputs, (h, c) = lstm(torch.randn(7, 2, 3, 8, 8))
    >>> outputs.shape
    torch.Size([7, 2, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int | Sequence[int],
        *,
        batch_first: bool = False,
        bias: bool = True,
        forget_bias: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.recompute = recompute
        self.cell = ConvLSTMCell(
            in_channels, hidden_channels, kernel_size, bias=bias, forget_bias=forget_bias
        )

    def extra_repr(self) -> str:
        return f"batch_first={self.batch_first}"

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a sequence.

        Parameters
        ----------
        x : Tensor
            ``[T, B, in_channels, H, W]``, or ``[B, T, ...]`` where `batch_first`.
        state : (Tensor, Tensor), optional
            Initial ``(h, c)``, each ``[B, hidden_channels, H, W]``; zeros if None.

        Returns
        -------
        outputs : Tensor
            Hidden states of all steps, ``[T, B, hidden_channels, H, W]`` or batch first as `x` is.
        (h, c) : (Tensor, Tensor)
            The last state.

        Raises
        ------
        ValueError, TypeError
            If a rank, shape, dtype or device is wrong, or the sequence is empty.
        """
        check_floating("x", x)
        axis = 1 if self.batch_first else 0
        layout = "[B, T, C, H, W]" if self.batch_first else "[T, B, C, H, W]"
        check_rank("x", x, (5,), layout)
        if x.shape[axis] == 0:
            raise ValueError(f"x must have at least one step along {layout}, got {describe(x)}")
        frames = [channels_inside(frame) for frame in x.unbind(axis)]
        h, c = self.cell.zero_state(frames[0]) if state is None else state
        step = self.cell.prepare(x.shape[-2:])
        outputs = []
        for frame in frames:
            h, c = run_step(step, frame, h, c, recompute=self.recompute)
            outputs.append(h)
        return torch.stack(outputs, dim=axis), (h, c)
