"""Random calls of every operator: shapes, strides, dtypes, options and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from geco_fast._checks import FLOATING
from geco_fast.ops.conv_lstm import WINOGRAD_BOUND
from geco_fast.reference.coupling_mlp import ACTIVATIONS
from geco_fast.testing.cases import Case, Layout, Tensors, coupling_mlp_arguments, lay_out

Shapes = dict[str, tuple[int, ...]]

# Small sizes, vector widths and their neighbours, primes.
SIZES = st.one_of(
    st.integers(1, 9), st.sampled_from([0, 1, 11, 15, 16, 17, 31, 33, 64, 67, 127, 129, 257])
)
MOST_ELEMENTS = 1500
EXTREMES = (0.0, -0.0, 1e-30, 1e-6, -1e4, 3e4, 1e30, -1e30, math.inf, -math.inf, math.nan)


@dataclass(frozen=True)
class Values:
    """Turns standard normal values, scaled, into those of a call.

    `shift` is added to them all. Each extreme (tensor, position, value) is one element, its
    position a fraction of the tensor's length. `positive` tensors become exp of what they are
    or of 0 if that is more, `logarithms` are never infinite, `fixed` ones have one value.
    """

    shift: float = 0.0
    extremes: tuple[tuple[str, float, float], ...] = ()
    positive: tuple[str, ...] = ()
    fixed: tuple[tuple[str, int], ...] = ()
    logarithms: tuple[str, ...] = ()

    def __call__(self, tensors: Tensors) -> Tensors:
        """Return the call's values."""
        fixed = dict(self.fixed)
        made = {
            name: torch.full((), fixed[name])
            if name in fixed
            else (tensor.clamp(0).exp() if name in self.positive else tensor + self.shift)
            for name, tensor in tensors.items()
        }
        for name, position, value in self.extremes:
            if made[name].numel():
                flat = made[name].flatten()
                unbounded = name in self.logarithms and value == math.inf
                flat[int(position * flat.numel())] = 1e4 if unbounded else value
                made[name] = flat.view(made[name].shape)
        return made


@dataclass(frozen=True)
class Example:
    """One random call, what it is differentiated by, and for which results.

    `values` are what the case prepares its tensors with. `upstream` is a layout for each result's
    incoming gradient, or "sum" for that of a sum.
    """

    case: Case
    values: Values
    dtype: torch.dtype
    seed: int
    wanted: tuple[str, ...]
    used: tuple[bool, ...]
    upstream: tuple[str, ...]

    def calm(self) -> Case:
        """The same call without extreme values."""
        return replace(self.case, prepare=replace(self.values, extremes=()))

    def poisoned(self) -> Case:
        """The same call with NaN for every extreme value: what depends on one is NaN."""
        extremes = tuple((name, at, math.nan) for name, at, _ in self.values.extremes)
        return replace(self.case, prepare=replace(self.values, extremes=extremes))

    def incoming(self, results: Sequence[Tensor], seed: int) -> list[Tensor | None]:
        """The gradients that come in from above, None for a result that isn't used."""
        generator = torch.Generator().manual_seed(seed + 1000)
        used = self.used[: len(results)]
        incoming: list[Tensor | None] = []
        for result, layout, use in zip(
            results, self.upstream, used if any(used) else (True, True), strict=False
        ):
            shape = result.shape if layout != "sum" else ()
            grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(result.dtype)
            grad = grad.expand(result.shape) if layout == "sum" else lay_out(grad, layout)
            incoming.append(grad if use else None)
        return incoming


@st.composite
def shapes(
    draw: st.DrawFn, ranks: Sequence[int], most: int = MOST_ELEMENTS, least: int = 0
) -> tuple[int, ...]:
    """A shape of one of the ranks with at most so many elements."""
    shape: list[int] = []
    left = most
    for _ in range(draw(st.sampled_from(ranks))):
        shape.append(max(least, min(draw(SIZES), left)))
        left = max(1, left // max(1, shape[-1]))
    return tuple(draw(st.permutations(shape)))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], apart: bool = False) -> str | Layout:
    """Any layout of a tensor; elements share memory only if they need not be apart."""
    named = ["contiguous", "channels_last", "reversed", "sliced", "strided"]
    if draw(st.booleans()):
        return draw(st.sampled_from(named if apart or not shape else [*named, "expanded"]))

    def each(values: Any) -> Any:
        return tuple(draw(values) for _ in shape)

    return Layout(
        order=tuple(draw(st.permutations(range(len(shape))))),
        steps=each(st.sampled_from([1, 1, 1, 2, 3])),
        gaps=each(st.sampled_from([0, 0, 1, 5])),
        expanded=each(st.just(False) if apart else st.sampled_from([False] * 5 + [True])),
        offset=draw(st.sampled_from([0, 1, 3, 6])),
    )


