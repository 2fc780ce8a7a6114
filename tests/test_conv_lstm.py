"""What is special to `conv_lstm_step` and `conv2d`: the hoisted and the prepared forms."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geco_fast import reference
from geco_fast._backend import BackendUnavailable, unavailable_reason
from geco_fast._checks import FLOATING
from geco_fast.ops import conv2d, conv_lstm_step, prepare_weight
from geco_fast.testing.budget import assert_within_budget
from geco_fast.testing.calls import device


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
    (h, _), weight = state(), draw(12, 3, 3, 3)
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


# In Winograd's domain.


def wide(*shape, seed=0, scale=1.0):
    return (scale * draw(*shape, seed=seed)).float()


def cell(channels=16, size=8, batch=2):
    """Operands of a step that "auto" takes to Winograd's domain."""
    h, c, x = (wide(batch, channels, size, size, seed=k) for k in range(3))
    return x, h, c, wide(4 * channels, 2 * channels, 5, 5, seed=3, scale=0.03)


def test_auto_chooses_by_size():
    for channels, size, chosen in ((64, 16, True), (2, 16, False), (64, 1, False)):
        prepared = prepare_weight(wide(4 * channels, 2 * channels, 5, 5), (size, size))
        assert (prepared.transformed is not None) == chosen
    prepared = prepare_weight(wide(256, 128, 5, 5), (16, 16), algorithm="direct")
    assert prepared.transformed is None


def test_direct_is_pytorchs_convolution_to_the_bit():
    x, weight, bias = wide(8, 64, 16, 16), wide(64, 64, 5, 5, seed=1), wide(64, seed=2)
    wanted = F.conv2d(x, weight, bias, padding=2)
    assert torch.equal(conv2d(x, weight, bias, algorithm="direct"), wanted)
    assert not torch.equal(conv2d(x, weight, bias), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": draw(1, 4, 8, 8), "weight": draw(4, 4, 3, 3)}, "serves float32, got torch.float64"),
        ({"weight": wide(4, 4, 3, 5)}, "3x3, 5x5 and 7x7, got 3x5"),
        ({"x": wide(1, 4, 0, 8)}, "aren't empty"),
        ({"backend": "reference"}, "'reference' serves the call"),
    ],
)
def test_winograd_says_why_it_is_unavailable(change, message):
    arguments = {"x": wide(1, 4, 8, 8), "weight": wide(4, 4, 3, 3)} | change
    with pytest.raises(BackendUnavailable, match=message):
        conv2d(**arguments, algorithm="winograd")


def test_unknown_algorithm_is_refused():
    for call in (
        lambda: conv2d(wide(1, 4, 8, 8), wide(4, 4, 3, 3), algorithm="fft"),
        lambda: prepare_weight(wide(4, 4, 3, 3), (8, 8), algorithm="fft"),
        lambda: conv_lstm_step(*cell(), algorithm="fft"),
    ):
        with pytest.raises(ValueError, match=r"algorithm must be one of 'auto', .* got 'fft'"):
            call()
    with pytest.raises(ValueError, match=r"4C, Cx"):
        prepare_weight(wide(6, 4, 3, 3), (8, 8))


