"""What is special to `geco_update`: algorithm 1 step by step, its options and its state."""

import math

import pytest
import torch
from marks import needs_library
from torch._subclasses.fake_tensor import FakeTensorMode

from geco_fast import reference
from geco_fast.ops import geco_update
from geco_fast.ops.geco_update import geco_options

OPTIONS = {"alpha": 0.9, "step_size": 0.3}

each_backend = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=needs_library)]
)


def state(count, dtype=torch.float64, log_lambda=0.0):
    return (
        torch.zeros(count, dtype=dtype),
        torch.full((count,), log_lambda, dtype=dtype),
        torch.tensor(0),
    )


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def algorithm_1(batches, alpha, nu, bound=math.inf, warmup=0, every=1, speedup=1.0):
    """Plain Python, one constraint: yields penalty, average and multiplier after each step."""
    lam, average = 1.0, None
    for t, batch in enumerate(batches):
        c_hat = sum(batch) / len(batch)
        average = c_hat if average is None else alpha * average + (1 - alpha) * c_hat
        penalty = lam * average
        if t >= warmup and t % every == 0:
            step = nu * average * (speedup if average <= 0 else 1.0)
            lam *= math.exp(max(-bound, min(bound, step)))
        yield penalty, average, lam


@pytest.mark.parametrize(
    ("options", "literal"),
    [
        ({}, {}),
        ({"max_log_step": 0.05}, {"bound": 0.05}),
        ({"warmup_steps": 4}, {"warmup": 4}),
        ({"update_every": 3}, {"every": 3}),
        ({"warmup_steps": 2, "update_every": 3}, {"warmup": 2, "every": 3}),
        ({"speedup": 10.0}, {"speedup": 10.0}),
    ],
)
def test_is_algorithm_1(options, literal):
    batches = draw(12, 3, 5) + torch.linspace(1, -1, 12)[:, None, None]
    ema, log_lambda, step = state(3)
    loops = [algorithm_1(batches[:, index].tolist(), 0.9, 0.3, **literal) for index in range(3)]
    for batch, *wanted in zip(batches, *loops, strict=True):
        penalty = geco_update(batch, ema, log_lambda, step, **OPTIONS, **options)
        penalties, averages, lambdas = torch.tensor(wanted, dtype=torch.float64).T
        torch.testing.assert_close(penalty, penalties.sum())
        torch.testing.assert_close(ema, averages)
        torch.testing.assert_close(log_lambda.exp(), lambdas)
    assert step.item() == 12


def test_squared_softplus_is_gradient_ascent_on_its_variable():
    w = torch.full((2,), math.log(math.e - 1), dtype=torch.float64, requires_grad=True)
    ema, log_lambda, step = state(2)
    average = None
    for batch in draw(15, 2, 4):
        penalty = geco_update(batch, ema, log_lambda, step, **OPTIONS, parametrization="softplus2")
        c_hat = batch.mean(1)
        average = c_hat if average is None else 0.9 * average + 0.1 * c_hat
        loss = (torch.nn.functional.softplus(w) ** 2 * average).sum()
        (ascent,) = torch.autograd.grad(loss, w)
        w = (w + 0.3 * ascent).detach().requires_grad_()
        torch.testing.assert_close(penalty, loss.detach())
        torch.testing.assert_close(log_lambda.exp(), torch.nn.functional.softplus(w).detach() ** 2)


@pytest.mark.parametrize("parametrization", ["exp", "softplus2"])
@pytest.mark.parametrize(("value", "bound"), [(1e4, 50.0), (-1e4, 1e-3)])
def test_multipliers_keep_their_bounds(parametrization, value, bound):
    ema, log_lambda, step = state(1)
    options = OPTIONS | {"lambda_min": 1e-3, "lambda_max": 50.0, "parametrization": parametrization}
    for _ in range(3):
        geco_update(torch.full((1,), value), ema, log_lambda, step, **options)
        torch.testing.assert_close(log_lambda.exp().item(), bound)
    geco_update(torch.full((1,), -1e6 * value), ema, log_lambda, step, **options)
    torch.testing.assert_close(log_lambda.exp().item(), 50.0 if value < 0 else 1e-3)


