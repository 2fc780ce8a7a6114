"""`ConvDraw`, against its plain twin."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from geco_fast import ops, use_backend
from geco_fast.bench.baselines.conv_draw import PlainConvDraw
from geco_fast.bench.memory import peak_bytes
from geco_fast.nn import ConvDraw
from geco_fast.objectives import VAEOutput
from geco_fast.ops.conv_lstm import WINOGRAD_BOUND
from geco_fast.testing.budget import Budget

SMALL = {"hidden_channels": 6, "latent_channels": 3, "steps": 3, "kernel_size": 3, "downsample": 2}
IMAGE = (3, 8, 12)
DRAWS = 8
VARIANTS = {
    "shared": {},
    "unshared": {"shared_cores": False},
    "context": {"context_channels": 5},
    "unshared context": {"context_channels": 5, "shared_cores": False},
    "context image": {"context_channels": 5, "context_shape": (2, 8, 12)},
}


def build(kind: type[ConvDraw], variant: str, seed: int = 0) -> ConvDraw:
    torch.manual_seed(seed)
    model = kind(IMAGE, **SMALL, **VARIANTS[variant])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: ConvDraw, batch: int, seed: int = 1) -> dict[str, Tensor | None]:
    torch.manual_seed(seed)
    context = None
    if model.context_shape is not None:
        context = torch.rand(batch, *model.context_shape)
    elif model.context_channels:
        context = torch.rand(batch, model.context_channels, *model.spatial)
    return {
        "x": torch.rand(batch, *model.image_shape),
        "context": context,
        "noise": model.noise(batch),
    }


def to(values: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {name: None if v is None else v.to(dtype) for name, v in values.items()}


def run(model: ConvDraw, values: dict[str, Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    output = model(**values)
    total = output.reconstruction.sin().sum() + output.kl.sum() - output.log_likelihood.sum()
    return list(output), list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize("variant", VARIANTS)
def test_hoisting_changes_nothing(variant: str) -> None:
    budgets: dict[str, Budget] = {}
    for seed in range(DRAWS):
        model, plain = build(ConvDraw, variant, seed), build(PlainConvDraw, variant, seed)
        values = inputs(model, 2, DRAWS + seed)
        outputs, grads = run(model, values)
        same_outputs, same_grads = run(plain, values)
        exact_outputs, exact_grads = run(plain.double(), to(values, torch.float64))
        for name, *trio in zip(
            VAEOutput._fields, outputs, same_outputs, exact_outputs, strict=True
        ):
            budgets.setdefault(name, Budget(name, bound=WINOGRAD_BOUND)).add(*trio)
        names = [f"gradient of {name}" for name, _ in model.named_parameters()]
        for name, *trio in zip(names, grads, same_grads, exact_grads, strict=True):
            budget = Budget(name, gradient=True, bound=WINOGRAD_BOUND)
            budgets.setdefault(name, budget).add(*trio)
    for budget in budgets.values():
        budget.check()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shapes(variant: str, batch: int) -> None:
    model = build(ConvDraw, variant)
    values = inputs(model, batch)
    output = model(**values)
    assert output.reconstruction.shape == (batch, *IMAGE)
    assert output.kl.shape == output.log_likelihood.shape == (batch,)
    assert bool((output.kl >= 0).all())
    assert model.noise(batch).shape == (3, batch, 3, 4, 6)
    samples = model.sample(batch, values["context"], noise=values["noise"])
    assert samples.shape == (batch, *IMAGE)
    assert not samples.requires_grad


def test_log_likelihood_is_the_gaussian_s() -> None:
    model = build(ConvDraw, "shared").double()
    values = to(inputs(model, 2), torch.float64)
    output = model(**values)
    density = torch.distributions.Normal(output.reconstruction, model.log_sigma.exp())
    torch.testing.assert_close(output.log_likelihood, density.log_prob(values["x"]).sum((1, 2, 3)))


def test_a_posterior_equal_to_the_prior_reconstructs_a_sample() -> None:
    model = build(ConvDraw, "context").double()
    core = model.cores[0]
    with torch.no_grad():
        for head in (core.posterior, core.prior):
            head.weight.zero_()
            head.bias.copy_(torch.linspace(-1, 1, head.bias.numel()))
    values = to(inputs(model, 2), torch.float64)
    output = model(**values)
    assert torch.equal(output.kl, torch.zeros(2, dtype=torch.float64))
    samples = model.sample(2, values["context"], noise=values["noise"])
    torch.testing.assert_close(output.reconstruction, samples)


def test_invariant_inputs_are_convolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ConvDraw, "context")
    widths: list[int] = []
    step = ops.conv_lstm_step

    def counted(x: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
        widths.append(x.shape[1])
        return step(x, *args, **options)

    monkeypatch.setattr(ops, "conv_lstm_step", counted)
    model(**inputs(model, 1))
    patch, hidden, latent = 3 * 2**2, 6, 3
    assert widths == [patch + hidden, patch + latent] * 3


def test_noise_is_reproducible() -> None:
    model = build(ConvDraw, "shared")
    first, second = (model.noise(2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert model.double().noise(1).dtype == torch.float64
    assert model.noise(1, dtype=torch.float32).dtype == torch.float32
    torch.manual_seed(3)
    drawn = model.sample(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, model.sample(2, noise=model.noise(2)))


def test_images_in_a_batch_do_not_touch_each_other() -> None:
    model = build(ConvDraw, "context image").double()
    values = to(inputs(model, 3), torch.float64)
    values["x"].requires_grad_()
    model(**values).kl[1].backward()
    grad = values["x"].grad
    assert bool(grad[1].any())
    assert not grad[[0, 2]].any()


@pytest.mark.parametrize("variant", ["shared", "context image"])
def test_learns(variant: str) -> None:
    model = build(ConvDraw, variant)
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


def test_log_stds_stay_bounded() -> None:
    model = build(ConvDraw, "shared")
    with torch.no_grad():
        model.cores[0].posterior.bias.fill_(-1e6)
        model.cores[0].prior.bias.fill_(1e6)
    output, grads = run(model, inputs(model, 2))
    assert all(bool(value.isfinite().all()) for value in (*output, *grads))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate: object) -> None:
    model = build(ConvDraw, "unshared context")
    values = inputs(model, 1)
    for got, want in zip(duplicate(model)(**values), model(**values), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_moves_both_ways(variant: str) -> None:
    model, plain = build(ConvDraw, variant, 1), build(PlainConvDraw, variant, 2)
    values = inputs(model, 1)
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    other = build(ConvDraw, variant, 3)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(**values).kl, model(**values).kl)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_changes_nothing(variant: str) -> None:
    model = build(ConvDraw, variant)
    values = inputs(model, 2)
    wanted = run(model, values)
    model.recompute = True
    for got, want in zip(run(model, values), wanted, strict=True):
        assert all(map(torch.equal, got, want))


def test_recomputing_takes_less_memory() -> None:
    peaks = {}
    for recompute in (False, True):
        model = ConvDraw((1, 28, 28), steps=8, downsample=2, recompute=recompute)
        values = inputs(model, 32)
        peaks[recompute] = peak_bytes(lambda model=model, values=values: run(model, values))
    assert peaks[True] < 0.75 * peaks[False], peaks


@pytest.mark.parametrize("variant", ["shared", "context image"])
def test_compiles_whole(variant: str) -> None:
    torch._dynamo.reset()
    model = build(ConvDraw, variant)
    values = inputs(model, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for got, want in zip(run(compiled, values), run(model, values), strict=True):
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_new_batch_size_does_not_recompile(backend: str) -> None:
    torch._dynamo.reset()
    model = build(ConvDraw, "shared")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with use_backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (7, 11):
            values = inputs(model, batch)
            torch._dynamo.mark_dynamic(values["x"], 0)
            torch._dynamo.mark_dynamic(values["noise"], model.noise_batch_dim)
            output = compiled(**values)
            (output.kl - output.log_likelihood).mean().backward()
            assert torch.equal(output.kl, model(**values).kl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = build(ConvDraw, "context")
    values = inputs(model, 2)
    with torch.autocast("cpu", dtype=dtype):
        outputs, grads = run(model, values)
    assert outputs[1].dtype == outputs[2].dtype == torch.float32
    assert all(bool(value.isfinite().all()) for value in (*outputs, *grads))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"image_shape": (1, 9, 8)}, ValueError, "image_shape must have a height and width div"),
        ({"image_shape": (1, 8)}, ValueError, r"image_shape must be \(C, H, W\)"),
        ({"image_shape": (1, 8, 0)}, ValueError, r"image_shape\[2\] must be >= 1"),
        ({"image_shape": (1, 8.0, 8)}, TypeError, r"image_shape\[1\] must be an integer"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd"),
        ({"steps": 0}, ValueError, "steps must be >= 1"),
        ({"latent_channels": True}, TypeError, "latent_channels must be an integer"),
        ({"context_channels": -1}, ValueError, "context_channels must be >= 0"),
        ({"context_shape": (1, 8, 8)}, ValueError, "context_channels must be >= 1"),
        (
            {"context_shape": (1, 4, 8), "context_channels": 2},
            ValueError,
            "context_shape must have the height and width of image_shape",
        ),
    ],
)
def test_constructor_refuses(
    options: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ConvDraw(**{"image_shape": (1, 8, 8), **SMALL, **options})


@pytest.mark.parametrize(
    ("variant", "changed", "error", "match"),
    [
        ("shared", {"x": torch.rand(2, 3, 8, 8)}, ValueError, "x must have shape"),
        ("shared", {"x": torch.rand(3, 8, 12)}, ValueError, r"x must be \[B, 3, 8, 12\]"),
        ("shared", {"x": torch.ones(2, 3, 8, 12).int()}, TypeError, "x must have one of the dty"),
        ("shared", {"context": torch.rand(2, 5, 4, 6)}, ValueError, "context must be None"),
        ("context", {"context": None}, ValueError, "context must be given"),
        ("context", {"context": torch.rand(1, 5, 4, 6)}, ValueError, "context must have shape"),
        ("context image", {"context": torch.rand(2, 2, 8, 8)}, ValueError, "context must have"),
        ("context image", {"context": [1]}, TypeError, "context must be a tensor"),
        ("shared", {"noise": torch.randn(2, 2, 3, 4, 6)}, ValueError, "noise must have shape"),
    ],
)
def test_call_refuses(
    variant: str, changed: dict[str, object], error: type[Exception], match: str
) -> None:
    model = build(ConvDraw, variant)
    with pytest.raises(error, match=match):
        model(**{**inputs(model, 2), **changed})


def test_layers_can_be_hooked() -> None:
    model = build(ConvDraw, "shared")
    seen: list[nn.Module] = []
    model.cores[0].canvas.register_forward_hook(lambda module, *_: seen.append(module))
    model(**inputs(model, 1))
    assert seen == [model.cores[0].canvas] * 3
