"""One table of cases per operator; tests and benchmarks are driven by it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from geco_fast import ops, reference
from geco_fast._checks import FLOATING
from geco_fast.ops.conv_lstm import WINOGRAD_BOUND
from geco_fast.reference.coupling_mlp import ACTIVATIONS

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie in memory; what lies between them is NaN.

    Parameters
    ----------
    order : sequence of int
        The dimensions from the outermost to the innermost.
    steps : sequence of int
        Every which element of its parent a dimension takes.
    gaps : sequence of int
        How much longer the parent is.
    expanded : sequence of bool
        Dimensions at stride 0: their first element stands for all.
    offset : int
        Elements before the first.
    """

    order: Sequence[int]
    steps: Sequence[int]
    gaps: Sequence[int]
    expanded: Sequence[bool]
    offset: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the values of `tensor` in this layout."""
        strides = [0] * tensor.dim()
        needed = 1
        for d in reversed(self.order):
            strides[d] = needed * self.steps[d]
            needed *= (1 if self.expanded[d] else tensor.shape[d]) * self.steps[d] + self.gaps[d]
        parent = tensor.new_full((self.offset + needed,), float("nan"))
        distinct = tensor
        for d in range(tensor.dim()):
            if self.expanded[d]:
                distinct = distinct.narrow(d, 0, min(1, tensor.shape[d]))
        parent.as_strided(distinct.shape, strides, self.offset).copy_(distinct)
        strides = [0 if self.expanded[d] else strides[d] for d in range(tensor.dim())]
        return parent.as_strided(tensor.shape, strides, self.offset)


def lay_out(tensor: Tensor, layout: str | Layout) -> Tensor:
    """Return the values of `tensor` in another memory layout.

    `contiguous`, `channels_last` (dimension 1 innermost), `reversed` (the first dimension
    innermost), `sliced` (a window of a parent that is NaN elsewhere), `half` (the first half of
    dimension 1 of such a parent), `strided` (every other element of such a parent), `expanded` (the
    first batch element for all, at stride 0); or any other `Layout`.
    """
    if isinstance(layout, Layout):
        return layout(tensor)
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 2 else tensor
    if layout == "reversed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor
    if layout == "half":
        width = tensor.shape[1]
        parent = tensor.new_full((len(tensor), 2 * width, *tensor.shape[2:]), float("nan"))
        return parent[:, :width].copy_(tensor)
    margin, step = {"sliced": (2, 1), "strided": (1, 2)}[layout]
    parent = tensor.new_full([size * step + 2 * margin for size in tensor.shape], float("nan"))
    window = parent[tuple(slice(margin, margin + size * step, step) for size in tensor.shape)]
    return window.copy_(tensor)


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Parameters
    ----------
    operator : str
        Name in `geco_fast.ops` and `geco_fast.reference`.
    name : str
        What is special about the case.
    shapes : mapping
        Shape of every tensor argument; values are standard normal.
    options : mapping
        Keyword options of the call.
    layout : str, Layout or mapping
        Memory layout of all tensors, or of each by name (see `lay_out`).
    scale : float
        Factor on the values.
    adapt : callable, optional
        Turns the tensors into the call's arguments, where those aren't the tensors themselves.
    prepare : callable, optional
        Changes values before they are laid out, such as making a variance positive.
    differentiable : tuple of str, optional
        Names of the tensors that get gradients; all by default.
    written : tuple of str
        Names of the tensors that the operator updates in place.
    dtypes : sequence of dtype
        What it is for; all floating dtypes by default.
    kernel_options : mapping
        More options of a call that kernels serve; the reference has no such.
    bound : float, optional
        Relative error in the Frobenius norm that kernels may have instead of the accuracy rule's.
    tags : frozenset of str
        "bench": a row of the benchmark; "bench-gpu": one that only a GPU is fast enough for;
        "small": gradcheck is affordable.
    """

    operator: str
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    layout: str | Layout | Mapping[str, str | Layout] = "contiguous"
    scale: float = 1.0
    adapt: Callable[[Tensors], dict[str, Any]] | None = None
    prepare: Callable[[Tensors], Tensors] | None = None
    differentiable: tuple[str, ...] | None = None
    written: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    dtypes: Sequence[torch.dtype] = FLOATING
    kernel_options: Mapping[str, Any] = field(default_factory=dict)
    bound: float | None = None

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> Tensors:
        """Fresh tensors of this case, each laid out as asked."""
        generator = torch.Generator().manual_seed(seed)
        made = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) * self.scale
            for name, shape in self.shapes.items()
        }
        if self.prepare is not None:
            made = self.prepare(made)
        layouts = self.layout if isinstance(self.layout, Mapping) else {}
        default = "contiguous" if isinstance(self.layout, Mapping) else self.layout
        return {
            name: lay_out(
                tensor.to(dtype) if tensor.is_floating_point() else tensor,
                layouts.get(name, default),
            )
            for name, tensor in made.items()
        }

    def arguments(self, tensors: Tensors) -> dict[str, Any]:
        """The call's arguments, made of tensors of this case."""
        return self.adapt(tensors) if self.adapt is not None else dict(tensors)

    def call(self, arguments: Mapping[str, Any], backend: str | None = None) -> tuple[Tensor, ...]:
        """Results of the public function through a backend, or of the reference for None."""
        if backend is None:
            result = getattr(reference, self.operator)(**arguments, **self.options)
        else:
            function = getattr(ops, self.operator)
            options = (
                self.options if backend == "reference" else {**self.options, **self.kernel_options}
            )
            result = function(**arguments, **options, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    def run(self, tensors: Tensors, backend: str = "auto") -> tuple[Tensor, ...]:
        """Results of the public function."""
        return self.call(self.arguments(tensors), backend)

    def define(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Results of the reference."""
        return self.call(self.arguments(tensors))

    def gradient_names(self) -> tuple[str, ...]:
        """Names of the tensors that get gradients."""
        return tuple(self.shapes) if self.differentiable is None else self.differentiable


SMALL = frozenset({"small"})
BENCH = frozenset({"bench"})
BENCH_GPU = frozenset({"bench-gpu"})


def _lstm_gates(batch: int, channels: int, *spatial: int) -> dict[str, tuple[int, ...]]:
    return {"gates": (batch, 4 * channels, *spatial), "c": (batch, channels, *spatial)}


def _extreme_gates(tensors: Tensors) -> Tensors:
    """Shut, open and saturated gates, in all combinations, on small and large states."""
    gates, c = tensors["gates"], tensors["c"]
    levels = torch.tensor([-float("inf"), -100.0, -70.0, -40.0, 0.0, 20.0, 100.0, float("inf")])
    states = torch.tensor([0.0, 1e-3, 1.0, -30.0, 6e4])
    for block in range(4):
        n = gates.shape[0]
        gates[:, block] = levels[torch.arange(n) // 8**block % 8].double()[:, None]
    c[:] = states.double()
    return {"gates": gates, "c": c}


def _saturated(tensors: Tensors) -> Tensors:
    """Every gate at 12: the derivatives are small differences from one."""
    return {"gates": torch.full_like(tensors["gates"], 12.0), "c": tensors["c"]}


LSTM_GATES = [
    Case("lstm_gates", "vector", _lstm_gates(3, 5), tags=SMALL),
    Case("lstm_gates", "sequence", _lstm_gates(2, 3, 7), {"forget_bias": 1.0}, tags=SMALL),
    Case("lstm_gates", "image", _lstm_gates(2, 3, 5, 4), tags=SMALL),
    Case("lstm_gates", "volume", _lstm_gates(2, 2, 3, 2, 3), {"forget_bias": -0.5}),
    Case("lstm_gates", "one", _lstm_gates(1, 1, 1, 1)),
    Case("lstm_gates", "no-batch", _lstm_gates(0, 3, 4, 4)),
    Case("lstm_gates", "no-channels", _lstm_gates(2, 0, 4)),
    Case("lstm_gates", "no-pixels", _lstm_gates(2, 3, 0, 4)),
    Case("lstm_gates", "tail", _lstm_gates(1, 1, 67)),
    Case("lstm_gates", "several-threads", _lstm_gates(8, 16, 13, 11)),
    Case(
        "lstm_gates",
        "extreme-values",
        {"gates": (8**4, 4, 5), "c": (8**4, 1, 5)},
        prepare=_extreme_gates,
    ),
    Case("lstm_gates", "saturated", _lstm_gates(4, 8, 6, 6), prepare=_saturated),
    Case("lstm_gates", "large-values", _lstm_gates(4, 8, 6, 6), scale=40.0),
    Case("lstm_gates", "tiny-values", _lstm_gates(4, 8, 6, 6), scale=1e-3),
    *(
        Case("lstm_gates", layout, _lstm_gates(3, 4, 5, 6), layout=layout)
        for layout in ("channels_last", "reversed", "sliced", "strided", "expanded")
    ),
    *(
        Case(
            "lstm_gates",
            f"{gates}-with-{c}",
            _lstm_gates(3, 4, 5, 6),
            layout={"gates": gates, "c": c},
        )
        for gates, c in (
            ("channels_last", "contiguous"),
            ("contiguous", "channels_last"),
            ("contiguous", "strided"),
            ("expanded", "channels_last"),
        )
    ),
    Case("lstm_gates", "step-64x8x8", _lstm_gates(32, 64, 8, 8), tags=BENCH),
    Case("lstm_gates", "step-128x8x8", _lstm_gates(32, 128, 8, 8), tags=BENCH),
    Case(
        "lstm_gates",
        "step-128x8x8-channels-last",
        _lstm_gates(32, 128, 8, 8),
        layout="channels_last",
        tags=BENCH,
    ),
    Case("lstm_gates", "batch-1-64x7x7", _lstm_gates(1, 64, 7, 7), tags=BENCH),
    Case("lstm_gates", "beyond-cache-256x32x32", _lstm_gates(32, 256, 32, 32), tags=BENCH),
    Case("lstm_gates", "64x128x64x64", _lstm_gates(64, 128, 64, 64), tags=BENCH_GPU),
    Case(
        "lstm_gates",
        "64x128x64x64-channels-last",
        _lstm_gates(64, 128, 64, 64),
        layout="channels_last",
        tags=BENCH_GPU,
    ),
]


def _alike(names: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names.split(), shape)


def _same_shape_cases(operator: str, names: str, options: Mapping[str, Any]) -> list[Case]:
    """Ranks, sizes, layouts and magnitudes of an operator whose tensors share one shape."""
    return [
        Case(operator, "vector", _alike(names, 5), options, tags=SMALL),
        Case(operator, "matrix", _alike(names, 3, 4), options, tags=SMALL),
        Case(operator, "volume", _alike(names, 2, 3, 2, 3, 2), options),
        Case(operator, "one", _alike(names, 1, 1), options),
        Case(operator, "no-batch", _alike(names, 0, 3, 4), options),
        Case(operator, "no-pixels", _alike(names, 3, 0, 4), options),
        Case(operator, "long-row", _alike(names, 2, 1031), options),
        Case(operator, "large-values", _alike(names, 3, 40), options, scale=4.0),
        Case(operator, "tiny-values", _alike(names, 3, 40), options, scale=1e-3),
        *(
            Case(operator, layout, _alike(names, 3, 4, 5, 6), options, layout=layout)
            for layout in ("channels_last", "reversed", "sliced", "strided", "expanded")
        ),
    ]


def _row_cases(operator: str, names: str) -> list[Case]:
    """Rows of many lengths, which is what kernels that sum each row care for."""
    return [
        *(Case(operator, f"row-{n}", _alike(names, 7, n)) for n in (1, 7, 33, 130)),
        Case(operator, "several-blocks", _alike(names, 2, 8195)),
        Case(operator, "several-blocks-strided", _alike(names, 2, 3, 3001), layout="strided"),
        Case(operator, "several-threads", _alike(names, 64, 3, 33, 11)),
        Case(operator, "half", _alike(names, 4, 6, 5), layout="half"),
        Case(operator, "rank-6", _alike(names, 2, 3, 1, 2, 3, 4), layout="reversed"),
    ]


_GAUSSIANS = "q_mean q_log_std p_mean p_log_std noise"


def _near_the_prior(tensors: Tensors) -> Tensors:
    """Log deviations that differ by 1e-6 to 1: where the divergence is a small difference."""
    steps = torch.logspace(-6, 0, tensors["noise"].shape[1], dtype=torch.float64)
    return {
        **tensors,
        "q_mean": tensors["p_mean"] + steps * tensors["q_mean"],
        "q_log_std": tensors["p_log_std"] + steps * tensors["q_log_std"],
    }


def _standard_normal_prior(tensors: Tensors) -> Tensors:
    zeros = torch.zeros_like(tensors["p_mean"])
    return {**tensors, "p_mean": zeros, "p_log_std": zeros}


GAUSSIAN_LATENT = [
    *_same_shape_cases("gaussian_latent", _GAUSSIANS, {}),
    *_row_cases("gaussian_latent", _GAUSSIANS),
    Case("gaussian_latent", "near-the-prior", _alike(_GAUSSIANS, 40, 9), prepare=_near_the_prior),
    Case(
        "gaussian_latent",
        "expanded-prior",
        _alike(_GAUSSIANS, 4, 3, 5, 4),
        layout={"p_mean": "expanded", "p_log_std": "expanded"},
        prepare=_standard_normal_prior,
        differentiable=("q_mean", "q_log_std"),
    ),
    Case(
        "gaussian_latent",
        "channels_last-posterior",
        _alike(_GAUSSIANS, 3, 4, 5, 6),
        layout={"q_mean": "channels_last", "q_log_std": "channels_last"},
    ),
    *(
        Case(
            "gaussian_latent",
            f"{'x'.join(map(str, shape))}{suffix}",
            _alike(_GAUSSIANS, *shape),
            layout=layout,
            differentiable=tuple(_GAUSSIANS.split()[:4]),
            tags=BENCH,
        )
        for shape, suffix, layout in (
            ((32, 8, 14, 14), "", "contiguous"),
            ((32, 8, 14, 14), "-heads", {"q_mean": "half", "q_log_std": "half"}),
            ((32, 8, 8, 8), "", "contiguous"),
            ((8, 8, 16, 16), "", "contiguous"),
            ((1, 1, 28, 28), "-batch-1", "contiguous"),
            ((64, 1 << 18), "-beyond-cache", "contiguous"),
        )
    ),
]

_COUPLING = "x log_scale shift"


def _affine_bench(
    name: str, *shape: int, layout: str | Mapping[str, str] = "contiguous", **options: Any
) -> Case:
    return Case("affine_coupling", name, _alike(_COUPLING, *shape), options, layout, tags=BENCH)


AFFINE_COUPLING = [
    *_same_shape_cases("affine_coupling", _COUPLING, {}),
    *_row_cases("affine_coupling", _COUPLING),
    *(
        Case(
            "affine_coupling",
            f"{scale_map}-{direction}",
            _alike(_COUPLING, 3, 4),
            {"scale_map": scale_map, "inverse": direction == "inverse", "clamp": 1.5},
            tags=SMALL,
        )
        for scale_map in ("exp", "tanh", "atan", "sigmoid")
        for direction in ("forward", "inverse")
    ),
    *(
        Case(
            "affine_coupling",
            f"{scale_map}-{direction}-large",
            _alike(_COUPLING, 9, 37),
            {"scale_map": scale_map, "inverse": direction == "inverse"},
            scale=9.0,
        )
        for scale_map in ("exp", "tanh", "atan", "sigmoid")
        for direction in ("forward", "inverse")
    ),
    Case(
        "affine_coupling",
        "channels_last-conditioner",
        _alike(_COUPLING, 3, 4, 5, 6),
        layout={"log_scale": "channels_last", "shift": "channels_last"},
    ),
    _affine_bench("4096x256", 4096, 256),
    _affine_bench("4096x256-halves", 4096, 256, layout={"log_scale": "half", "shift": "half"}),
    _affine_bench("4096x256-inverse", 4096, 256, inverse=True),
    *(
        _affine_bench(f"4096x256-{scale_map}", 4096, 256, scale_map=scale_map)
        for scale_map in ("exp", "atan", "sigmoid")
    ),
    _affine_bench("4096x32", 4096, 32),
    _affine_bench("256x32", 256, 32),
    _affine_bench("1x28x28-batch-1", 1, 1, 28, 28),
    _affine_bench("64x262144-beyond-cache", 64, 1 << 18),
]

SQUARED_ERROR = [
    # The mean over no element is NaN, which no test of equality takes.
    *(
        case if case.name != "no-pixels" else replace(case, options={"reduction": "sum"})
        for case in _same_shape_cases("squared_error", "x y", {})
    ),
    *_row_cases("squared_error", "x y"),
    Case("squared_error", "sum", _alike("x y", 3, 2, 4), {"reduction": "sum"}, tags=SMALL),
    Case(
        "squared_error",
        "channels_last-target",
        _alike("x y", 3, 4, 5, 6),
        layout={"x": "channels_last"},
    ),
    # The target of a reconstruction is data.
    *(
        Case(
            "squared_error",
            f"{'x'.join(map(str, shape))}{suffix}",
            _alike("x y", *shape),
            differentiable=("y",),
            tags=BENCH,
        )
        for shape, suffix in (
            ((32, 1, 28, 28), ""),
            ((64, 3, 32, 32), ""),
            ((1, 1, 28, 28), "-batch-1"),
            ((64, 1 << 18), "-beyond-cache"),
        )
    ),
]


def _coupling_mlp(
    batch: int, *widths: int, context: bool = False, bias: bool = True
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"x": (batch, widths[0])}
    if context:
        shapes["context_projection"] = (batch, widths[1])
    for layer, (inputs, outputs) in enumerate(pairwise(widths)):
        shapes[f"weight{layer}"] = (outputs, inputs)
        if bias:
            shapes[f"bias{layer}"] = (outputs,)
    return shapes


def coupling_mlp_arguments(tensors: Tensors) -> dict[str, Any]:
    """Weights and biases in lists; a layer whose bias is missing has none."""
    weights = [tensor for name, tensor in tensors.items() if name.startswith("weight")]
    return {
        "x": tensors["x"],
        "context_projection": tensors.get("context_projection"),
        "weights": weights,
        "biases": [tensors.get(f"bias{layer}") for layer in range(len(weights))],
    }


def _without_bias(shapes: dict[str, tuple[int, ...]], layer: int) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if name != f"bias{layer}"}


def _coupling_mlp_case(
    name: str, shapes: dict[str, tuple[int, ...]], activation: str = "relu", **fields: Any
) -> Case:
    options = {"activation": activation}
    return Case("coupling_mlp", name, shapes, options, adapt=coupling_mlp_arguments, **fields)


COUPLING_MLP = [
    _coupling_mlp_case("one-layer", _coupling_mlp(3, 4, 5), tags=SMALL),
    _coupling_mlp_case("tanh", _coupling_mlp(3, 4, 5, 2), "tanh", tags=SMALL),
    _coupling_mlp_case("elu", _coupling_mlp(2, 3, 4, 2), "elu", tags=SMALL),
    # Large values would make PyTorch's derivative of silu, which cancels there, no yardstick.
    _coupling_mlp_case(
        "context", _coupling_mlp(2, 3, 4, 3, 2, context=True), "silu", scale=0.5, tags=SMALL
    ),
    _coupling_mlp_case("relu", _coupling_mlp(9, 8, 16, 12, 6, context=True)),
    _coupling_mlp_case("leaky-relu", _coupling_mlp(9, 8, 16, 6), "leaky_relu"),
    _coupling_mlp_case("no-batch", _coupling_mlp(0, 8, 12, 6)),
    _coupling_mlp_case("no-inputs", _coupling_mlp(3, 0, 4, 2)),
    _coupling_mlp_case("no-hidden", _coupling_mlp(3, 4, 0, 2)),
    _coupling_mlp_case("no-outputs", _coupling_mlp(3, 4, 5, 0)),
    _coupling_mlp_case("one", _coupling_mlp(1, 1, 1, 1)),
    _coupling_mlp_case("no-bias", _coupling_mlp(13, 8, 33, 6, bias=False)),
    _coupling_mlp_case("some-biases", _without_bias(_coupling_mlp(5, 8, 12, 33, 6), 1)),
    _coupling_mlp_case("one-layer-context", _coupling_mlp(70, 33, 40, context=True)),
    _coupling_mlp_case("four-layers", _coupling_mlp(13, 5, 33, 32, 64, 3), "leaky_relu"),
    _coupling_mlp_case("batch-1", _coupling_mlp(1, 33, 65, 31, context=True), "silu"),
    _coupling_mlp_case("several-blocks", _coupling_mlp(70, 65, 33, 66, context=True)),
    _coupling_mlp_case("several-threads", _coupling_mlp(300, 20, 150, 130, 40), "silu", scale=0.3),
    *(
        _coupling_mlp_case(f"{activation}-65-33", _coupling_mlp(13, 7, 65, 33, 9), activation)
        for activation in ACTIVATIONS
    ),
    *(
        _coupling_mlp_case(
            f"{activation}-large", _coupling_mlp(40, 3, 20, 6, context=True), activation, scale=9.0
        )
        for activation in ACTIVATIONS
    ),
    *(
        _coupling_mlp_case(layout, _coupling_mlp(5, 8, 12, 6, context=True), layout=layout)
        for layout in ("reversed", "sliced", "strided", "expanded")
    ),
    _coupling_mlp_case(
        "wide-reversed", _coupling_mlp(37, 40, 50, 34, context=True), "elu", layout="reversed"
    ),
    _coupling_mlp_case("4096x32-512-512-64", _coupling_mlp(4096, 32, 512, 512, 64), tags=BENCH),
    _coupling_mlp_case(
        "256x32-512-512-64-context", _coupling_mlp(256, 32, 512, 512, 64, context=True), tags=BENCH
    ),
]


def _images(operator: str) -> Callable[..., Case]:
    """Maker of an operator's cases on two images."""

    def case(
        name: str,
        *shape: int,
        layout: str | Mapping[str, str] = "contiguous",
        tags: Any = (),
        prepare: Callable[[Tensors], Tensors] | None = None,
        scale: float = 1.0,
        differentiable: tuple[str, ...] | None = None,
        **options: Any,
    ) -> Case:
        return Case(
            operator,
            name,
            _alike("x y", *shape),
            options,
            layout,
            scale,
            prepare=prepare,
            differentiable=differentiable,
            tags=frozenset(tags),
        )

    return case


def _flat(tensors: Tensors) -> Tensors:
    """An image that is flat but for its last corner, against one that isn't."""
    x = torch.ones_like(tensors["x"])
    x[..., -1] += 0.5
    return {"x": x, "y": tensors["y"]}


def _offset(tensors: Tensors) -> Tensors:
    return {name: tensor + 1e4 for name, tensor in tensors.items()}


def _zero(tensors: Tensors) -> Tensors:
    return {"x": torch.zeros_like(tensors["x"]), "y": tensors["y"]}


def _anti_correlated(tensors: Tensors) -> Tensors:
    return {"x": tensors["x"], "y": 1 - 3 * tensors["x"]}


def _dark_and_bright(tensors: Tensors) -> Tensors:
    """Faint texture in the dark, and as faint a one beside it at full brightness."""
    x, y = (1e-4 * tensor for tensor in tensors.values())
    half = x.shape[-1] // 2
    return {"x": _step(x, half, 255.0), "y": _step(y, half, 255.0)}


def _step(image: Tensor, column: int, height: float) -> Tensor:
    image[..., column:] = height + image[..., column:].mul(1e4).round() / 64
    return image


# What happens in images, for every way to correlate them.
_IMAGE_CONTENTS = {
    "flat": _flat,
    "offset": _offset,
    "zero": _zero,
    "anti-correlated": _anti_correlated,
    "dark-and-bright": _dark_and_bright,
}

_pncc = _images("pncc")
_lncc = _images("lncc")

PNCC = [
    _pncc("line", 2, 2, 6, patch_size=3, tags=SMALL),
    _pncc("image", 2, 2, 4, 4, patch_size=(2, 3), tags=SMALL),
    _pncc("sum", 1, 2, 3, 3, 2, patch_size=2, reduction="sum", eps=0.1, tags=SMALL),
    _pncc(
        "separate-mean",
        *(2, 2, 4, 5),
        patch_size=3,
        stride=(1, 2),
        channels="separate",
        reduction="mean",
        tags=SMALL,
    ),
    _pncc("default-patch", 2, 3, 12, 11),
    _pncc("whole-image", 2, 3, 7, 5, patch_size=(7, 5)),
    _pncc("one-pixel", 2, 3, 4, 5, patch_size=1),
    _pncc("one-pixel-separate", 2, 3, 4, 5, patch_size=1, channels="separate"),
    _pncc("strides", 2, 3, 12, 11, patch_size=5, stride=(4, 3)),
    _pncc("gaps", 2, 2, 13, 17, patch_size=(2, 3), stride=(3, 5)),
    _pncc("gaps-line", 1, 1, 40, patch_size=2, stride=7),
    _pncc("gaps-volume", 2, 2, 7, 6, 9, patch_size=(2, 1, 2), stride=(3, 2, 4)),
    _pncc("volume", 2, 3, 6, 7, 9, patch_size=(3, 2, 4)),
    _pncc("volume-strides", 1, 2, 7, 8, 9, patch_size=(3, 4, 5), stride=(2, 3, 1)),
    _pncc("volume-separate", 2, 2, 5, 4, 6, patch_size=(1, 3, 2), channels="separate"),
    _pncc("long-line", 1, 1, 700, patch_size=7),
    _pncc("wide", 1, 2, 6, 300, patch_size=(3, 40)),
    _pncc("tall", 1, 2, 300, 6, patch_size=(20, 3)),
    _pncc("tall-strides", 1, 1, 300, 9, patch_size=(20, 3), stride=(3, 2)),
    _pncc("many-channels", 2, 9, 6, 7, patch_size=3),
    _pncc("no-batch", 0, 3, 8, 8, patch_size=3),
    _pncc("no-channels", 2, 0, 8, 8, patch_size=3),
    _pncc("no-channels-separate", 2, 0, 8, 8, patch_size=3, channels="separate"),
    _pncc("large-values", 2, 2, 9, 8, patch_size=3, scale=1e4),
    _pncc("tiny-values", 2, 2, 9, 8, patch_size=3, scale=1e-4),
    *(
        _pncc(f"gradient-to-{name}", 2, 2, 9, 8, patch_size=3, differentiable=(name,))
        for name in ("x", "y")
    ),
    *(
        _pncc(f"{reduction}-{channels}", 3, 2, 9, 8, patch_size=4, **options)
        for reduction in ("sum", "mean")
        for channels in ("joint", "separate")
        for options in ({"reduction": reduction, "channels": channels},)
    ),
    *(
        _pncc(f"{name}-{channels}", 2, 2, 14, 13, patch_size=4, channels=channels, prepare=prepare)
        for name, prepare in _IMAGE_CONTENTS.items()
        for channels in ("joint", "separate")
    ),
    *(
        _pncc(layout, 2, 3, 9, 8, patch_size=(4, 3), channels=channels, layout=layout)
        for layout, channels in (
            ("channels_last", "joint"),
            ("reversed", "separate"),
            ("sliced", "joint"),
            ("strided", "separate"),
            ("expanded", "joint"),
        )
    ),
    _pncc(
        "mixed-layouts",
        *(2, 3, 9, 8),
        patch_size=3,
        layout={"x": "channels_last", "y": "expanded"},
    ),
    _pncc("8x8-512x3x64x64", 512, 3, 64, 64, tags=BENCH_GPU),
    _pncc("8x8-16x3x64x64", 16, 3, 64, 64, tags=BENCH),
    _pncc("8x8-16x3x64x64-separate", 16, 3, 64, 64, channels="separate", tags=BENCH),
    _pncc("8x8-32x1x28x28", 32, 1, 28, 28, tags=BENCH),
    _pncc("8x8-1x1x28x28", 1, 1, 28, 28, tags=BENCH),
    _pncc("3x3-1x1x128x128", 1, 1, 128, 128, patch_size=3, tags=BENCH),
    _pncc("33x33-1x1x128x128", 1, 1, 128, 128, patch_size=33, tags=BENCH),
    _pncc("7x7x7-1x1x32x32x32", 1, 1, 32, 32, 32, patch_size=7, tags=BENCH),
]

LNCC = [
    _lncc("line", 2, 1, 5, tags=SMALL),
    _lncc("image", 1, 2, 4, 3, smooth_nr=0.1, reduction="mean", tags=SMALL),
    _lncc("volume", 1, 1, 2, 3, 2, smooth_dr=0.1, reduction="sum", tags=SMALL),
    _lncc("one", 1, 1, 1, 1, smooth_nr=0.1),
    _lncc("one-pixel", 2, 2, 4, 5, kernel_size=1, smooth_nr=0.1),
    _lncc("default", 2, 3, 9, 8),
    _lncc("wider-than-image", 2, 2, 3, 4, kernel_size=11),
    _lncc("nine", 2, 3, 14, 12, kernel_size=9),
    _lncc("deep", 1, 2, 6, 7, 5, kernel_size=5),
    _lncc("wide", 1, 1, 5, 300, kernel_size=5),
    _lncc("tall", 1, 1, 300, 5, kernel_size=5),
    _lncc("no-batch", 0, 3, 8, 8),
    _lncc("no-channels", 2, 0, 8, 8, reduction="sum"),
    _lncc("no-pixels", 2, 3, 0, 8),
    *(
        _lncc(f"{reduction}-reduction", 3, 2, 9, 8, kernel_size=5, reduction=reduction)
        for reduction in ("sum", "mean")
    ),
    *(
        _lncc(name, 2, 2, 14, 13, kernel_size=5, prepare=prepare)
        for name, prepare in _IMAGE_CONTENTS.items()
    ),
    *(
        _lncc(layout, 2, 3, 9, 8, kernel_size=5, layout=layout)
        for layout in ("channels_last", "reversed", "sliced", "strided", "expanded")
    ),
    *(
        _lncc(f"gradient-to-{name}", 2, 2, 9, 8, kernel_size=5, differentiable=(name,))
        for name in ("x", "y")
    ),
    _lncc("9x9-256x3x64x64", 256, 3, 64, 64, kernel_size=9, reduction="mean", tags=BENCH_GPU),
    _lncc("9x9-16x3x64x64", 16, 3, 64, 64, kernel_size=9, reduction="mean", tags=BENCH),
    _lncc("9x9-32x1x64x64", 32, 1, 64, 64, kernel_size=9, reduction="mean", tags=BENCH),
    _lncc("9x9-32x1x28x28", 32, 1, 28, 28, kernel_size=9, reduction="mean", tags=BENCH),
    _lncc("9x9-1x1x28x28", 1, 1, 28, 28, kernel_size=9, reduction="mean", tags=BENCH),
]


def _conv_lstm(
    batch: int, inputs: int, channels: int, spatial: tuple[int, int], kernel: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    return {
        "x": (batch, inputs, *spatial),
        "h": (batch, channels, *spatial),
        "c": (batch, channels, *spatial),
        "weight": (4 * channels, inputs + channels, *kernel),
    }


def _without_x(tensors: Tensors) -> dict[str, Any]:
    return {**tensors, "x": None}


Shapes = Mapping[str, tuple[int, ...]]


def _in_winograds_domain(
    operator: str, rows: Sequence[tuple[str, Shapes, dict[str, Any]]], **fields: Any
) -> list[Case]:
    """Cases of the convolutions with fewer products: a name, shapes and what else there is."""
    return [
        Case(
            operator,
            f"winograd-{name}",
            shapes,
            dtypes=(torch.float32,),
            kernel_options={"algorithm": "winograd"},
            bound=WINOGRAD_BOUND,
            **fields,
            **more,
        )
        for name, shapes, more in rows
    ]


CONV_LSTM_STEP = [
    Case("conv_lstm_step", "plain", _conv_lstm(1, 1, 2, (3, 3), (3, 3)), tags=SMALL),
    Case(
        "conv_lstm_step",
        "bias-projection",
        {**_conv_lstm(2, 2, 1, (2, 3), (1, 3)), "bias": (4,), "x_projection": (2, 4, 2, 3)},
        {"forget_bias": 1.0},
        tags=SMALL,
    ),
    Case(
        "conv_lstm_step",
        "hoisted",
        {
            "h": (2, 2, 3, 2),
            "c": (2, 2, 3, 2),
            "weight": (8, 2, 3, 1),
            "x_projection": (2, 8, 3, 2),
        },
        adapt=_without_x,
        tags=SMALL,
    ),
    Case("conv_lstm_step", "kernel-5", _conv_lstm(3, 2, 5, (7, 6), (5, 5)), scale=0.3),
    *(
        Case(
            "conv_lstm_step",
            f"{k}x{k}-64x64x16x16",
            _conv_lstm(64, 64, 64, (16, 16), (k, k)),
            scale=0.3,
            tags=BENCH_GPU,
        )
        for k in (3, 5)
    ),
    Case("conv_lstm_step", "one", _conv_lstm(1, 1, 1, (1, 1), (5, 5))),
    Case("conv_lstm_step", "no-batch", _conv_lstm(0, 2, 3, (4, 4), (3, 3))),
    Case("conv_lstm_step", "no-inputs", _conv_lstm(2, 0, 3, (4, 4), (3, 3))),
    Case("conv_lstm_step", "no-channels", _conv_lstm(2, 2, 0, (4, 4), (3, 3))),
    Case("conv_lstm_step", "no-pixels", _conv_lstm(2, 2, 3, (0, 4), (3, 3))),
    *(
        Case("conv_lstm_step", layout, _conv_lstm(3, 4, 5, (5, 6), (3, 3)), layout=layout)
        for layout in ("channels_last", "reversed", "sliced", "strided")
    ),
    *_in_winograds_domain(
        "conv_lstm_step",
        [
            ("3x3", _conv_lstm(3, 6, 8, (7, 6), (3, 3)), {}),
            ("5x5", _conv_lstm(2, 20, 35, (9, 14), (5, 5)), {"options": {"forget_bias": 1.0}}),
            ("7x7", _conv_lstm(2, 3, 17, (8, 8), (7, 7)), {}),
            ("one", _conv_lstm(1, 1, 1, (1, 1), (5, 5)), {}),
            ("no-batch", _conv_lstm(0, 2, 3, (4, 4), (3, 3)), {}),
            ("no-inputs", _conv_lstm(2, 0, 3, (4, 4), (3, 3)), {}),
            ("several-threads", _conv_lstm(9, 16, 48, (16, 16), (5, 5)), {}),
            (
                "bias-projection",
                {
                    **_conv_lstm(2, 16, 32, (8, 8), (5, 5)),
                    "bias": (128,),
                    "x_projection": (2, 128, 8, 8),
                },
                {},
            ),
            (
                "hoisted",
                {
                    "h": (2, 20, 5, 6),
                    "c": (2, 20, 5, 6),
                    "weight": (80, 20, 3, 3),
                    "x_projection": (2, 80, 5, 6),
                },
                {"adapt": _without_x},
            ),
            *(
                (layout, _conv_lstm(3, 20, 5, (5, 6), (3, 3)), {"layout": layout})
                for layout in ("channels_last", "reversed", "sliced", "strided", "expanded")
            ),
        ],
        scale=0.3,
    ),
]


def _conv2d(batch: int, inputs: int, outputs: int, *kernel: int) -> dict[str, tuple[int, ...]]:
    return {"x": (batch, inputs, 5, 4), "weight": (outputs, inputs, *kernel), "bias": (outputs,)}


def _square_kernel(
    batch: int, inputs: int, outputs: int, size: tuple[int, int], kernel: int
) -> dict[str, tuple[int, ...]]:
    return {
        "x": (batch, inputs, *size),
        "weight": (outputs, inputs, kernel, kernel),
        "bias": (outputs,),
    }


def _unit_gain(tensors: Tensors) -> Tensors:
    """Outputs as large as the inputs."""
    weight = tensors["weight"]
    return {**tensors, "weight": weight / weight[0].numel() ** 0.5}


def _mean_10(tensors: Tensors) -> Tensors:
    return {**tensors, "x": tensors["x"] + 10}


CONV2D = [
    Case("conv2d", "3x3", _conv2d(1, 2, 2, 3, 3), tags=SMALL),
    Case("conv2d", "1x5", _conv2d(2, 1, 2, 1, 5), tags=SMALL),
    Case("conv2d", "7x7", _conv2d(3, 4, 6, 7, 7)),
    Case("conv2d", "no-batch", _conv2d(0, 2, 3, 3, 3)),
    Case("conv2d", "no-inputs", _conv2d(2, 0, 3, 3, 3)),
    Case("conv2d", "no-outputs", _conv2d(2, 3, 0, 3, 3)),
    *(
        Case("conv2d", layout, _conv2d(3, 4, 5, 3, 3), layout=layout)
        for layout in ("channels_last", "reversed", "sliced", "strided", "expanded")
    ),
    *_in_winograds_domain(
        "conv2d",
        [
            ("3x3", _square_kernel(2, 5, 7, (11, 13), 3), {}),
            ("3x3-larger-tiles", _square_kernel(2, 33, 20, (12, 24), 3), {}),
            ("5x5", _square_kernel(3, 17, 40, (9, 10), 5), {}),
            ("5x5-mean-10", _square_kernel(2, 40, 33, (8, 8), 5), {"prepare": _mean_10}),
            ("5x5-scale-1000", _square_kernel(2, 40, 33, (8, 8), 5), {"scale": 1e3}),
            ("3x3-scale-0.001", _square_kernel(2, 40, 33, (8, 8), 3), {"scale": 1e-3}),
            ("7x7", _square_kernel(2, 16, 16, (5, 4), 7), {}),
            ("one", _square_kernel(1, 1, 1, (1, 1), 3), {}),
            ("no-batch", _square_kernel(0, 2, 3, (4, 4), 3), {}),
            ("several-threads", _square_kernel(2, 32, 100, (40, 36), 5), {}),
            ("several-parts", _square_kernel(1, 96, 64, (120, 72), 3), {}),
            ("many-tiles", _square_kernel(16, 4, 6, (64, 64), 5), {}),
            *(
                (layout, _square_kernel(3, 20, 5, (5, 6), 3), {"layout": layout})
                for layout in ("channels_last", "reversed", "sliced", "strided", "expanded")
            ),
        ],
    ),
    *(
        Case(
            "conv2d",
            f"{kernel}x{kernel}-{batch}x{inputs}x{size}x{size}-to-{outputs}",
            _square_kernel(batch, inputs, outputs, (size, size), kernel),
            prepare=_unit_gain,
            tags=BENCH,
            bound=WINOGRAD_BOUND,
        )
        for kernel, batch, inputs, outputs, size in (
            (5, 32, 64, 64, 8),
            (5, 32, 64, 64, 16),
            (5, 16, 128, 128, 16),
            (5, 8, 256, 256, 16),
            (5, 32, 64, 16, 14),
            (5, 1, 64, 64, 16),
            (3, 32, 64, 64, 32),
            (3, 32, 128, 128, 16),
            (3, 16, 256, 256, 16),
            (3, 1, 16, 16, 28),
            (7, 32, 64, 64, 16),
        )
    ),
]


def _own_geco_state(tensors: Tensors) -> dict[str, Any]:
    """State of a dtype that the operator takes, copied: a call must not change the next one's."""
    state = {name: tensor.clone() for name, tensor in tensors.items() if name != "c_hat"}
    for name in ("ema", "log_lambda"):
        state[name] = state[name].to(torch.promote_types(state[name].dtype, torch.float32))
    return {"c_hat": tensors["c_hat"], **state}


def _geco_update(
    name: str,
    *c_hat: int,
    step: int = 5,
    layout: str = "contiguous",
    tags: Any = (),
    **options: Any,
) -> Case:
    return Case(
        "geco_update",
        name,
        {"c_hat": c_hat, "ema": c_hat[:1], "log_lambda": c_hat[:1], "step": ()},
        {"alpha": 0.9, "step_size": 0.1, **options},
        {"c_hat": layout},
        adapt=_own_geco_state,
        prepare=lambda tensors: {**tensors, "step": torch.full((), step)},
        differentiable=("c_hat",),
        written=("ema", "log_lambda", "step"),
        tags=frozenset(tags),
    )


# "small" are those whose gradient is that of their value: at step 0 average and batch are one.
GECO_UPDATE = [
    _geco_update("first-step", 2, 3, step=0, tags=SMALL),
    _geco_update("evaluation", 2, 3, update=False, tags=SMALL),
    _geco_update("batch", 2, 3),
    _geco_update("means", 3),
    _geco_update("one", 1, 1),
    _geco_update("no-constraints", 0, 4),
    _geco_update("many", 4, 300, layout="reversed", speedup=2.0, max_log_step=0.01),
    _geco_update("softplus2", 3, 64, layout="strided", parametrization="softplus2"),
    _geco_update("one-sided", 3, 5, layout="expanded", max_log_step=(-0.01, 0.02)),
    *(_geco_update(f"{count}x64", count, 64, tags=BENCH) for count in (1, 2, 4)),
    _geco_update("3x256", 3, 256, tags=BENCH),
    _geco_update("3x4096", 3, 4096, tags=BENCH),
    _geco_update("3x65536", 3, 65536, tags=BENCH_GPU),
    _geco_update("means-3", 3, tags=BENCH),
]


def _equilibrium_map(n: int, m: int, d: int) -> dict[str, tuple[int, ...]]:
    return {"x": (n, d), "psi": (m, d), "log_prior": (m,)}


def _far(tensors: Tensors) -> Tensors:
    """Data and vectors at a distance of 1000 from zero, as far from each other as before."""
    return {**tensors, "x": tensors["x"] + 1000, "psi": tensors["psi"] + 1000}


EQUILIBRIUM_MAP = [
    Case("equilibrium_map", "small", _equilibrium_map(5, 3, 2), {"beta": 0.7}, tags=SMALL),
    Case(
        "equilibrium_map",
        "beta-tensor",
        {**_equilibrium_map(4, 3, 1), "beta": ()},
        prepare=lambda tensors: {**tensors, "beta": tensors["beta"].exp()},
        tags=SMALL,
    ),
    Case("equilibrium_map", "uniform", {"x": (50, 3), "psi": (20, 3)}, {"beta": 0.5}),
    Case("equilibrium_map", "cold", _equilibrium_map(20, 6, 2), {"beta": 0.05}),
    Case("equilibrium_map", "hot", _equilibrium_map(40, 18, 2), {"beta": 50.0}),
    Case(
        "equilibrium_map", "far-from-zero", _equilibrium_map(70, 33, 3), {"beta": 0.3}, prepare=_far
    ),
    Case("equilibrium_map", "image", _equilibrium_map(50, 20, 784), {"beta": 100.0}),
    Case("equilibrium_map", "hot-image", _equilibrium_map(50, 20, 785), {"beta": 5e3}),
    Case("equilibrium_map", "several-threads", _equilibrium_map(1100, 37, 2), {"beta": 0.05}),
    Case("equilibrium_map", "one", _equilibrium_map(1, 1, 1), {"beta": 1.0}),
    Case("equilibrium_map", "one-point", _equilibrium_map(1, 19, 3), {"beta": 1.0}),
    Case("equilibrium_map", "one-vector", _equilibrium_map(100, 1, 3), {"beta": 1.0}),
    Case("equilibrium_map", "no-data", _equilibrium_map(0, 3, 2), {"beta": 1.0}),
    Case("equilibrium_map", "no-vectors", _equilibrium_map(3, 0, 2), {"beta": 1.0}),
    Case("equilibrium_map", "no-dimensions", _equilibrium_map(3, 4, 0), {"beta": 1.0}),
    *(
        Case("equilibrium_map", layout, _equilibrium_map(9, 4, 3), {"beta": 1.0}, layout)
        for layout in ("reversed", "sliced", "strided", "expanded")
    ),
    Case(
        "equilibrium_map",
        "60000x1000x784",
        {"x": (60_000, 784), "psi": (1000, 784)},
        {"beta": 100.0},
        tags=BENCH_GPU,
    ),
    Case(
        "equilibrium_map",
        "100000x128x2",
        {"x": (100_000, 2), "psi": (128, 2)},
        {"beta": 0.05},
        tags=BENCH,
    ),
    Case(
        "equilibrium_map",
        "20000x256x2",
        {"x": (20_000, 2), "psi": (256, 2)},
        {"beta": 0.05},
        tags=BENCH,
    ),
    Case(
        "equilibrium_map",
        "2000x256x784",
        {"x": (2000, 784), "psi": (256, 784)},
        {"beta": 100.0},
        tags=BENCH,
    ),
    Case(
        "equilibrium_map", "160x64x2", {"x": (160, 2), "psi": (64, 2)}, {"beta": 0.05}, tags=BENCH
    ),
]

CASES: list[Case] = [
    *AFFINE_COUPLING,
    *CONV2D,
    *CONV_LSTM_STEP,
    *COUPLING_MLP,
    *EQUILIBRIUM_MAP,
    *GAUSSIAN_LATENT,
    *GECO_UPDATE,
    *LNCC,
    *LSTM_GATES,
    *PNCC,
    *SQUARED_ERROR,
]


def cases(operator: str | None = None, tag: str | None = None) -> list[Case]:
    """Cases of an operator (all by default): those with a tag, or without one the tests' own."""
    return [
        case
        for case in CASES
        if operator in (None, case.operator)
        and (tag in case.tags if tag else not case.tags & (BENCH | BENCH_GPU))
    ]