@pytest.mark.parametrize("parametrization", ["exp", "softplus2"])
def test_one_sided_bounds_of_a_step(parametrization):
    options = OPTIONS | {"max_log_step": (math.log(0.9), math.log(1.05))}
    for value, factor in ((1e3, 1.05), (-1e3, 0.9)):
        ema, log_lambda, step = state(1)
        c_hat = torch.full((1,), value)
        geco_update(c_hat, ema, log_lambda, step, **options, parametrization=parametrization)
        torch.testing.assert_close(log_lambda.exp().item(), factor)


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("batch", [1, 8])
def test_gradient_is_lambda_over_batch_size(update, batch):
    ema, _, step = state(3)
    log_lambda = draw(3, seed=1)
    lambdas = log_lambda.exp()
    step.fill_(5)
    c_hat = draw(3, batch).requires_grad_()
    penalty = geco_update(c_hat, ema, log_lambda, step, **OPTIONS, update=update)
    (gradient,) = torch.autograd.grad(penalty, c_hat)
    torch.testing.assert_close(gradient, (lambdas / batch)[:, None].expand(3, batch))


def test_without_update_the_state_stays_and_the_value_is_the_batch_s():
    ema, log_lambda, step = draw(2, seed=1), draw(2, seed=2), torch.tensor(7)
    before = [tensor.clone() for tensor in (ema, log_lambda, step)]
    c_hat = draw(2, 6)
    penalty = geco_update(c_hat, ema, log_lambda, step, **OPTIONS, update=False)
    torch.testing.assert_close(penalty, (log_lambda.exp() * c_hat.mean(1)).sum())
    for tensor, old in zip((ema, log_lambda, step), before, strict=True):
        assert torch.equal(tensor, old)