def test_a_weight_changed_after_it_was_prepared_is_noticed():
    x, h, c, weight = cell()
    weight.requires_grad_()
    outputs, _ = conv_lstm_step(x, h, c, prepare_weight(weight, (8, 8), algorithm="winograd"))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_a_weight_prepared_without_grad_has_gradients():
    x, h, c, weight = cell()
    weight.requires_grad_()
    h.requires_grad_()
    with torch.no_grad():
        prepared = prepare_weight(weight, (8, 8), algorithm="winograd")
    found, wanted = (
        torch.autograd.grad(sum(out.sum() for out in outputs), (weight, h))
        for outputs in (
            conv_lstm_step(x, h, c, prepared),
            conv_lstm_step(x, h, c, weight, algorithm="direct"),
        )
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients_are_those_of_the_direct_form():
    x, h, c, weight = cell(batch=1)
    leaves = [tensor.requires_grad_() for tensor in (x, h, c, weight)]

    def second(algorithm):
        outputs = conv_lstm_step(x, h, c, weight, algorithm=algorithm)
        total = sum((out * out).sum() for out in outputs)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum((grad * grad).sum() for grad in first), leaves)

    for ours, theirs in zip(second("winograd"), second("direct"), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_stays_where_it_belongs(value):
    x, weight, bias = wide(2, 20, 9, 13), wide(33, 20, 5, 5, seed=1), wide(33, seed=2)
    x[0, 3, 4, 4] = value
    x.requires_grad_()
    ours, wanted = (conv2d(x, weight, bias, algorithm=a) for a in ("winograd", "direct"))
    assert torch.equal(ours.isfinite(), wanted.isfinite())
    assert not ours.isfinite().all()
    grad = wide(2, 33, 9, 13, seed=3)
    grad[1, 2, 3, 3] = value
    found, right = (torch.autograd.grad(y, x, grad)[0] for y in (ours, wanted))
    assert torch.equal(found.isfinite(), right.isfinite())

    _, h, c, weight = cell(batch=2)
    h[0, 1, 2, 3] = value
    steps = (
        conv_lstm_step(None, h, c, weight[:, 16:], algorithm=a) for a in ("winograd", "direct")
    )
    for ours, wanted in zip(*steps, strict=True):
        assert torch.equal(ours.isfinite(), wanted.isfinite())


def test_without_memory_the_convolution_is_direct(monkeypatch):
    def refuse(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    x, weight = wide(8, 64, 16, 16), wide(64, 64, 5, 5, seed=1)
    module = sys.modules[conv2d.__module__]
    for name in ("_weight", "_conv2d"):
        module._warn_of_memory.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            with pytest.warns(RuntimeWarning, match="not enough memory"):
                result = conv2d(x, weight)
        assert torch.equal(result, F.conv2d(x, weight, padding=2))

    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(module, "_weight", fail)
    with pytest.raises(RuntimeError, match="something else"):
        conv2d(x, weight)


def test_any_number_of_threads_gives_the_same_bits(two_threads):
    x, h, c, weight = (tensor.requires_grad_() for tensor in cell(32, 16, 5))

    def run(threads):
        torch.set_num_threads(threads)
        outputs = conv_lstm_step(x, h, c, weight, algorithm="winograd")
        return *outputs, *torch.autograd.grad([o.sum() for o in outputs], (x, h, c, weight))

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def several_steps(algorithm, steps=3):
    """Leaves, and the outputs of steps that share one prepared weight."""
    x, h, c, weight = (tensor.requires_grad_() for tensor in cell())
    prepared = prepare_weight(weight, (8, 8), algorithm=algorithm)
    outputs, states = [], (h, c)
    for k in range(steps):
        states = conv_lstm_step(x * (k + 1), *states, prepared)
        outputs.append(states[0])
    return (x, h, c, weight), outputs


def test_the_gradient_to_a_prepared_weight_is_gathered_anew_by_each_backward():
    leaves, outputs = several_steps("winograd")
    wanted = torch.autograd.grad(sum(map(torch.sum, outputs)), leaves, retain_graph=True)
    for _ in range(2):
        found = torch.autograd.grad(sum(map(torch.sum, outputs)), leaves, retain_graph=True)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs)
    # Of one step alone, and without the weight, beside the whole.
    for k, own in enumerate(outputs):
        found = torch.autograd.grad(own.sum(), leaves, retain_graph=True)
        again, want = several_steps("direct", k + 1)
        for ours, plain in zip(found, torch.autograd.grad(want[k].sum(), again), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)
        torch.autograd.grad(own.sum(), leaves[:1], retain_graph=True)


def test_a_backward_that_failed_leaves_nothing_behind():
    leaves, outputs = several_steps("winograd")
    wanted = torch.autograd.grad(sum(map(torch.sum, outputs)), leaves, retain_graph=True)

    def fail(grad):
        raise ValueError("from a hook")

    handle = outputs[0].register_hook(fail)
    with pytest.raises(ValueError, match="from a hook"):
        torch.autograd.grad(sum(map(torch.sum, outputs)), leaves, retain_graph=True)
    handle.remove()
    found = torch.autograd.grad(sum(map(torch.sum, outputs)), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_images_of_any_layout_give_the_same_bits():
    weight = wide(32, 16, 5, 5, seed=3).requires_grad_()
    contiguous = wide(3, 16, 9, 7)
    layouts = [
        contiguous,
        contiguous.to(memory_format=torch.channels_last),
        contiguous.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([contiguous, contiguous], 3)[..., :7],
    ]
    results = []
    for layout in layouts:
        x = layout.detach().requires_grad_()
        y = conv2d(x, weight, algorithm="winograd")
        upstream = wide(*y.shape, seed=5)
        results.append([y, *torch.autograd.grad(y, (x, weight), upstream)])
    for result in results[1:]:
        for own, first in zip(result, results[0], strict=True):
            assert torch.equal(own, first)


def test_winograd_compiles_whole_for_any_batch():
    weight, bias = wide(64, 32, 5, 5, seed=3, scale=0.03), wide(64, seed=4)

    def run(x, h, c):
        prepared = prepare_weight(weight, (16, 16), algorithm="winograd")
        for _ in range(2):
            h, c = conv_lstm_step(x, h, c, prepared, bias)
        return conv2d(h, weight[:, :16], algorithm="winograd"), c

    torch._dynamo.reset()
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return graph

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for batch in (2, 3, 5):
        leaves = [wide(batch, 16, 16, 16, seed=k).requires_grad_() for k in range(3)]
        found, wanted = (
            torch.autograd.grad([out.sum() for out in function(*leaves)], leaves)
            for function in (compiled, run)
        )
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        counted(*leaves)
    assert len(graphs) == 1


def test_operators_of_winograds_domain_pass_opcheck():
    from torch.library import opcheck

    x, h, c, weight = cell()
    ops = torch.ops.geco_fast
    forms = [ops.winograd_weight(weight, 16, 4, 8, 8, transposed) for transposed in (False, True)]
    single = ops.winograd_weight(weight, 32, 1, 8, 8, False)
    gates = wide(2, 64, 8, 8, seed=5).contiguous(memory_format=torch.channels_last)
    leaves = [tensor.requires_grad_() for tensor in (x, h, c, weight)]
    opcheck(ops.winograd_weight.default, (weight, 16, 4, 8, 8, False))
    opcheck(ops.winograd_weight.default, (weight.detach(), 16, 4, 8, 8, True))
    opcheck(ops.winograd_step.default, (*leaves, forms[0], None, gates.detach(), 1.0, True))
    opcheck(ops.winograd_weight_backward.default, (forms[0], 64, 32, 5, 16, 4, 8, 8))
    detached = [tensor.detach() for tensor in (x, h, weight)]
    opcheck(ops.winograd_backward.default, (gates, *detached, forms[1], 4, 15))
    total = torch.zeros_like(forms[0])
    opcheck(ops.winograd_backward.default, (gates, *detached, forms[1], 4, 15, total))
    both = torch.cat([x, h], 1).detach().requires_grad_()
    opcheck(ops.winograd_conv2d.default, (both, weight, single, wide(64, seed=6)))


# As one kernel of Triton's.

needs_triton = pytest.mark.skipif(
    bool(unavailable_reason("triton")), reason=unavailable_reason("triton")
)


def leaves_on_triton(inputs, channels, batch, spatial, kernel, dtype=torch.float64):
    """x, h, c, weight and bias, where Triton takes them."""
    (h, c), x = state(batch, channels, spatial), draw(batch, inputs, *spatial)
    weight = 0.3 * draw(4 * channels, inputs + channels, *kernel, seed=3)
    operands = (x, h, c, weight, draw(4 * channels, seed=4))
    return [t.to(device("triton"), dtype).requires_grad_() for t in operands]


def results_and_gradients(leaves, weight=None, **options):
    x, h, c, own, bias = leaves
    results = conv_lstm_step(x, h, c, own if weight is None else weight, bias, **options)
    return *results, *torch.autograd.grad([out.sin().sum() for out in results], leaves)


@needs_triton
@pytest.mark.parametrize("large", [True, False])
def test_triton_takes_large_problems_in_large_tiles_and_in_parts(large, monkeypatch):
    import triton.language as tl

    from geco_fast.kernels import conv_lstm as kernels

    if large:
        monkeypatch.setattr(kernels, "BUSY", 1)
    else:
        monkeypatch.setattr(kernels, "FEWEST_PIXELS", 16)
        monkeypatch.setattr(kernels, "SUMMANDS", {8: 16})
        monkeypatch.setattr(kernels, "index_type", lambda *_: tl.int64)
    leaves = leaves_on_triton(2, 17, 2, (8, 5), (1, 3), torch.float32 if large else torch.float64)
    found = results_and_gradients(leaves, forget_bias=1.0, backend="triton")
    wanted = results_and_gradients(leaves, forget_bias=1.0, backend="reference")
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4 if large else 1e-9, atol=1e-5)


@needs_triton
def test_triton_takes_prepared_weights_and_any_algorithm_but_winograds():
    leaves = leaves_on_triton(2, 3, 1, (4, 3), (3, 3))
    prepared = prepare_weight(leaves[3], (4, 3), backend="triton")
    assert prepared.transformed is None
    plain = results_and_gradients(leaves, backend="triton")
    for again in (
        results_and_gradients(leaves, prepared, backend="triton"),
        results_and_gradients(leaves, algorithm="direct", backend="triton"),
    ):
        for ours, theirs in zip(again, plain, strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(BackendUnavailable, match="'winograd' is unavailable"):
        results_and_gradients(leaves, algorithm="winograd", backend="triton")


@needs_triton
def test_triton_gives_only_the_gradients_that_are_wanted():
    leaves = leaves_on_triton(2, 3, 1, (3, 3), (3, 1))
    whole = conv_lstm_step(*leaves, backend="triton")
    all_found = torch.autograd.grad([out.sum() for out in whole], leaves)
    for k, leaf in enumerate(leaves):
        alone = [tensor.detach() for tensor in leaves]
        alone[k] = leaf
        results = conv_lstm_step(*alone, backend="triton")
        (found,) = torch.autograd.grad([out.sum() for out in results], leaf)
        assert torch.equal(found, all_found[k])


@needs_triton
def test_tritons_operators_pass_opcheck():
    from torch.library import opcheck

    ops = torch.ops.geco_fast
    leaves = leaves_on_triton(2, 3, 1, (3, 3), (3, 1), torch.float32)
    x, h, _, weight, _ = leaves
    opcheck(ops.conv_lstm_step_with_gates.triton, (*leaves, None, 1.0))
    _, _, gates = ops.conv_lstm_step_with_gates.triton(*leaves, None, 1.0)
    for source, wanted in ((x.detach(), 15), (None, 6)):
        given = weight.detach()[:, 0 if source is not None else 2 :]
        opcheck(
            ops.conv_lstm_step_backward.triton, (gates.detach(), source, h.detach(), given, wanted)
        )
