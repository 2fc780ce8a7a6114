"""GECO as a module: its value, its state, its errors, and several processes."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from geco_fast.constraints import ReconstructionError
from geco_fast.geco import GECO
from geco_fast.ops import geco_update


def batches(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator)


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_is_objective_plus_penalty():
    geco = GECO(["a", "b"], alpha=0.9, step_size=0.2, lambda_init=3.0, max_log_step=0.1).double()
    ema, log_lambda, step = (tensor.clone() for tensor in geco.buffers())
    for objective, a, b in batches(6, 3, 4).double():
        loss = geco(objective, {"b": b, "a": a})
        penalty = geco_update(
            torch.stack([a, b]),
            ema,
            log_lambda,
            step,
            alpha=0.9,
            step_size=0.2,
            max_log_step=0.1,
        )
        assert torch.equal(loss, objective.mean() + penalty)
        assert torch.equal(torch.stack(list(geco.lambdas.values())), log_lambda.exp())
    assert list(geco.lambdas) == ["a", "b"]


def test_scalars_and_batches_mix():
    geco, whole = GECO(["a", "b"]), GECO(["a", "b"])
    a, b = batches(2, 5)
    loss = geco(a.mean(), {"a": a.mean(), "b": b})
    torch.testing.assert_close(loss, whole(a, {"a": a, "b": b}))
    torch.testing.assert_close(geco.ema, whole.ema)


def test_evaluation_mode_leaves_the_state():
    geco = GECO(["re"], lambda_init=2.0)
    geco(torch.tensor(1.0), {"re": torch.tensor(0.5)})
    before = copy.deepcopy(geco)
    objective, value = batches(2, 6)
    loss = geco.eval()(objective, {"re": value})
    torch.testing.assert_close(loss, objective.mean() + geco.lambdas["re"] * value.mean())
    assert states_equal(geco, before)


def test_multiplier_rises_while_violated_and_falls_when_satisfied():
    geco = GECO(["re"], alpha=0.5, step_size=0.1)
    history = []
    for value in [1.0] * 20 + [-1.0] * 40:
        geco(torch.tensor(0.0), {"re": torch.tensor(value)})
        history.append(geco.lambdas["re"].item())
        assert geco.satisfied.item() == (geco.ema.item() <= 0)
    assert history[:20] == sorted(history[:20])
    assert history[-30:] == sorted(history[-30:], reverse=True)
    assert geco.beta.item() == pytest.approx(1 / history[-1])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None])
def test_resumes_bit_for_bit(copier):
    def run(geco, values):
        return [geco(value, {"re": value}) for value in values]

    values = batches(20, 4)
    whole, first = GECO(["re"], speedup=3.0), GECO(["re"], speedup=3.0)
    losses = run(whole, values)
    run(first, values[:9])
    if copier is None:
        resumed = GECO(["re"], speedup=3.0)
        resumed.load_state_dict(first.state_dict())
    else:
        resumed = copier(first)
    assert run(resumed, values[9:]) == losses[9:]
    assert states_equal(resumed, whole)


def test_state_is_buffers_without_a_graph():
    geco = GECO(["re"])
    value = torch.ones(3, requires_grad=True)
    geco(value, {"re": value}).backward()
    assert {name for name, _ in geco.named_buffers()} == {"ema", "log_lambda", "step"}
    assert not any(buffer.requires_grad for buffer in geco.buffers())
    assert geco.double().log_lambda.dtype == torch.float64
    assert geco.step.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_never_becomes_16_bit(dtype):
    geco = GECO(["re"], lambda_init=1.001)
    before = geco.log_lambda.clone()
    model = nn.Sequential(nn.Linear(2, 2), geco).to(dtype)
    assert model[0].weight.dtype == dtype
    assert torch.equal(geco.log_lambda, before)
    assert geco.ema.dtype == torch.float32
    loss = geco(torch.ones(3, dtype=dtype), {"re": torch.ones(3, dtype=dtype)})
    assert loss.dtype == torch.float32


def test_constraint_modules_are_called_by_name():
    geco = GECO({"re": ReconstructionError(0.1), "sum": ReconstructionError(2.0, "sum")})
    x, y = batches(2, 3, 1, 4, 4)
    values = geco.evaluate_constraints(x, y)
    torch.testing.assert_close(values["re"], ((x - y) ** 2).mean((1, 2, 3)) - 0.01)
    torch.testing.assert_close(values["sum"], ((x - y) ** 2).sum((1, 2, 3)) - 4)
    geco(values["re"], values)


def test_log_dict_holds_plain_numbers():
    geco = GECO(["re"], step_size=0.5)
    geco(torch.tensor(0.0), {"re": torch.tensor(1.0)})
    log = geco.log_dict()
    assert log == pytest.approx(
        {"lambda/re": math.exp(0.5), "constraint/re": 1.0, "beta": math.exp(-0.5)}
    )
    assert all(type(value) is float for value in log.values())
    assert GECO(["a", "b"]).log_dict() == {
        "lambda/a": 1.0,
        "lambda/b": 1.0,
        "constraint/a": 0.0,
        "constraint/b": 0.0,
    }


@pytest.mark.parametrize("bound", [1e6, 1e-6, 0.1, 3.0, 1234.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_multiplier_is_past_its_bounds(bound, dtype):
    """The exponential of a rounded logarithm can be."""
    geco = GECO(["re"], lambda_init=bound, lambda_min=bound, lambda_max=bound).to(dtype)
    geco(torch.tensor(0.0), {"re": torch.tensor(1.0)})
    assert geco.lambdas["re"] == torch.tensor(bound, dtype=dtype)
    assert geco.log_dict()["lambda/re"] == bound
    assert geco.beta == 1 / torch.tensor(bound, dtype=dtype)


def test_is_not_satisfied_before_it_has_seen_a_value():
    assert not GECO(["re"]).satisfied


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ("re", {}, TypeError, "constraints must be a sequence of names .* got str 're'"),
        ([], {}, ValueError, "constraints must have names, one or more"),
        ([""], {}, ValueError, "constraints must have names"),
        (["re", "re"], {}, ValueError, "constraints must have different names"),
        ({"re": 1}, {}, TypeError, r"constraints\['re'\] must be a torch.nn.Module"),
        ({"a.b": nn.Identity()}, {}, ValueError, "constraints can't have the name 'a.b'"),
        (["re"], {"lambda_init": 0.0}, ValueError, "lambda_init must be > 0"),
        (["re"], {"lambda_init": 1e7}, ValueError, "lambda_init must be in"),
        (["re"], {"alpha": 1.0}, ValueError, "alpha must be < 1"),
    ],
)
def test_wrong_construction_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        GECO(arguments, **options)


@pytest.mark.parametrize(
    ("objective", "values", "error", "message"),
    [
        (torch.ones(2), {}, ValueError, r"values must hold the constraints \['re'\], got \[\]"),
        (torch.ones(2), {"re": torch.ones(2), "x": torch.ones(2)}, ValueError, "values must hold"),
        (torch.ones(2), {"re": torch.ones(2, 1)}, ValueError, r"values\['re'\] must be \[\] or"),
        (torch.ones(2), {"re": 1.0}, TypeError, r"values\['re'\] must be a tensor, got float 1.0"),
        (torch.ones(2, 2), {"re": torch.ones(2)}, ValueError, r"objective must be \[\] or \[B\]"),
        (1.0, {"re": torch.ones(2)}, TypeError, "objective must be a tensor"),
    ],
)
def test_wrong_calls_are_named(objective, values, error, message):
    geco = GECO(["re"])
    with pytest.raises(error, match=message):
        geco(objective, values)
    assert geco.step.item() == 0


def test_several_constraints_have_no_beta():
    geco = GECO(["a", "b"])
    with pytest.raises(ValueError, match="beta is defined for one constraint"):
        _ = geco.beta
    with pytest.raises(ValueError, match="constraints must be given as a mapping"):
        geco.evaluate_constraints()


@pytest.mark.parametrize("parametrization", ["exp", "softplus2"])
def test_compiles_without_break_or_recompile(parametrization):
    torch._dynamo.reset()
    geco = GECO(["a", "b"], max_log_step=0.1, speedup=2.0, parametrization=parametrization)
    eager = copy.deepcopy(geco)
    function = torch.compile(geco, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (11, 13, 17):
        objective, a, b = batches(3, batch)
        with torch._dynamo.config.patch(error_on_recompile=batch > 11):
            loss = function(objective, {"a": a, "b": b})
        torch.testing.assert_close(loss, eager(objective, {"a": a, "b": b}))
        torch.testing.assert_close(geco.log_lambda, eager.log_lambda)


def _train_on_share(rank, world, folder, values, shares):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    geco = GECO(["a", "b"], step_size=0.5, process_group=dist.group.WORLD)
    assert copy.deepcopy(geco)._process_group.group is dist.group.WORLD
    assert pickle.loads(pickle.dumps(geco))._process_group.group is None
    losses, gradients = [], []
    for objective, a, b in values:
        a, b = (value[shares[rank]].requires_grad_() for value in (a, b))
        loss = geco(objective[shares[rank]], {"a": a, "b": b})
        gradients.append(torch.stack(torch.autograd.grad(loss, (a, b))))
        losses.append(loss.detach() - objective[shares[rank]].mean())
    torch.save((geco.state_dict(), losses, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2)])
def test_ranks_hold_the_multipliers_of_the_joined_batch(tmp_path, sizes):
    values = batches(5, 3, sum(sizes))
    shares = (slice(0, sizes[0]), slice(sizes[0], None))
    mp.spawn(_train_on_share, (2, str(tmp_path), values, shares), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    geco = GECO(["a", "b"], step_size=0.5)
    for step, (objective, a, b) in enumerate(values):
        lambdas = torch.stack(list(geco.lambdas.values()))
        penalty = geco(objective, {"a": a, "b": b}) - objective.mean()
        for (_, losses, gradients), size in zip((first, second), sizes, strict=True):
            torch.testing.assert_close(losses[step], penalty)
            torch.testing.assert_close(gradients[step], (lambdas / size)[:, None].expand(2, size))
    for name, buffer in geco.state_dict().items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], buffer)