def test_value_is_exactly_the_average_s():
    ema, log_lambda, step = torch.tensor([1e-3]), torch.zeros(1), torch.tensor(1)
    penalty = geco_update(torch.tensor([1e6]), ema, log_lambda, step, alpha=0.99, step_size=1e-9)
    assert torch.equal(penalty, ema[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_are_averaged_in_float32(dtype):
    values = draw(2, 1000).to(dtype)
    results = []
    for c_hat in (values, values.float()):
        ema, log_lambda, step = state(2, torch.float32)
        results.append((geco_update(c_hat, ema, log_lambda, step, **OPTIONS), ema, log_lambda))
    for low, wide in zip(*results, strict=True):
        assert low.dtype == torch.float32
        assert torch.equal(low, wide)


def test_batch_means_may_come_ready():
    c_hat = draw(2, 6)
    first, second = state(2), state(2)
    torch.testing.assert_close(
        geco_update(c_hat, *first, **OPTIONS), geco_update(c_hat.mean(1), *second, **OPTIONS)
    )
    torch.testing.assert_close(first, second)


def test_a_non_finite_constraint_does_not_touch_the_others():
    ema, log_lambda, step = state(2)
    c_hat = draw(2, 4)
    c_hat[0, 1] = math.nan
    alone = state(1)
    geco_update(c_hat, ema, log_lambda, step, **OPTIONS)
    geco_update(c_hat[1:], *alone, **OPTIONS)
    assert ema[0].isnan()
    assert torch.equal(ema[1:], alone[0])
    assert torch.equal(log_lambda[1:], alone[1])


def test_no_constraint_is_no_penalty():
    ema, log_lambda, step = state(0)
    assert geco_update(torch.empty(0, 3), ema, log_lambda, step, **OPTIONS).item() == 0
    assert step.item() == 1


def test_state_given_as_arguments_works_under_grad():
    ema, log_lambda, step = state(2)
    c_hat = draw(2, 5)

    def penalty(c_hat, ema, log_lambda, step):
        return geco_update(c_hat, ema, log_lambda, step, **OPTIONS)

    gradient = torch.func.grad(penalty)(c_hat, ema.clone(), log_lambda.clone(), step.clone())
    assert torch.equal(gradient, torch.full((2, 5), 1 / 5, dtype=torch.float64))


def test_reads_nothing_back_to_the_host():
    # Meta tensors hold no data: any read of a value would raise.
    ema, log_lambda, step = (tensor.to("meta") for tensor in state(2))
    options = OPTIONS | {"speedup": 2.0, "max_log_step": 0.1, "parametrization": "softplus2"}
    penalty = geco_update(torch.empty(2, 3, device="meta"), ema, log_lambda, step, **options)
    assert penalty.shape == ()


EXTREMES = [
    {},
    {"max_log_step": 0.5},
    {"max_log_step": (-0.1, 0.4), "speedup": 3.0},
    {"parametrization": "softplus2", "speedup": 0.5},
    {"warmup_steps": 2, "update_every": 2, "lambda_max": 1.5},
    {"update": False},
]


@needs_library
@pytest.mark.parametrize("options", EXTREMES)
@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("dtypes", ["ff", "fd", "df", "dd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernel_is_the_reference_for_every_dtype_and_value(dtype, dtypes, step, options):
    levels = [0.0, -0.0, 1e-3, -2.0, 50.0, -3e4, math.inf, -math.inf, math.nan]
    c_hat = torch.tensor(levels).to(dtype)[:, None] * torch.ones(1, 3, dtype=dtype)
    kinds = {"f": torch.float32, "d": torch.float64}
    results = []
    for function in (reference.geco_update, geco_update):
        ema = torch.linspace(-1, 1, 9).to(kinds[dtypes[0]])
        log_lambda = torch.linspace(-20, 20, 9).to(kinds[dtypes[1]])
        counter = torch.tensor(step)
        # Alone, so that one penalty that isn't finite hides no other.
        penalties = [
            function(
                c_hat[k : k + 1],
                ema[k : k + 1],
                log_lambda[k : k + 1],
                counter.clone(),
                **OPTIONS | options,
            )
            for k in range(9)
        ]
        function(c_hat[:0], ema[:0], log_lambda[:0], counter, **OPTIONS | options)
        results.append((torch.stack(penalties), ema, log_lambda, counter))
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got.isfinite(), wanted.isfinite())
        finite = wanted.isfinite()
        torch.testing.assert_close(got[finite], wanted[finite])


@each_backend
def test_state_may_be_views_of_one_buffer(backend):
    buffer = torch.zeros(3, 5, dtype=torch.float64)
    ema, log_lambda, c_hat = buffer[:, 0], buffer[:, 1], buffer[:, 2:]
    c_hat.copy_(draw(3, 3))
    plain = state(3)
    step = torch.zeros(4, dtype=torch.int64)[2]
    for _ in range(2):
        wanted = geco_update(c_hat.clone(), *plain, **OPTIONS, backend="reference")
        got = geco_update(c_hat, ema, log_lambda, step, **OPTIONS, backend=backend)
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close((ema, log_lambda, step), plain)


@each_backend
@pytest.mark.parametrize("name", ["ema", "log_lambda"])
def test_expanded_state_is_refused(backend, name):
    arguments = dict(zip(("ema", "log_lambda", "step"), state(3), strict=True))
    arguments[name] = torch.zeros((), dtype=torch.float64).expand(3)
    with pytest.raises(RuntimeError, match="clone"):
        geco_update(draw(3, 2), **arguments, **OPTIONS, backend=backend)
    geco_update(draw(3, 2), **arguments, **OPTIONS, backend=backend, update=False)


@needs_library
@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda b: (b[:6].view(2, 3), b[6:8], b[7:9]), "ema is written .* with log_lambda"),
        (lambda b: (b[:6].view(2, 3), b[5:7], b[8:10]), "ema .* shares memory with c_hat"),
        (lambda b: (b[:4:2], b[6:8], b[2:6:2]), "log_lambda .* shares memory with c_hat"),
        (lambda b: (b[:4:2], b[1:5:2], b[6:8]), ""),
        (lambda b: (b[:6].view(2, 3)[:, :2], b[2:6:3], b[6:8]), ""),
    ],
)
def test_overlapping_operands_are_refused(view, message):
    buffer = draw(10)
    c_hat, ema, log_lambda = view(buffer)
    before = buffer.clone()
    if not message:
        geco_update(c_hat, ema, log_lambda, torch.tensor(0), **OPTIONS, backend="cpu")
        return
    with pytest.raises(RuntimeError, match=message):
        geco_update(c_hat, ema, log_lambda, torch.tensor(0), **OPTIONS, backend="cpu")
    assert torch.equal(buffer, before)


