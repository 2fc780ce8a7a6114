"""What is special to `coupling_mlp`: equality with a chain of modules, and its list arguments."""

from itertools import pairwise

import pytest
import torch
from marks import needs_library
from torch import nn

import geco_fast as gf
from geco_fast import reference
from geco_fast.ops import coupling_mlp

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def linear_layers(*widths, bias=True):
    return [nn.Linear(i, o, bias=bias, dtype=torch.float64) for i, o in pairwise(widths)]


def parameters(layers):
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(3, 7), (3, 5, 4), (2, 6, 5, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_sequential(activation, widths, bias):
    layers = linear_layers(*widths, bias=bias)
    modules = [module for layer in layers for module in (layer, ACTIVATIONS[activation]())][:-1]
    x = torch.randn(4, widths[0], dtype=torch.float64)
    result = coupling_mlp(x, None, *parameters(layers), activation=activation)
    torch.testing.assert_close(result, nn.Sequential(*modules)(x))


def test_context_projection_stands_for_more_input_columns():
    first, last = linear_layers(3 + 2, 6, 4)
    x = torch.randn(5, 3, dtype=torch.float64)
    context = torch.randn(5, 2, dtype=torch.float64)
    weights, biases = [first.weight[:, :3], last.weight], [first.bias, last.bias]
    result = coupling_mlp(x, context @ first.weight[:, 3:].T, weights, biases)
    torch.testing.assert_close(result, last(first(torch.cat([x, context], 1)).relu()))


def test_autocast_gives_its_own_dtype():
    weights, biases = parameters(linear_layers(3, 5, 4))
    weights, biases = [w.float() for w in weights], [b.float() for b in biases]
    x, projection = torch.randn(2, 3), torch.randn(2, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert coupling_mlp(x, projection, weights, biases).dtype == torch.bfloat16


def call(batch=100, activation="relu"):
    """A call's result and the gradients to everything."""
    layers = linear_layers(5, 40, 33, 6)
    weights, biases = parameters(layers)
    x = torch.randn(batch, 5, dtype=torch.float64, requires_grad=True)
    result = coupling_mlp(x, None, weights, biases, activation=activation)
    return [result, *torch.autograd.grad(result.sin().sum(), [x, *weights, *biases])]


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_go_through_the_reference(dtype):
    weights, biases = parameters(linear_layers(3, 5, 4))
    weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    x = torch.randn(2, 3, dtype=dtype)
    wanted = reference.coupling_mlp(x, None, weights, biases)
    assert torch.equal(coupling_mlp(x, None, weights, biases), wanted)
    with pytest.raises(gf.BackendUnavailable, match="does not take"):
        coupling_mlp(x, None, weights, biases, backend="cpu")


@needs_library
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_threads_change_nothing(activation):
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        found.append(call(activation=activation))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@needs_library
def test_a_row_does_not_depend_on_the_others():
    weights, biases = parameters(linear_layers(5, 40, 33, 6))
    x = torch.randn(300, 5, dtype=torch.float64)
    whole = coupling_mlp(x, None, weights, biases)
    for rows in (slice(0, 1), slice(37, 120)):
        assert torch.equal(coupling_mlp(x[rows], None, weights, biases), whole[rows])


@needs_library
def test_keeps_one_value_for_each_hidden_unit_and_row():
    weights, biases = parameters(linear_layers(5, 40, 33, 6))
    x, kept = torch.randn(7, 5, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        coupling_mlp(x, None, weights, biases)
    # In panels of 32 columns.
    own = {t.data_ptr() for t in (x, *weights, *biases)}
    assert [t.numel() for t in kept if t.data_ptr() not in own] == [7 * (64 + 64)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 4)}, ValueError, r"weights\[0\] must have shape \[5, 4\]"),
        ({"x": torch.ones(3)}, ValueError, r"x must be \[B, H0\]"),
        ({"x": torch.ones(2, 3).double()}, TypeError, r"weights\[0\] must have the dtype of x"),
        (
            {"context_projection": torch.ones(2, 4)},
            ValueError,
            r"context_projection must .*\[2, 5\]",
        ),
        ({"weights": []}, ValueError, "weights and biases must be as many"),
        ({"biases": [None]}, ValueError, "got 2 weights and 1 biases"),
        ({"biases": [None, torch.ones(5)]}, ValueError, r"biases\[1\] must have shape \[4\]"),
        ({"weights": [torch.ones(5, 3), torch.ones(4, 6)]}, ValueError, r"weights\[1\] must .*5"),
        (
            {"weights": [torch.ones(5, 3), 1]},
            TypeError,
            r"weights\[1\] must be a tensor, got int 1",
        ),
        ({"activation": "gelu"}, ValueError, "activation must be one of .*'gelu'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "x": torch.ones(2, 3),
        "context_projection": None,
        "weights": [torch.ones(5, 3), torch.ones(4, 5)],
        "biases": [torch.ones(5), None],
        "activation": "relu",
    }
    coupling_mlp(**arguments)
    with pytest.raises(error, match=message):
        coupling_mlp(**arguments | change)
