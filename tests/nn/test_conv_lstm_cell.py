"""`ConvLSTMCell` and `ConvLSTM`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from geco_fast.nn import ConvLSTM, ConvLSTMCell
from geco_fast.testing.budget import assert_within_budget


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Give every parameter a value that no initialisation would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module


def gate(gates: dict[str, Tensor], c: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.sigmoid(gates["f"]) * c + torch.sigmoid(gates["i"]) * torch.tanh(gates["g"])
    return torch.sigmoid(gates["o"]) * torch.tanh(c), c


class FourConvolutions(nn.Module):
    """A convolution for each gate, over hidden state and input."""

    def __init__(self, inputs: int, hidden: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        options = {"padding": kernel // 2, "bias": bias}
        self.forget = nn.Conv2d(inputs + hidden, hidden, kernel, **options)
        self.input = nn.Conv2d(inputs + hidden, hidden, kernel, **options)
        self.output = nn.Conv2d(inputs + hidden, hidden, kernel, **options)
        self.state = nn.Conv2d(inputs + hidden, hidden, kernel, **options)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([h, x], dim=1)
        layers = {"f": self.forget, "i": self.input, "o": self.output, "g": self.state}
        return gate({name: layer(x) for name, layer in layers.items()}, c)


class CombinedConvolution(nn.Module):
    """One convolution over hidden state and input, gates f, i, o, g."""

    def __init__(self, inputs: int, hidden: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.combined_conv = nn.Conv2d(
            inputs + hidden, 4 * hidden, kernel, padding=kernel // 2, bias=bias
        )

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.combined_conv(torch.cat([h, x], dim=1)).chunk(4, dim=1)
        return gate(dict(zip("fiog", gates, strict=True)), c)


class NamedSizes(nn.Module):
    """One convolution over input and hidden state, gates i, f, o, g."""

    def __init__(self, inputs: int, hidden: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.conv = nn.Conv2d(inputs + hidden, 4 * hidden, kernel, padding="same", bias=bias)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.conv(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        return gate(dict(zip("ifog", gates, strict=True)), c)


class Flax(nn.Module):
    """Two convolutions with a bias each, gates i, g, f, o, forget bias 1."""

    def __init__(self, inputs: int, hidden: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.ih = nn.Conv2d(inputs, 4 * hidden, kernel, padding=kernel // 2, bias=bias)
        self.hh = nn.Conv2d(hidden, 4 * hidden, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = dict(zip("igfo", (self.ih(x) + self.hh(h)).chunk(4, dim=1), strict=True))
        return gate({**gates, "f": gates["f"] + 1}, c)

    def exported(self) -> dict[str, dict[str, dict[str, object]]]:
        parts = {}
        for name in ("ih", "hh"):
            layer = getattr(self, name)
            parts[name] = {"kernel": layer.weight.detach().permute(2, 3, 1, 0).numpy()}
            if layer.bias is not None:
                parts[name]["bias"] = layer.bias.detach().numpy()
        return {"params": parts}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("source", [FourConvolutions, CombinedConvolution, NamedSizes, Flax])
def test_from_module_computes_the_same(source: type[nn.Module], bias: bool) -> None:
    torch.manual_seed(1)
    twin = randomised(source(3, 5, 3, bias=bias), 2)
    x, h, c = torch.randn(2, 3, 6, 7), torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7)
    cell = ConvLSTMCell.from_module(twin.exported() if isinstance(twin, Flax) else twin)
    assert (cell.in_channels, cell.hidden_channels, cell.kernel_size) == (3, 5, (3, 3))
    assert (cell.bias is not None) is bias
    wide = copy.deepcopy(twin).double()(x.double(), h.double(), c.double())
    for got, same, exact in zip(cell(x, (h, c)), twin(x, h, c), wide, strict=True):
        assert_within_budget(got, same, exact)


def test_from_module_copies() -> None:
    twin = CombinedConvolution(3, 4, 3).double()
    cell = ConvLSTMCell.from_module(twin)
    assert cell.weight.dtype == torch.float64
    before = cell.weight.clone()
    randomised(twin, 0)
    assert torch.equal(cell.weight, before)


@pytest.mark.parametrize(
    ("module", "error", "match"),
    [
        (nn.LSTMCell(3, 4), TypeError, "module must be a ConvLSTM cell .* got LSTMCell"),
        (nn.Sequential(), TypeError, "got Sequential"),
        (3, TypeError, "got int"),
        ({"ih": {"kernel": [1.0]}}, TypeError, "flax parameters ih and hh"),
        ({"kernel": 1}, TypeError, "got keys"),
    ],
)
def test_from_module_refuses(module: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ConvLSTMCell.from_module(module)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"padding_mode": "circular"}, {"groups": 2}],
)
def test_from_module_refuses_another_convolution(options: dict[str, object]) -> None:
    twin = CombinedConvolution(4, 4, 3)
    twin.combined_conv = nn.Conv2d(8, 16, 3, **{"padding": 1, **options})
    with pytest.raises(ValueError, match="module must convolve with stride 1"):
        ConvLSTMCell.from_module(twin)


@pytest.mark.parametrize("bias", [True, False])
def test_initialised_like_the_convolution_it_replaces(bias: bool) -> None:
    torch.manual_seed(3)
    cell = ConvLSTMCell(3, 4, (3, 5), bias=bias)
    torch.manual_seed(3)
    twin = nn.Conv2d(7, 16, (3, 5), bias=bias)
    assert cell.state_dict().keys() == twin.state_dict().keys()
    for name, value in twin.state_dict().items():
        assert torch.equal(cell.state_dict()[name], value)


def test_no_state_is_a_state_of_zeros() -> None:
    torch.manual_seed(4)
    cell, x = ConvLSTMCell(3, 4, 3), torch.randn(2, 3, 5, 6)
    zeros = torch.zeros(2, 4, 5, 6)
    for got, want in zip(cell(x), cell(x, (zeros, zeros)), strict=True):
        assert torch.equal(got, want)


def test_a_channels_last_sequence_stays_channels_last() -> None:
    lstm = ConvLSTM(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(3, 2, 3, 5, 6).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    _, (h, c) = lstm(x)
    assert h.is_contiguous(memory_format=torch.channels_last)
    assert c.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (4, 2), (3, 0)])
def test_the_layer_is_its_cell_in_a_loop(
    batch_first: bool, given: bool, steps: int, batch: int
) -> None:
    torch.manual_seed(5)
    lstm = ConvLSTM(3, 4, 3, batch_first=batch_first, forget_bias=0.7)
    x = torch.randn(steps, batch, 3, 5, 6)
    state = (torch.randn(batch, 4, 5, 6), torch.randn(batch, 4, 5, 6)) if given else None
    outputs, last = lstm(x.transpose(0, 1) if batch_first else x, state)
    wanted = []
    for frame in x:
        # PyTorch's convolution rounds in another way in its other layout.
        state = lstm.cell(frame.contiguous(memory_format=torch.channels_last), state)
        wanted.append(state[0])
    assert torch.equal(outputs, torch.stack(wanted, dim=1 if batch_first else 0))
    assert all(torch.equal(got, want) for got, want in zip(last, state, strict=True))


@pytest.mark.parametrize("split", [1, 3, 5])
def test_prepared_step_with_invariant_inputs(split: int) -> None:
    torch.manual_seed(6)
    cell = ConvLSTMCell(5, 4, 3, forget_bias=0.3)
    x, h, c = torch.randn(2, 5, 6, 7), torch.randn(2, 4, 6, 7), torch.randn(2, 4, 6, 7)
    step = cell.prepare((6, 7), x[:, :split])
    got = step(x[:, split:] if split < 5 else None, h, c)
    wide = copy.deepcopy(cell).double()(x.double(), (h.double(), c.double()))
    for value, same, exact in zip(got, cell(x, (h, c)), wide, strict=True):
        assert_within_budget(value, same, exact)


def test_gradients() -> None:
    torch.manual_seed(7)
    cell = ConvLSTMCell(2, 1, 3).double()

    def run(x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(cell, parameters, (x, (h, c)))

    shapes = [(1, 2, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2)]
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(run, (*operands, cell.weight, cell.bias))


@pytest.mark.parametrize("kernel", [2, (3, 4), 0, -1])
def test_refuses_kernels_that_have_no_centre(kernel: object) -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd and positive"):
        ConvLSTMCell(3, 4, kernel)


@pytest.mark.parametrize("kernel", [(3,), (3, 3, 3), 3.0, (3, 1.0), "33", None])
def test_refuses_kernels_of_another_type(kernel: object) -> None:
    with pytest.raises(TypeError, match="kernel_size must be an integer or a pair"):
        ConvLSTMCell(3, 4, kernel)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ConvLSTMCell(0, 4, 3), ValueError, "in_channels must be >= 1, got 0"),
        (lambda: ConvLSTMCell(3, 4.0, 3), TypeError, "hidden_channels must be an integer"),
        (lambda: ConvLSTMCell(3, 4, 3)(torch.randn(3, 5, 5)), ValueError, "x must be"),
        (lambda: ConvLSTMCell(3, 4, 3)(torch.randn(1, 2, 5, 5)), ValueError, "weight must have"),
        (lambda: ConvLSTMCell(3, 4, 3)(torch.ones(1, 3, 5, 5).long()), TypeError, "x must have"),
        (lambda: ConvLSTM(3, 4, 3)(torch.randn(1, 3, 5, 5)), ValueError, "x must be"),
        (lambda: ConvLSTM(3, 4, 3)(torch.randn(0, 1, 3, 5, 5)), ValueError, "at least one step"),
        (lambda: ConvLSTM(3, 4, 3)([1.0]), TypeError, "x must be a tensor"),
    ],
)
def test_refuses(make: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate: object) -> None:
    torch.manual_seed(8)
    lstm, x = ConvLSTM(3, 4, 3), torch.randn(2, 1, 3, 4, 4)
    assert torch.equal(duplicate(lstm)(x)[0], lstm(x)[0])


def test_compiles_whole() -> None:
    torch.manual_seed(9)
    lstm, x = ConvLSTM(2, 3, 3), torch.randn(2, 2, 2, 4, 4)
    compiled = torch.compile(lstm, fullgraph=True, backend="eager")
    for value, same in zip(compiled(x)[1], lstm(x)[1], strict=True):
        assert torch.equal(value, same)


def test_one_by_one_kernel_is_the_library_s_lstm_cell() -> None:
    torch.manual_seed(10)
    cell, twin = ConvLSTMCell(3, 4, 1), nn.LSTMCell(3, 4)
    with torch.no_grad():
        cell.weight.copy_(torch.cat([twin.weight_ih, twin.weight_hh], dim=1)[..., None, None])
        cell.bias.copy_(twin.bias_ih + twin.bias_hh)
    x, h, c = torch.randn(128, 3), torch.randn(128, 4), torch.randn(128, 4)
    got = cell(x[..., None, None], (h[..., None, None], c[..., None, None]))
    wide = copy.deepcopy(twin).double()(x.double(), (h.double(), c.double()))
    for value, same, exact in zip(got, twin(x, (h, c)), wide, strict=True):
        assert_within_budget(value[..., 0, 0], same, exact)


def test_forget_bias_equals_one_in_the_bias() -> None:
    torch.manual_seed(11)
    cell, twin = ConvLSTMCell(2, 3, 3, forget_bias=1.0), ConvLSTMCell(2, 3, 3)
    twin.load_state_dict(cell.state_dict())
    with torch.no_grad():
        twin.bias[3:6] += 1
    x, h, c = torch.randn(9, 2, 4, 4), torch.randn(9, 3, 4, 4), torch.randn(9, 3, 4, 4)
    wide = copy.deepcopy(twin).double()(x.double(), (h.double(), c.double()))
    for value, same, exact in zip(cell(x, (h, c)), twin(x, (h, c)), wide, strict=True):
        assert_within_budget(value, same, exact)


def test_recomputing_changes_nothing() -> None:
    lstm = randomised(ConvLSTM(16, 16, 5), seed=3)
    x = torch.randn(4, 2, 16, 8, 8, requires_grad=True)

    def results() -> list[Tensor]:
        outputs, (h, c) = lstm(x)
        total = outputs.sin().sum() + h.sum() + c.sum()
        return [outputs, h, c, *torch.autograd.grad(total, [x, *lstm.parameters()])]

    wanted = results()
    lstm.recompute = True
    assert all(map(torch.equal, results(), wanted))