@each_backend
def test_state_that_requires_grad_is_refused(backend):
    for name in ("ema", "log_lambda"):
        arguments = dict(zip(("ema", "log_lambda", "step"), state(2), strict=True))
        arguments[name].requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name} must not require grad"):
            geco_update(draw(2, 3), **arguments, **OPTIONS, backend=backend)
        geco_update(draw(2, 3), **arguments, **OPTIONS, backend=backend, update=False)
        with torch.no_grad():
            geco_update(draw(2, 3), **arguments, **OPTIONS, backend=backend)


@each_backend
def test_changed_state_is_noticed_by_autograd(backend):
    before = ema, log_lambda, step = state(2)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    graphs = [(weight * tensor).sum() for tensor in (ema, log_lambda, step)]
    versions = [tensor._version for tensor in before]
    geco_update(draw(2, 3), *before, **OPTIONS, update=False, backend=backend)
    assert [tensor._version for tensor in before] == versions
    geco_update(draw(2, 3), *before, **OPTIONS, backend=backend)
    for graph in graphs:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            graph.backward()


@each_backend
def test_penalty_is_linear(backend):
    """So its gradient is a constant, and depends on the incoming gradient alone."""
    c_hat = draw(2, 3).requires_grad_()
    penalty = geco_update(c_hat, *state(2), **OPTIONS, backend=backend)
    upstream = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(penalty, c_hat, upstream, create_graph=True)
    second = torch.autograd.grad(gradient.sum(), (upstream, c_hat), allow_unused=True)
    torch.testing.assert_close(second[0], torch.tensor(2.0, dtype=torch.float64))
    assert second[1] is None or not second[1].any()


