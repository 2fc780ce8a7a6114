"""`NVPVAE`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from geco_fast.nn import NVPVAE

SMALL = {
    "latent_features": 5,
    "couplings": 3,
    "hidden_features": (16, 8),
    "hidden_channels": 4,
    "encoder_features": 6,
}
VARIANTS = {"plain": {}, "reversible": {"reversible": True}, "context": {"context_shape": 2}}


def build(variant: str, shape: tuple[int, int, int] = (3, 9, 12)) -> NVPVAE:
    torch.manual_seed(0)
    options = dict(VARIANTS[variant])
    if "context_shape" in options:
        options["context_shape"] = (options["context_shape"], *shape[1:])
    return NVPVAE(shape, **SMALL, **options)


def inputs(model: NVPVAE, batch: int) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    shape = model.context_shape
    return {
        "x": torch.rand(batch, *model.image_shape),
        "context": None if shape is None else torch.rand(batch, *shape),
        "noise": model.noise(batch),
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12), (2, 17, 15)])
def test_shapes(shape: tuple[int, int, int], batch: int, variant: str) -> None:
    model = build(variant, shape)
    values = inputs(model, batch)
    output = model(**values)
    assert output.reconstruction.shape == (batch, *shape)
    assert output.kl.shape == output.log_likelihood.shape == (batch,)
    samples = model.sample(batch, values["context"], noise=values["noise"])
    assert samples.shape == (batch, *shape)
    assert not samples.requires_grad


def test_a_fresh_posterior_is_the_prior() -> None:
    model = build("context")
    values = inputs(model, 4)
    output = model(**values)
    assert torch.equal(output.kl, torch.zeros(4))
    samples = model.sample(4, values["context"], noise=values["noise"])
    assert torch.equal(samples, output.reconstruction)


def test_kl_is_the_estimate_from_log_probs() -> None:
    model = build("plain").double()
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    values = {name: v if v is None else v.double() for name, v in inputs(model, 4).items()}
    features = model.encoder(values["x"])
    z, _ = model.flow.sample_and_log_prob(features, noise=values["noise"])
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(model(**values).kl, model.flow.log_prob(z, features) - prior)


def test_log_likelihood_is_the_gaussian_s() -> None:
    model = build("plain").double()
    with torch.no_grad():
        model.log_sigma.fill_(-0.4)
    x = inputs(model, 2)["x"].double()
    output = model(x)
    density = torch.distributions.Normal(output.reconstruction, model.log_sigma.exp())
    torch.testing.assert_close(output.log_likelihood, density.log_prob(x).sum((1, 2, 3)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_learns(variant: str) -> None:
    model = build(variant)
    values = inputs(model, 8)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        output = model(**values)
        loss = (output.kl - output.log_likelihood).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("variant", VARIANTS)
def test_copies(variant: str, duplicate: object) -> None:
    model = build(variant)
    values = inputs(model, 2)
    for got, want in zip(duplicate(model)(**values), model(**values), strict=True):
        assert torch.equal(got, want)


def test_state_dict_round_trip() -> None:
    model, other = build("reversible"), build("plain")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_state_dict(model.state_dict())
    values = inputs(model, 2)
    assert torch.equal(model(**values).kl, other(**values).kl)


def test_noise_is_reproducible() -> None:
    model = build("plain")
    first, second = (model.noise(2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(3)
    drawn = model.sample(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, model.sample(2, noise=model.noise(2)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str) -> None:
    model = build(variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs(model, 2))
        loss = (output.kl - output.log_likelihood).mean()
    loss.backward()
    assert output.kl.dtype == output.log_likelihood.dtype == torch.float32
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("variant", ["plain", "context"])
def test_compiles_whole(variant: str) -> None:
    model = build(variant)
    values = inputs(model, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for got, want in zip(compiled(**values), model(**values), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"image_shape": (1, 7, 8)}, ValueError, r"image_shape\[1\] must be >= 8"),
        ({"latent_features": 1}, ValueError, "latent_features must be >= 2"),
        ({"hidden_channels": 0}, ValueError, "hidden_channels must be >= 1"),
        ({"couplings": 1.0}, TypeError, "couplings must be an integer"),
        ({"context_shape": (1, 9, 8)}, ValueError, "context_shape must have the height and width"),
    ],
)
def test_constructor_refuses(
    options: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        NVPVAE(**{"image_shape": (1, 8, 8), **SMALL, **options})


@pytest.mark.parametrize(
    ("variant", "changed", "match"),
    [
        ("plain", {"x": torch.rand(2, 3, 8, 8)}, "x must have shape"),
        ("plain", {"context": torch.rand(2, 2, 9, 12)}, "context must be None"),
        ("context", {"context": None}, "context must be given"),
        ("context", {"context": torch.rand(1, 2, 9, 12)}, "context must have shape"),
        ("plain", {"noise": torch.randn(2, 4)}, "noise must have shape"),
    ],
)
def test_call_refuses(variant: str, changed: dict[str, object], match: str) -> None:
    model = build(variant)
    with pytest.raises(ValueError, match=match):
        model(**{**inputs(model, 2), **changed})
