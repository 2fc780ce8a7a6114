"""What is special to `gaussian_latent`: the closed form of its divergence."""

import math

import pytest
import torch
from marks import every_level, needs_library
from torch.distributions import Normal, kl_divergence

from geco_fast import reference
from geco_fast._checks import FLOATING
from geco_fast.ops import gaussian_latent
from geco_fast.testing.budget import assert_within_budget


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4, 5)])
def test_matches_torch_distributions(shape):
    generator = torch.Generator().manual_seed(len(shape))
    q_mean, q_log_std, p_mean, p_log_std, noise = torch.randn(
        5, *shape, dtype=torch.float64, generator=generator
    )
    z, kl = gaussian_latent(q_mean, q_log_std, p_mean, p_log_std, noise)
    each = kl_divergence(Normal(q_mean, q_log_std.exp()), Normal(p_mean, p_log_std.exp()))
    torch.testing.assert_close(kl, each.reshape(shape[0], -1).sum(1))
    torch.testing.assert_close((z - q_mean) / q_log_std.exp(), noise)


def test_divergence_from_itself_is_exactly_zero():
    mean, log_std, noise = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    _, kl = gaussian_latent(mean, log_std, mean, log_std, noise)
    assert torch.equal(kl, torch.zeros(4))


def test_divergence_near_the_prior_does_not_cancel():
    zero = torch.zeros(1, 1)
    log_std = torch.full((1, 1), 1e-3)
    _, kl = gaussian_latent(zero, log_std, zero, zero, zero)
    _, exact = gaussian_latent(*(t.double() for t in (zero, log_std, zero, zero, zero)))
    # 0.5 * (exp(2r) - 1) - r in float32 would be off by an ulp of 1, that is, by 6% of r^2.
    assert abs(kl.double() - exact) <= torch.finfo(torch.float32).eps * log_std


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands_give_a_float32_divergence(dtype):
    operands = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    z, kl = gaussian_latent(*operands)
    wide_z, wide_kl = gaussian_latent(*operands.float())
    assert torch.equal(z, wide_z.to(dtype))
    assert torch.equal(kl, wide_kl)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_is_accurate_at_any_distance(dtype, backend):
    """Relative to itself: near the prior it is r^2, far from it exp(2r) / 2 or -r."""
    r = torch.logspace(-15, 1.5, 4000, dtype=torch.float64)
    r = torch.cat([-30 * r, r]).to(dtype)
    zero = torch.zeros_like(r)
    _, kl = gaussian_latent(zero, r, zero, zero, zero, backend=backend)
    wide = r.double()
    series = sum(0.5 * (2 * wide) ** k / float(math.factorial(k)) for k in range(2, 40))
    exact = torch.where(wide.abs() < 0.5, series, 0.5 * torch.expm1(2 * wide) - wide)
    assert ((kl.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * exact).all()


@every_level
@pytest.mark.parametrize("dtype", FLOATING)
def test_non_finite_values_stay_where_they_are(dtype, backend):
    operands = torch.randn(5, 17, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    for k, value in enumerate((math.nan, math.inf, -math.inf)):
        for operand in range(5):
            operands[operand, 5 * k + operand, 7 * operand] = value
    same = torch.float32 if dtype == torch.float64 else dtype
    for got, s, exact in zip(
        gaussian_latent(*operands, backend=backend),
        reference.gaussian_latent(*operands.to(same)),
        reference.gaussian_latent(*operands.double()),
        strict=True,
    ):
        assert not exact.isfinite().all()
        assert exact.isfinite().any()
        assert_within_budget(got, s, exact)


@every_level
def test_an_unused_result_has_no_say(backend):
    """Nor does infinity times its absent gradient become NaN."""
    huge = torch.full((2, 3), 100.0)
    zero = torch.zeros(2, 3)
    leaves = [t.clone().requires_grad_() for t in (zero, huge, zero, huge, zero + 1)]
    for used in (0, 1):
        grads = []
        for function in (
            lambda *t: gaussian_latent(*t, backend=backend),
            reference.gaussian_latent,
        ):
            result = function(*leaves)[used].sum()
            grads.append(torch.autograd.grad(result, leaves, allow_unused=True))
        for got, wanted in zip(*grads, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted)


def test_only_what_needs_a_gradient_gets_one():
    values = torch.randn(5, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for wanted in range(1, 32):
        leaves = [v.clone().requires_grad_(bool(wanted >> k & 1)) for k, v in enumerate(values)]
        chosen = [leaf for leaf in leaves if leaf.requires_grad]
        grads = []
        for function in (gaussian_latent, reference.gaussian_latent):
            z, kl = function(*leaves)
            grads.append(torch.autograd.grad(z.square().sum() + kl.sum(), chosen))
        for got, exact in zip(*grads, strict=True):
            torch.testing.assert_close(got, exact)


def test_threads_do_not_change_a_bit():
    operands = torch.randn(5, 3, 20001, generator=torch.Generator().manual_seed(4))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gaussian_latent(*operands))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_level
def test_any_number_of_dimensions(backend):
    operands = torch.randn(5, 2, 3, 1, 2, 1, 2, 1, 2, 1, 2)
    z, kl = gaussian_latent(*operands, backend=backend)
    flat_z, flat_kl = gaussian_latent(*operands.flatten(2), backend=backend)
    assert torch.equal(z, flat_z.view(z.shape))
    assert torch.equal(kl, flat_kl)


@needs_library
def test_operator_itself_checks_what_memory_needs():
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="gaussian_latent: shapes differ"):
        torch.ops.geco_fast.gaussian_latent(x, x, x[:1], x, x)
    with pytest.raises(RuntimeError, match="gaussian_latent: dtypes differ"):
        torch.ops.geco_fast.gaussian_latent(x, x, x, x, x.double())
    with pytest.raises(RuntimeError, match="the gradient of a sum must be"):
        torch.ops.geco_fast.gaussian_latent_backward(x, x, x, x, x, x, x[0], 31)