@st.composite
def examples(draw: st.DrawFn, operator: str) -> Example:
    """Any call of an operator."""
    made = draw(CALLS[operator]())
    shapes, options = made["shapes"], made.get("options", {})
    written = made.get("written", ())
    apart = (*written, *made.get("apart", ()))
    fixed, positive = dict(made.get("fixed", {})), tuple(made.get("positive", ()))
    floating = [name for name in shapes if name not in fixed]
    differentiable = made.get("differentiable", tuple(floating))
    extremes = ()
    if draw(st.integers(0, 3)) == 0:
        extreme = st.tuples(
            st.sampled_from([name for name in floating if name not in positive]),
            st.floats(0, 1, exclude_max=True, width=16),
            st.sampled_from(made.get("extremes", EXTREMES)),
        )
        extremes = tuple(draw(st.lists(extreme, min_size=1, max_size=4)))
    shift = draw(st.sampled_from(made.get("shifts", (0.0,))))
    values = Values(
        shift, extremes, positive, tuple(fixed.items()), tuple(made.get("logarithms", ()))
    )
    case = Case(
        operator,
        "random",
        shapes,
        options,
        {name: draw(layouts(shapes[name], name in apart)) for name in floating},
        scale=draw(st.sampled_from(made.get("scales", (1.0, 1.0, 4.0, 1e-3)))),
        adapt=made.get("adapt"),
        prepare=values,
        differentiable=differentiable,
        written=written,
        dtypes=made.get("dtypes", FLOATING),
        kernel_options=made.get("kernel_options", {}),
        bound=made.get("bound"),
    )
    wanted = draw(st.lists(st.sampled_from(differentiable), min_size=1, unique=True))
    incoming = ["contiguous", "contiguous", "sum", "reversed", "strided", "expanded"]
    return Example(
        case,
        values,
        dtype=draw(st.sampled_from(case.dtypes)),
        seed=draw(st.integers(0, 2**20)),
        wanted=tuple(name for name in differentiable if name in wanted),
        used=draw(st.sampled_from([(True, True), (True, False), (False, True)])),
        upstream=tuple(draw(st.sampled_from(incoming)) for _ in range(2)),
    )


Call = dict[str, Any]


def alike(names: str, shape: tuple[int, ...]) -> Shapes:
    """One shape for every name."""
    return dict.fromkeys(names.split(), shape)


