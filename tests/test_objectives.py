"""Objectives against their formulas."""

import math

import pytest
import torch
from torch.distributions import Normal

from geco_fast.objectives import OBJECTIVES, VAEOutput, annealed, beta_vae, elbo, geco, gqn_sigma


@pytest.fixture
def output():
    generator = torch.Generator().manual_seed(0)
    reconstruction = torch.rand(3, 2, 4, 5, dtype=torch.float64, generator=generator)
    kl, log_likelihood = torch.rand(2, 3, dtype=torch.float64, generator=generator)
    return VAEOutput(reconstruction, kl, log_likelihood)


@pytest.fixture
def target():
    return torch.rand(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_one_signature(name, output, target):
    assert OBJECTIVES[name](output, target, 10).shape == (3,)
    assert torch.equal(OBJECTIVES[name](output, target), OBJECTIVES[name](output, target, step=0))


def test_forms(output, target):
    assert torch.equal(geco(output, target), output.kl)
    assert torch.equal(elbo(output, target), output.kl - output.log_likelihood)
    assert torch.equal(beta_vae(output, target), elbo(output, target))
    torch.testing.assert_close(
        beta_vae(output, target, beta=0.25), 0.25 * output.kl - output.log_likelihood
    )
    with pytest.raises(ValueError, match="beta must be >= 0"):
        beta_vae(output, target, beta=-1.0)


@pytest.mark.parametrize("step", [0, 1000, 150_000, 400_000])
def test_annealed_is_the_elbo_of_an_annealed_gaussian(step, output, target):
    sigma = max(0.7 + 1.3 * (1 - step / 2e5), 0.7)
    assert gqn_sigma(step) == pytest.approx(sigma)
    log_likelihood = Normal(output.reconstruction, sigma).log_prob(target).sum((1, 2, 3))
    for given in (step, torch.tensor(step)):
        loss = annealed(output, target, given)
        torch.testing.assert_close(loss.float(), (output.kl - log_likelihood).float())


def test_annealing_follows_its_options():
    assert gqn_sigma(5, start=3.0, end=1.0, steps=10) == 2.0
    assert math.isclose(gqn_sigma(torch.tensor(50), start=3.0, end=1.0, steps=10), 1.0)