@pytest.mark.parametrize("update", [True, False])
def test_new_batch_size_does_not_recompile(update):
    torch._dynamo.reset()

    def function(c_hat, ema, log_lambda, step):
        options = OPTIONS | {"max_log_step": 0.1, "speedup": 2.0}
        return geco_update(c_hat, ema, log_lambda, step, **options, update=update)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    states = state(3), state(3)
    for batch in (5, 2, 8, 33):
        with torch.compiler.set_stance("default" if batch == 5 else "fail_on_recompile"):
            values = [draw(3, batch).requires_grad_() for _ in range(2)]
            results = [
                run(value, *tensors)
                for run, value, tensors in zip((function, compiled), values, states, strict=True)
            ]
        gradients = [torch.autograd.grad(r, v)[0] for r, v in zip(results, values, strict=True)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(*states)


@each_backend
@pytest.mark.parametrize(
    "compiler", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_gradients_are_by_the_multipliers_before(backend, compiler):
    """They may be recomputed for backward, but not from the state that the call has written."""
    torch._dynamo.reset()
    compiled = torch.compile(geco_update, fullgraph=True, backend=compiler)
    states = state(3), state(3)
    for _ in range(3):
        values = [draw(3, 7).requires_grad_() for _ in range(2)]
        results = [
            run(value, *tensors, **OPTIONS, backend=backend)
            for run, value, tensors in zip((geco_update, compiled), values, states, strict=True)
        ]
        gradients = [
            torch.autograd.grad(result, value)[0]
            for result, value in zip(results, values, strict=True)
        ]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(*states)


@pytest.mark.parametrize("update", [True, False])
def test_compiled_vmap_is_one_call_each(update):
    torch._dynamo.reset()

    def each(c_hat, ema, log_lambda, step):
        return geco_update(c_hat, ema, log_lambda, step, **OPTIONS, update=update)

    compiled = torch.compile(torch.func.vmap(each), fullgraph=True, backend="aot_eager")
    values, batched = draw(4, 3), [tensor.expand(4, *tensor.shape).clone() for tensor in state(3)]
    wanted = [each(value, *(t.clone() for t in state(3))) for value in values]
    torch.testing.assert_close(compiled(values, *batched), torch.stack(wanted))


def test_checked_options_do_not_hide_wrong_ones():
    """Equal keys of a cache, some of them wrong."""
    assert geco_options(0.5, 1, 1e-6, 1e6, None, 1, 1, None, "exp").step_size == 1
    for wrong in ((0.5, True, 1, 1), (0.5, 1, True, 1), (0.5, 1, 1, 1.0)):
        alpha, step_size, warmup_steps, update_every = wrong
        with pytest.raises(TypeError):
            geco_options(alpha, step_size, 1e-6, 1e6, None, warmup_steps, update_every, None, "exp")
    with pytest.raises(TypeError, match="max_log_step must be a number, got list"):
        geco_options(0.5, 1, 1e-6, 1e6, [-1.0, 1.0], 0, 1, None, "exp")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"c_hat": torch.ones(2, 3, 4)}, ValueError, r"c_hat must be \[L\] or \[L, B\]"),
        ({"c_hat": torch.ones(3, 3)}, ValueError, r"ema must have shape \[3\]"),
        ({"c_hat": torch.ones(2).long()}, TypeError, "c_hat must have one of the dtypes"),
        ({"c_hat": torch.ones(2, 3).to_sparse()}, TypeError, "c_hat must be a dense tensor"),
        ({"ema": None}, TypeError, "ema must be a tensor, got NoneType"),
        ({"ema": torch.zeros(2).to_sparse()}, TypeError, "ema must be a dense tensor"),
        ({"ema": torch.zeros(2).half()}, TypeError, "ema must have one of the dtypes float32, f"),
        ({"log_lambda": torch.zeros(1)}, ValueError, r"log_lambda must have shape \[2\]"),
        ({"step": torch.tensor(0.0)}, TypeError, "step must have the dtype int64, got torch.f"),
        ({"step": torch.tensor([0])}, ValueError, r"step must have shape \[\]"),
        ({"ema": torch.zeros(2, device="meta")}, ValueError, "ema must be on the device of c_hat"),
        ({"alpha": 1.0}, ValueError, "alpha must be < 1"),
        ({"alpha": -0.1}, ValueError, "alpha must be >= 0"),
        ({"alpha": "0.9"}, TypeError, "alpha must be a number, got str '0.9'"),
        ({"step_size": 0.0}, ValueError, "step_size must be > 0"),
        ({"lambda_min": 0.0}, ValueError, "lambda_min must be > 0"),
        ({"lambda_min": 2.0, "lambda_max": 1.0}, ValueError, "lambda_min must be <= lambda_max"),
        ({"max_log_step": -1.0}, ValueError, "max_log_step must be > 0"),
        ({"max_log_step": (0.1, 0.2)}, ValueError, "max_log_step must be .down <= 0, up >= 0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be >= 0"),
        ({"update_every": 0}, ValueError, "update_every must be >= 1"),
        ({"update_every": 1.0}, TypeError, "update_every must be an int"),
        ({"speedup": 0}, ValueError, "speedup must be > 0"),
        ({"parametrization": "log"}, ValueError, "parametrization must be one of .*'log'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    ema, log_lambda, step = state(2)
    arguments = {"c_hat": torch.ones(2, 3), "ema": ema, "log_lambda": log_lambda, "step": step}
    with pytest.raises(error, match=message):
        geco_update(**arguments | OPTIONS | change)
    assert step.item() == 0


def test_wrong_fake_tensors_are_named():
    with FakeTensorMode():
        ema, log_lambda, step = state(2)
        for wrong, message in (
            ((torch.ones(3, 3), ema, log_lambda, step), r"ema must have shape \[3\]"),
            ((torch.ones(2, 3), ema, log_lambda, step.double()), "step must have the dtype int64"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                geco_update(*wrong, **OPTIONS)