@st.composite
def lstm_gates(draw: st.DrawFn) -> Call:
    batch, channels, *spatial = draw(shapes((2, 3, 4, 5), MOST_ELEMENTS // 2))
    return {
        "shapes": {
            "gates": (batch, 4 * channels, *spatial),
            "c": (batch, channels, *spatial),
        },
        "options": {"forget_bias": draw(st.sampled_from([0.0, 1.0, -2.5]))},
        "scales": (1.0, 1.0, 10.0, 40.0, 1e-3),
    }


@st.composite
def gaussian_latent(draw: st.DrawFn) -> Call:
    names = "q_mean q_log_std p_mean p_log_std noise"
    return {"shapes": alike(names, draw(shapes(range(1, 7))))}


@st.composite
def affine_coupling(draw: st.DrawFn) -> Call:
    return {
        "shapes": alike("x log_scale shift", draw(shapes(range(1, 7)))),
        "options": {
            "inverse": draw(st.booleans()),
            "scale_map": draw(st.sampled_from(["tanh", "exp", "atan", "sigmoid"])),
            "clamp": draw(st.sampled_from([0.1, 1.0, 2.0, 5.0])),
        },
    }


@st.composite
def coupling_mlp(draw: st.DrawFn) -> Call:
    batch = draw(st.one_of(st.integers(1, 9), st.sampled_from([0, 1, 33, 65, 70, 129])))
    width = st.one_of(st.integers(1, 9), st.sampled_from([0, 1, 31, 32, 33, 64, 67]))
    widths = draw(st.lists(width, min_size=2, max_size=5))
    made: Shapes = {"x": (batch, widths[0])}
    if draw(st.booleans()):
        made["context_projection"] = (batch, widths[1])
    for layer, (inputs, outputs) in enumerate(pairwise(widths)):
        made[f"weight{layer}"] = (outputs, inputs)
        if draw(st.integers(0, 3)):
            made[f"bias{layer}"] = (outputs,)
    return {
        "shapes": made,
        "options": {"activation": draw(st.sampled_from(sorted(ACTIVATIONS)))},
        "adapt": coupling_mlp_arguments,
        # To a bias far above the products PyTorch's float64, the yardstick, adds one after another.
        "scales": (1.0, 1.0, 2.0),
    }


@st.composite
def squared_error(draw: st.DrawFn) -> Call:
    return {
        "shapes": alike("x y", draw(shapes(range(1, 7)))),
        "options": {"reduction": draw(st.sampled_from(["mean", "sum"]))},
        "scales": (1.0, 100.0, 1e-3),
        "shifts": (0.0, 30.0),
    }


@st.composite
def images(draw: st.DrawFn) -> tuple[int, ...]:
    """An image [B, C, *S] that has a pixel."""
    batch, channels = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    return batch, channels, *draw(shapes((1, 2, 3), 250, least=1))


@st.composite
def pncc(draw: st.DrawFn) -> Call:
    image = draw(images())
    patch = tuple(draw(st.integers(1, min(extent, 9))) for extent in image[2:])
    step = tuple(draw(st.integers(1, 4)) for _ in patch)
    if draw(st.booleans()):
        patch, step = min(patch), step[0]
    return {
        "shapes": alike("x y", image),
        "options": {
            "patch_size": patch,
            "stride": step,
            "channels": draw(st.sampled_from(["joint", "separate"])),
            "eps": draw(st.sampled_from([1e-6, 1e-3, 1.0])),
            "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
        },
        "scales": (1.0, 1.0, 100.0, 1e-3),
        "shifts": (0.0, 0.0, 3.0),
    }


@st.composite
def lncc(draw: st.DrawFn) -> Call:
    image = draw(shapes((3, 4, 5), 250))
    return {
        "shapes": alike("x y", image),
        "options": {
            "kernel_size": draw(st.sampled_from([1, 3, 5, 9])),
            "smooth_nr": draw(st.sampled_from([0.0, 0.1])),
            "smooth_dr": draw(st.sampled_from([1e-5, 0.1])),
            "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
        },
        "scales": (1.0, 1.0, 100.0, 1e-3),
        "shifts": (0.0, 0.0, 3.0),
    }


@dataclass(frozen=True)
class StateOf:
    """State in a dtype of its own, copied: a call must not change the next one's."""

    dtype: torch.dtype

    def __call__(self, tensors: Tensors) -> dict[str, Any]:
        """Return the call's arguments."""
        state = {name: lay_out_like(tensors[name], self.dtype) for name in ("ema", "log_lambda")}
        return {"c_hat": tensors["c_hat"], **state, "step": tensors["step"].clone()}


def lay_out_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in another dtype that keeps its strides."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device
    ).copy_(tensor)


@st.composite
def geco_update(draw: st.DrawFn) -> Call:
    c_hat = draw(shapes((1, 2)))
    rates = st.sampled_from([1e-3, 0.1, 1.0])
    bounds = st.sampled_from([None, 0.05, (-0.1, 0.02)])
    return {
        "shapes": {"c_hat": c_hat, "ema": c_hat[:1], "log_lambda": c_hat[:1], "step": ()},
        "options": {
            "alpha": draw(st.sampled_from([0.0, 0.5, 0.99])),
            "step_size": draw(rates),
            "lambda_min": draw(st.sampled_from([1e-6, 0.5])),
            "lambda_max": draw(st.sampled_from([1e6, 2.0])),
            "max_log_step": draw(bounds),
            "warmup_steps": draw(st.sampled_from([0, 3])),
            "update_every": draw(st.sampled_from([1, 2])),
            "speedup": draw(st.sampled_from([None, 10.0])),
            "parametrization": draw(st.sampled_from(["exp", "softplus2"])),
            "update": draw(st.sampled_from([True, True, True, False])),
        },
        "adapt": StateOf(draw(st.sampled_from([torch.float32, torch.float64]))),
        "fixed": {"step": draw(st.sampled_from([0, 1, 2, 3, 7, 2**40]))},
        "written": ("ema", "log_lambda", "step"),
        "differentiable": ("c_hat",),
        "shifts": (0.0, 0.5, -0.5),
    }


@st.composite
def equilibrium_map(draw: st.DrawFn) -> Call:
    n, m, d = draw(shapes((3,), 1200))
    made: Shapes = {"x": (n, d), "psi": (m, d)}
    if draw(st.booleans()):
        made["log_prior"] = (m,)
    # Of equal data the gradients are zero but for rounding, which no rule can judge.
    # Far away ones have weights that float64, the yardstick, does not know, either.
    call: Call = {
        "scales": (1.0, 0.1),
        "logarithms": ("log_prior",),
        "apart": ("x", "psi"),
        "extremes": (0.0, 1e-6, math.inf, -math.inf, math.nan),
    }
    if draw(st.booleans()):
        return {**call, "shapes": {**made, "beta": ()}, "positive": ("beta",)}
    # Of small ones a single draw decides; the table of cases has them.
    beta = draw(st.sampled_from([1.0, 3.0, 10.0]))
    return {**call, "shapes": made, "options": {"beta": beta}}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, Call]:
    """Batch and size of images, a kernel, input channels, and how they are convolved."""
    kernel = draw(st.sampled_from([1, 3, 3, 5, 5, 7]))
    batch = draw(st.integers(0, 3))
    size = (draw(st.integers(1, 14)), draw(st.integers(1, 14)))
    most = MOST_ELEMENTS // (size[0] * size[1])
    inputs = min(draw(st.sampled_from([1, 2, 15, 16, 17, 33])), max(1, most))
    how: Call = {"kernel_options": {"algorithm": "direct"}}
    if kernel > 1 and draw(st.integers(0, 3)):
        how = {
            "dtypes": (torch.float32,),
            "kernel_options": {"algorithm": "winograd"},
            "bound": WINOGRAD_BOUND,
            "extremes": (0.0, -0.0, 1e-30, 1e-6),
        }
    return (batch, *size), kernel, inputs, how


