"""`ConditionalRealNVP`, reversible and not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from geco_fast.nn import ConditionalRealNVP
from geco_fast.nn.real_nvp import standard_normal_log_prob
from geco_fast.testing.budget import Budget, assert_within_budget

DIRECTIONS = ("sample", "log_prob")


def build(
    couplings: int = 4, seed: int = 0, spread: float = 0.2, **options: object
) -> ConditionalRealNVP:
    torch.manual_seed(seed)
    flow = ConditionalRealNVP(5, 3, couplings=couplings, hidden_features=(16, 8), **options)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return flow


def run(flow: ConditionalRealNVP, direction: str, x: Tensor, context: Tensor) -> list[Tensor]:
    if direction == "sample":
        return list(flow.sample_and_log_prob(context, noise=x))
    return [flow.log_prob(x, context)]


def results(
    flow: ConditionalRealNVP, direction: str, x: Tensor, context: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    x, context = x.detach().requires_grad_(), context.detach().requires_grad_()
    outputs = run(flow, direction, x, context)
    total = sum(output.sin().sum() for output in outputs)
    return outputs, list(torch.autograd.grad(total, [x, context, *flow.parameters()]))


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("couplings", [1, 2, 7])
def test_sampling_and_density_agree(couplings: int, reversible: bool) -> None:
    flow = build(couplings, reversible=reversible).double()
    context = torch.randn(6, 3, dtype=torch.float64)
    z, log_q = flow.sample_and_log_prob(context)
    torch.testing.assert_close(flow.log_prob(z, context), log_q)


def test_density_is_the_change_of_variables() -> None:
    flow = build(5).double()
    noise, context = torch.randn(5, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    _, log_q = flow.sample_and_log_prob(context, noise=noise[None])
    jacobian = torch.autograd.functional.jacobian(
        lambda row: flow.sample_and_log_prob(context, noise=row[None])[0][0], noise
    )
    base = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum()
    torch.testing.assert_close(log_q[0], base - jacobian.slogdet().logabsdet)


def test_density_integrates_to_one() -> None:
    torch.manual_seed(2)
    flow = ConditionalRealNVP(2, 1, couplings=2, hidden_features=(8,), activation="tanh").double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    axis = torch.linspace(-12, 12, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = flow.log_prob(grid, torch.ones(len(grid), 1, dtype=torch.float64)).exp()
    assert abs(density.sum().item() * (axis[1] - axis[0]).item() ** 2 - 1) < 1e-3


def test_a_fresh_flow_is_the_standard_normal() -> None:
    torch.manual_seed(3)
    flow = ConditionalRealNVP(5, 3, hidden_features=(8,))
    noise = torch.randn(4, 5)
    z, log_q = flow.sample_and_log_prob(torch.randn(4, 3), noise=noise)
    assert torch.equal(z, noise)
    assert torch.equal(log_q, standard_normal_log_prob(noise))


def test_standard_normal_log_prob() -> None:
    x = torch.randn(4, 7, dtype=torch.float64)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(standard_normal_log_prob(x), exact)
    assert standard_normal_log_prob(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("depth", [1, 4, 32])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reversible_changes_nothing(direction: str, depth: int) -> None:
    budgets: dict[int, Budget] = {}
    for seed in range(8):
        plain = build(depth, seed, spread=0.05)
        reversible = copy.deepcopy(plain)
        reversible.reversible = True
        x, context = torch.randn(6, 5), torch.randn(6, 3)
        outputs, grads = results(reversible, direction, x, context)
        same_outputs, same_grads = results(plain, direction, x, context)
        wide = copy.deepcopy(plain).double()
        _, exact_grads = results(wide, direction, x.double(), context.double())
        assert all(map(torch.equal, outputs, same_outputs))
        for i, trio in enumerate(zip(grads, same_grads, exact_grads, strict=True)):
            budgets.setdefault(i, Budget(f"gradient {i}", gradient=True)).add(*trio)
    for budget in budgets.values():
        budget.check()


def saved_bytes(flow: ConditionalRealNVP, direction: str, x: Tensor, context: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(flow, direction, x, context)[-1].sum()
    return sum(kept.values())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reversible_memory_does_not_grow_with_depth(direction: str) -> None:
    x, context = torch.randn(64, 5), torch.randn(64, 3)
    kept = {
        (reversible, depth): saved_bytes(build(depth, reversible=reversible), direction, x, context)
        for reversible in (False, True)
        for depth in (4, 32)
    }
    assert kept[True, 32] == kept[True, 4]
    assert kept[False, 32] > 4 * kept[False, 4]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("frozen", ["context", "parameters", "one layer"])
def test_reversible_with_parts_frozen(frozen: str, direction: str) -> None:
    plain = build(4).double()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    context = torch.randn(6, 3, dtype=torch.float64, requires_grad=frozen != "context")
    if frozen != "context":
        held = plain if frozen == "parameters" else plain.layers[1]
        held.requires_grad_(False)
    reversible = copy.deepcopy(plain)
    reversible.reversible = True
    found = []
    for flow in (plain, reversible):
        wanted = [t for t in (x, context, *flow.parameters()) if t.requires_grad]
        total = sum(output.sin().sum() for output in run(flow, direction, x, context))
        found.append(torch.autograd.grad(total, wanted))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_reversible_refuses_a_double_backward() -> None:
    flow = build(2, reversible=True)
    context = torch.randn(3, 3, requires_grad=True)
    z, _ = flow.sample_and_log_prob(context)
    with pytest.raises(RuntimeError, match="no double backward where reversible=True"):
        torch.autograd.grad(z.sum(), context, create_graph=True)


def test_reversible_leaves_hooks_and_random_numbers_alone() -> None:
    flow = build(3, reversible=True)
    forward: list[object] = []
    gradients: list[object] = []
    flow.layers[1].register_forward_hook(lambda *_: forward.append(1))
    flow.layers[1].layers[0].weight.register_hook(lambda grad: gradients.append(grad))
    noise, context = torch.randn(4, 5), torch.randn(4, 3)
    state = torch.get_rng_state()
    flow.sample_and_log_prob(context, noise=noise)[1].sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(forward) == len(gradients) == 1


def test_reversible_under_autocast_recomputes_under_autocast() -> None:
    plain = build(4)
    reversible = copy.deepcopy(plain)
    reversible.reversible = True
    noise, context = torch.randn(6, 5), torch.randn(6, 3)
    found = []
    for flow in (plain, reversible):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_q = flow.sample_and_log_prob(context, noise=noise)
        total = z.sin().sum() + log_q.sum()
        found.append(torch.autograd.grad(total, list(flow.parameters())))
    wide = copy.deepcopy(plain).double()
    exact_z, exact_log_q = wide.sample_and_log_prob(context.double(), noise=noise.double())
    total = exact_z.sin().sum() + exact_log_q.sum()
    exact = torch.autograd.grad(total, list(wide.parameters()))
    for got, same, grad in zip(found[1], found[0], exact, strict=True):
        assert_within_budget(got, same, grad, gradient=True)


def test_round_trip_at_depth() -> None:
    flow = build(64, spread=0.05).double()
    noise = torch.randn(8, 5, dtype=torch.float64)
    context = torch.randn(8, 3, dtype=torch.float64)
    z, log_q = flow.sample_and_log_prob(context, noise=noise)
    torch.testing.assert_close(flow.log_prob(z, context), log_q)
    assert bool(z.isfinite().all())


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int, reversible: bool) -> None:
    flow = build(reversible=reversible)
    z, log_q = flow.sample_and_log_prob(torch.randn(batch, 3))
    assert z.shape == (batch, 5)
    assert log_q.shape == (batch,)
    (z.sum() + log_q.sum()).backward()


def test_gradients() -> None:
    flow = build(3, activation="silu").double()
    operands = [torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (5, 3)]
    assert torch.autograd.gradcheck(flow.log_prob, operands)
    flow.reversible = True
    assert torch.autograd.gradcheck(flow.log_prob, operands)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate: object) -> None:
    flow, z, context = build(reversible=True), torch.randn(2, 5), torch.randn(2, 3)
    assert torch.equal(duplicate(flow).log_prob(z, context), flow.log_prob(z, context))


def test_compiles_whole() -> None:
    flow, z, context = build(), torch.randn(2, 5), torch.randn(2, 3)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, context), flow.log_prob(z, context))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ConditionalRealNVP(1, 3), ValueError, "features must be >= 2"),
        (lambda: ConditionalRealNVP(4, 0), ValueError, "context_features must be >= 1"),
        (lambda: ConditionalRealNVP(4, 3, couplings=0), ValueError, "couplings must be >= 1"),
        (lambda: build().sample_and_log_prob(torch.randn(2, 4)), ValueError, "context must have"),
        (lambda: build().sample_and_log_prob([1]), TypeError, "context must be a tensor"),
        (
            lambda: build().sample_and_log_prob(torch.randn(2, 3), noise=torch.randn(3, 5)),
            ValueError,
            "noise must have shape",
        ),
        (
            lambda: build().log_prob(torch.randn(2, 4), torch.randn(2, 3)),
            ValueError,
            "z must have shape",
        ),
        (
            lambda: build().log_prob(torch.randn(2, 5), torch.randn(3, 3)),
            ValueError,
            "context must have shape",
        ),
    ],
)
def test_refuses(make: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
