"""What is special to `geco_update`: algorithm 1 step by step, its options and its state."""

import math

import pytest
import torch

from geco_fast.ops import geco_update

OPTIONS = {"alpha": 0.9, "step_size": 0.3}


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
    assert torch.equal(gradient, (lambdas / batch)[:, None].expand(3, batch))


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
    assert torch.equal(
        geco_update(c_hat, *first, **OPTIONS), geco_update(c_hat.mean(1), *second, **OPTIONS)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"c_hat": torch.ones(2, 3, 4)}, ValueError, r"c_hat must be \[L\] or \[L, B\]"),
        ({"c_hat": torch.ones(3, 3)}, ValueError, r"ema must have shape \[3\]"),
        ({"c_hat": torch.ones(2).long()}, TypeError, "c_hat must have one of the dtypes"),
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
