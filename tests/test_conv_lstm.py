"""What is special to `conv_lstm_step` and `conv2d`: the hoisted and the prepared forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geco_fast import reference
from geco_fast._backend import BackendUnavailable
from geco_fast._checks import FLOATING
from geco_fast.ops import conv2d, conv_lstm_step, prepare_weight
from geco_fast.testing.budget import assert_within_budget


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def state(batch=2, channels=3, spatial=(5, 4)):
    return draw(batch, channels, *spatial, seed=1), draw(batch, channels, *spatial, seed=2)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 5), (7, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_conv2d_is_same_padding(kernel, bias):
    x, weight = draw(2, 3, 5, 4), draw(6, 3, *kernel, seed=1)
    offset = draw(6, seed=2) if bias else None
    wanted = F.conv2d(x, weight, offset, padding="same")
    torch.testing.assert_close(conv2d(x, weight, offset), wanted)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
@pytest.mark.parametrize("forget_bias", [0.0, 1.0])
def test_step_is_a_convolution_and_lstm_gates(kernel, forget_bias):
    (h, c), x, bias = state(), draw(2, 4, 5, 4), draw(12, seed=3)
    weight = draw(12, 7, *kernel, seed=4)
    i, f, g, o = F.conv2d(torch.cat([x, h], 1), weight, bias, padding="same").chunk(4, 1)
    c_wanted = (f + forget_bias).sigmoid() * c + i.sigmoid() * g.tanh()
    h_next, c_next = conv_lstm_step(x, h, c, weight, bias, forget_bias=forget_bias)
    torch.testing.assert_close(c_next, c_wanted)
    torch.testing.assert_close(h_next, o.sigmoid() * c_wanted.tanh())


def test_one_pixel_is_torch_lstm_cell():
    (h, c), x = state(spatial=(1, 1)), draw(2, 4, 1, 1)
    cell = nn.LSTMCell(4, 3, dtype=torch.float64)
    weight = torch.cat([cell.weight_ih, cell.weight_hh], 1)[:, :, None, None]
    result = conv_lstm_step(x, h, c, weight, cell.bias_ih + cell.bias_hh)
    wanted = cell(x.flatten(1), (h.flatten(1), c.flatten(1)))
    for ours, theirs in zip(result, wanted, strict=True):
        torch.testing.assert_close(ours.flatten(1), theirs)


def test_projection_and_prepared_weight_change_nothing():
    (h, c), x, bias = state(), draw(2, 4, 5, 4), draw(12, seed=3)
    weight = draw(12, 7, 3, 3, seed=4).requires_grad_()
    bias.requires_grad_()

    def gradients(outputs):
        return torch.autograd.grad(sum((out * out).sum() for out in outputs), (weight, bias))

    plain = conv_lstm_step(x, h, c, weight, bias)
    hoisted = conv_lstm_step(None, h, c, weight[:, 4:], x_projection=conv2d(x, weight[:, :4], bias))
    prepared = conv_lstm_step(x, h, c, prepare_weight(weight, (5, 4)), bias)
    wanted = gradients(plain)
    for other in (hoisted, prepared):
        torch.testing.assert_close(other, plain)
        torch.testing.assert_close(gradients(other), wanted)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_kernel_of_the_gates_keeps_the_accuracy_rule(dtype):
    (h, c), x = state(4, 8, (6, 5)), draw(4, 5, 6, 5)
    operands = [operand.to(dtype) for operand in (x, h, c, 0.1 * draw(32, 13, 3, 3, seed=3))]

    def run(function, dtype):
        leaves = [operand.to(dtype).detach().requires_grad_() for operand in operands]
        results = function(*leaves)
        gradients = torch.autograd.grad(results, leaves, [r.detach() for r in results])
        return *results, *gradients

    exact = run(reference.conv_lstm_step, torch.float64)
    same = run(reference.conv_lstm_step, torch.float32 if dtype == torch.float64 else dtype)
    actual = run(conv_lstm_step, dtype)
    for index, triple in enumerate(zip(actual, same, exact, strict=True)):
        assert_within_budget(*triple, gradient=index >= 2)


def test_an_explicit_backend_without_a_kernel_is_refused():
    (h, c), weight = state(), draw(12, 3, 3, 3)
    with pytest.raises(BackendUnavailable, match=r"conv_lstm_step: backend 'triton'"):
        conv_lstm_step(None, h, c, weight, backend="triton")
    with pytest.raises(BackendUnavailable, match=r"conv2d: backend 'triton'"):
        conv2d(h, weight, backend="triton")


@pytest.mark.parametrize(
    ("batch", "inputs", "channels", "spatial"),
    [(0, 4, 3, (5, 4)), (2, 4, 3, (0, 4)), (2, 4, 0, (5, 4)), (2, 0, 3, (5, 4)), (1, 1, 1, (1, 1))],
)
def test_empty_and_single_sizes(batch, inputs, channels, spatial):
    h, c = (value.requires_grad_() for value in state(batch, channels, spatial))
    x = draw(batch, inputs, *spatial).requires_grad_()
    weight = draw(4 * channels, inputs + channels, 3, 3).requires_grad_()
    outputs = conv_lstm_step(x, h, c, weight)
    for out in outputs:
        assert out.shape == h.shape
    operands = (x, h, c, weight)
    for gradient, operand in zip(
        torch.autograd.grad(sum(out.sum() for out in outputs), operands), operands, strict=True
    ):
        assert gradient.shape == operand.shape
        assert gradient.isfinite().all()


def test_autocast_brings_every_operand_to_its_dtype():
    (h, c), x = state(), draw(2, 4, 5, 4)
    h, c, x = h.bfloat16(), c.float(), x.float()
    weight, projection = draw(12, 7, 3, 3).float(), draw(2, 12, 5, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        for out in conv_lstm_step(x, h, c, weight, x_projection=projection):
            assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": torch.ones(2, 3, 5)}, ValueError, r"h must be \[B, C, H, W\]"),
        ({"c": torch.ones(2, 3, 5, 5)}, ValueError, "c must have shape .*that of h"),
        ({"x": torch.ones(2, 4, 5, 5)}, ValueError, "x must have shape"),
        ({"x": None}, ValueError, r"weight must have shape \[12, 3, 3, 3\]"),
        ({"weight": torch.ones(12, 7, 3, 2)}, ValueError, "odd kernel, got 3x2"),
        ({"weight": torch.ones(8, 7, 3, 3)}, ValueError, r"weight must have shape \[12, 7, 3, 3\]"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \[12\]"),
        ({"x_projection": torch.ones(2, 3, 5, 4)}, ValueError, "x_projection must have shape"),
        ({"c": torch.ones(2, 3, 5, 4).double()}, TypeError, "c must have the dtype of h"),
        ({"h": torch.ones(2, 3, 5, 4).long()}, TypeError, "h must have one of the dtypes .*int64"),
        (
            {"weight": prepare_weight(torch.ones(12, 7, 3, 3), (4, 4))},
            ValueError,
            r"prepared for the spatial shape \[5, 4\] of h, got one for \[4, 4\]",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "x": torch.ones(2, 4, 5, 4),
        "h": torch.ones(2, 3, 5, 4),
        "c": torch.ones(2, 3, 5, 4),
        "weight": torch.ones(12, 7, 3, 3),
    }
    conv_lstm_step(**arguments)
    with pytest.raises(error, match=message):
        conv_lstm_step(**arguments | change)


def test_conv2d_names_wrong_arguments():
    x = torch.ones(2, 3, 5, 4)
    with pytest.raises(ValueError, match=r"weight must have shape \[6, 3, 3, 3\]"):
        conv2d(x, torch.ones(6, 4, 3, 3))
    with pytest.raises(ValueError, match="odd kernel, got 2x3"):
        conv2d(x, torch.ones(6, 3, 2, 3))
    with pytest.raises(ValueError, match=r"bias must have shape \[6\]"):
        conv2d(x, torch.ones(6, 3, 3, 3), torch.ones(3))
