"""A whole coupling layer as one operator, against the reference of its two parts."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from marks import every_level, needs_library
from torch import Tensor

from geco_fast import _backend, use_backend
from geco_fast.ops import _coupling_layer, affine_coupling
from geco_fast.ops._coupling_layer import Coupling, coupling_layer
from geco_fast.reference.affine_coupling import SCALE_MAPS
from geco_fast.reference.coupling_mlp import ACTIVATIONS
from geco_fast.testing.budget import Budget
from geco_fast.testing.guards import Guards

PLAIN = Coupling("relu", keeps_second=False, inverse=False, scale_map="tanh", clamp=2.0)
NAMES = ("x", "context", "context_weight", "weights", "biases")


def operands(
    batch: int = 40,
    features: int = 7,
    context: int = 3,
    hidden: tuple[int, ...] = (40, 33),
    keeps_second: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    kept = features - features // 2 if keeps_second else features // 2
    widths = (kept, *hidden, 2 * (features - kept))
    # The last layer is calm: where exp is steep, one element alone would be judged.
    scales = [*(i**-0.5 for i in widths[:-2]), 0.3 * widths[-2] ** -0.5]
    return {
        "x": draw(batch, features),
        "context": draw(batch, context) if context else None,
        "context_weight": draw(hidden[0], context, scale=0.5) if context else None,
        "weights": [
            draw(o, i, scale=scale) for (i, o), scale in zip(pairwise(widths), scales, strict=True)
        ],
        "biases": [draw(o, scale=0.1) for o in widths[1:]],
    }


def flat(given: dict[str, object]) -> list[Tensor]:
    tensors = [given["x"], given["context"], given["context_weight"]]
    return [t for t in (*tensors, *given["weights"], *given["biases"]) if t is not None]


def results(
    given: dict[str, object], coupling: Coupling, use: tuple[bool, bool] = (True, True)
) -> list[Tensor]:
    """y, log_det and the gradients to everything, of both or of one of them."""
    leaves = [tensor.requires_grad_() for tensor in flat(given)]
    outputs = coupling_layer(**given, coupling=coupling)
    generator = torch.Generator().manual_seed(99)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    total = sum(
        (o * u.to(o.dtype)).sum() for o, u, used in zip(outputs, upstream, use, strict=True) if used
    )
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in pairs]
    return [*(output.detach() for output in outputs), *gradients]


def to(given: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().to(dtype), given)


def copied(given: dict[str, object]) -> dict[str, object]:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), given)


def hold_to_the_rule(
    coupling: Coupling, use: tuple[bool, bool] = (True, True), **options: object
) -> None:
    budgets: dict[int, Budget] = {}
    for seed in range(48):
        given = operands(keeps_second=coupling.keeps_second, seed=seed, **options)
        guards = Guards()
        actual = results(guards.place_all(copied(given)), coupling, use)
        guards.check()
        with use_backend("reference"):
            # In float64 the reference can't measure its own rounding.
            same = results(to(given, torch.float32), coupling, use)
            exact = results(to(given, torch.float64), coupling, use)
        for k, trio in enumerate(zip(actual, same, exact, strict=True)):
            budgets.setdefault(k, Budget(f"result {k}", gradient=k > 1)).add(*trio)
    for budget in budgets.values():
        budget.check()


@pytest.fixture
def one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a call goes through the two operators apart."""

    def unless_reference(*arguments: object, **options: object) -> object:
        assert _backend._choice.backend == "reference", "the layer is not one operator"
        return affine_coupling(*arguments, **options)

    monkeypatch.setattr(_coupling_layer, "affine_coupling", unless_reference)


@every_level
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize(("inverse", "keeps_second"), list(product((False, True), repeat=2)))
def test_keeps_the_accuracy_rule(
    backend: str, scale_map: str, inverse: bool, keeps_second: bool, one_operator: None
) -> None:
    hold_to_the_rule(Coupling("relu", keeps_second, inverse, scale_map, 1.5))


@every_level
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend: str, activation: str, one_operator: None) -> None:
    hold_to_the_rule(PLAIN._replace(activation=activation), hidden=(64,))


