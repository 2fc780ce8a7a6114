"""What is special to `gaussian_latent`: the closed form of its divergence."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from geco_fast.ops import gaussian_latent


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