@st.composite
def conv2d(draw: st.DrawFn) -> Call:
    (batch, *size), kernel, inputs, how = draw(convolutions())
    outputs = draw(st.sampled_from([1, 3, 15, 16, 17, 33]))
    made: Shapes = {
        "x": (batch, inputs, *size),
        "weight": (outputs, inputs, kernel, kernel),
        "bias": (outputs,),
    }
    return {**how, "shapes": made, "shifts": (0.0, 0.0, 3.0)}


@st.composite
def conv_lstm_step(draw: st.DrawFn) -> Call:
    (batch, *size), kernel, inputs, how = draw(convolutions())
    channels = draw(st.sampled_from([1, 3, 16, 17]))
    made: Shapes = {
        "x": (batch, inputs, *size),
        "h": (batch, channels, *size),
        "c": (batch, channels, *size),
        "weight": (4 * channels, inputs + channels, kernel, kernel),
    }
    if draw(st.booleans()):
        made["bias"] = (4 * channels,)
    if draw(st.booleans()):
        made["x_projection"] = (batch, 4 * channels, *size)
    # Shut gates have gradients as small as their pre-activations' errors make them.
    return {
        **how,
        "shapes": made,
        "options": {"forget_bias": draw(st.sampled_from([0.0, 1.0]))},
        "scales": (0.1, 0.2),
    }


CALLS: dict[str, Callable[[], st.SearchStrategy[Call]]] = {
    "affine_coupling": affine_coupling,
    "conv2d": conv2d,
    "conv_lstm_step": conv_lstm_step,
    "coupling_mlp": coupling_mlp,
    "equilibrium_map": equilibrium_map,
    "gaussian_latent": gaussian_latent,
    "geco_update": geco_update,
    "lncc": lncc,
    "lstm_gates": lstm_gates,
    "pncc": pncc,
    "squared_error": squared_error,
}