@every_level
@pytest.mark.parametrize(
    "options",
    [
        {"features": 2, "batch": 1},
        {"features": 64, "context": 256, "hidden": (96, 96), "batch": 70},
        {"features": 131, "context": 0, "batch": 130},
        {"features": 1100, "context": 33, "hidden": (8,), "batch": 3},
        {"features": 67, "context": 31, "dtype": torch.float64},
        {"batch": 300, "hidden": (16, 16, 16)},
    ],
)
def test_sizes(backend: str, options: dict[str, object], one_operator: None) -> None:
    hold_to_the_rule(PLAIN, **options)
    hold_to_the_rule(PLAIN._replace(inverse=True, keeps_second=True), **options)


@needs_library
@pytest.mark.parametrize("use", [(True, False), (False, True)])
@pytest.mark.parametrize("inverse", [False, True])
def test_one_result_alone(use: tuple[bool, bool], inverse: bool, one_operator: None) -> None:
    hold_to_the_rule(PLAIN._replace(inverse=inverse), use)


@needs_library
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int, one_operator: None) -> None:
    given = operands(batch=batch)
    y, log_det, *gradients = results(given, PLAIN)
    assert y.shape == (batch, 7)
    assert log_det.shape == (batch,)
    for leaf, gradient in zip(flat(given), gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.isfinite().all()


@needs_library
def test_only_wanted_gradients(one_operator: None) -> None:
    given = operands()
    wanted = results(copied(given), PLAIN)[2:]
    for k, _ in enumerate(wanted):
        alone = copied(given)
        leaf = flat(alone)[k].requires_grad_()
        outputs = coupling_layer(**alone, coupling=PLAIN)
        generator = torch.Generator().manual_seed(99)
        upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        total = sum((o * u.to(o.dtype)).sum() for o, u in zip(outputs, upstream, strict=True))
        torch.testing.assert_close(torch.autograd.grad(total, leaf)[0], wanted[k])


@needs_library
def test_strides(one_operator: None) -> None:
    given = operands(batch=9)
    wanted = results(copied(given), PLAIN)
    for change in (
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.T.contiguous().T if t.dim() == 2 else t,
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    ):
        laid = torch.utils._pytree.tree_map_only(Tensor, lambda t, c=change: c(t.detach()), given)
        for got, want in zip(results(laid, PLAIN), wanted, strict=True):
            assert torch.equal(got, want)


@needs_library
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_gradients(context: int, inverse: bool, one_operator: None) -> None:
    given = operands(batch=3, features=4, context=context, hidden=(5,), dtype=torch.float64)
    coupling = PLAIN._replace(activation="tanh", inverse=inverse)
    leaves = [tensor.requires_grad_() for tensor in flat(given)]

    def call(*_: Tensor) -> tuple[Tensor, Tensor]:
        return coupling_layer(**given, coupling=coupling)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@needs_library
def test_threads_change_nothing(one_operator: None) -> None:
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(results(operands(batch=200, hidden=(96, 96)), PLAIN))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@needs_library
def test_operators_pass_opcheck() -> None:
    given = operands(batch=5)
    chain = (given["weights"], given["biases"])
    both = (given["context"], given["context_weight"])
    forward = torch.ops.geco_fast.coupling_layer.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (given["x"], *both, *chain, *PLAIN, True), test_utils=checks)
    y, log_det, hidden, raw = forward(given["x"], *both, *chain, *PLAIN, True)
    wanted = [True] * (3 + 2 * len(given["weights"]))
    rest = (*PLAIN, hidden, raw, torch.randn_like(y), torch.randn_like(log_det), wanted)
    torch.library.opcheck(
        torch.ops.geco_fast.coupling_layer_backward.default,
        (given["x"], *both, given["weights"], *rest),
        test_utils=checks,
    )


def test_parts_serve_what_the_operator_does_not() -> None:
    given = operands(dtype=torch.bfloat16)
    y, log_det = coupling_layer(**given, coupling=PLAIN)
    assert (y.dtype, log_det.dtype) == (torch.bfloat16, torch.float32)
    given = operands()
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = coupling_layer(**given, coupling=PLAIN)
    assert y.isfinite().all()
    with pytest.raises(TypeError, match=r"weights\[0\] must have the dtype of x"):
        coupling_layer(**{**given, "x": given["x"].double()}, coupling=PLAIN)
