"""What is special to `pncc`: equality with unfolded patches, its range and its gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from marks import every_level, needs_library

from geco_fast.ops import lncc, pncc
from geco_fast.testing.budget import Budget


def images(*shape, seed=0, dtype=torch.float64):
    return torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def unfolded(x, patch_size, stride):
    """Patches ``[B, C, N, K]``: by `F.unfold` in one or two dimensions, slice by slice in three."""
    channels, *spatial = x.shape[1:]
    if len(spatial) == 1:
        x, patch_size, stride = x.unsqueeze(2), (1, *patch_size), (1, *stride)
    if len(spatial) < 3:
        columns = F.unfold(x, patch_size, stride=stride)  # [B, C * K, N]
        return columns.unflatten(1, (channels, math.prod(patch_size))).transpose(2, 3)
    depth, deep = spatial[0], patch_size[0]
    slabs = []
    for start in range(0, depth - deep + 1, stride[0]):
        slab = x[:, :, start : start + deep].flatten(1, 2)  # [B, C * deep, H, W]
        columns = F.unfold(slab, patch_size[1:], stride=stride[1:])
        slabs.append(columns.unflatten(1, (channels, math.prod(patch_size))).transpose(2, 3))
    return torch.cat(slabs, 2)


def scores_from_patches(x, y, patch_size, stride, channels, eps):
    x, y = (unfolded(image, patch_size, stride) for image in (x, y))  # [B, C, N, K]
    if channels == "joint":
        x, y = (image.transpose(1, 2).flatten(2) for image in (x, y))  # [B, N, C * K]
    x, y = (image - image.mean(-1, keepdim=True) for image in (x, y))
    norms = ((image.pow(2).sum(-1) + eps).sqrt() for image in (x, y))
    return (x * y).sum(-1) / math.prod(norms)


@pytest.mark.parametrize("channels", ["joint", "separate"])
@pytest.mark.parametrize(
    ("spatial", "patch_size", "stride"),
    [
        ((9,), (4,), (1,)),
        ((10,), (3,), (2,)),
        ((8, 8), (8, 8), (1, 1)),
        ((9, 7), (2, 3), (1, 1)),
        ((9, 8), (4, 5), (3, 2)),
        ((5, 6), (1, 2), (1, 4)),
        ((4, 5, 6), (2, 3, 2), (1, 1, 1)),
        ((5, 6, 4), (3, 2, 4), (2, 3, 1)),
    ],
)
def test_matches_unfold(spatial, patch_size, stride, channels):
    x, y = images(2, 3, *spatial)
    for eps in (1e-6, 0.5):
        scores = pncc(x, y, patch_size, stride=stride, channels=channels, eps=eps)
        wanted = scores_from_patches(x, y, patch_size, stride, channels, eps)
        grid = [(s - k) // d + 1 for s, k, d in zip(spatial, patch_size, stride, strict=True)]
        assert scores.shape == ((2, *grid) if channels == "joint" else (2, 3, *grid))
        torch.testing.assert_close(scores.flatten(), wanted.flatten())
        for reduction in ("sum", "mean"):
            reduced = pncc(
                x, y, patch_size, stride=stride, channels=channels, eps=eps, reduction=reduction
            )
            torch.testing.assert_close(reduced, getattr(wanted.flatten(1), reduction)(1))


def test_one_number_serves_every_dimension():
    x, y = images(2, 3, 9, 8)
    assert torch.equal(pncc(x, y, 4, stride=2), pncc(x, y, (4, 4), stride=[2, 2]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_scores_never_leave_their_range(scale, offset):
    x, _ = images(8, 2, 12, 12, dtype=torch.float32)
    x = scale * x + offset
    for y in (x, -x, 3 * x + 1, torch.full_like(x, offset), torch.zeros_like(x)):
        scores = pncc(x, y, 5)
        assert scores.isfinite().all()
        assert scores.abs().max() <= 1


def test_flat_patches_score_zero_with_finite_gradients():
    x, y = (
        image.requires_grad_() for image in (torch.full((1, 1, 4, 4), 7.0), torch.rand(1, 1, 4, 4))
    )
    scores = pncc(x, y, 3)
    assert torch.equal(scores, torch.zeros(1, 2, 2))
    for gradient in torch.autograd.grad(scores.sum(), (x, y)):
        assert gradient.isfinite().all()


def test_gradient_is_the_closed_form():
    x, y = images(1, 2, 3, 3)
    y.requires_grad_()
    eps = 0.3
    (gradient,) = torch.autograd.grad(pncc(x, y, 3, eps=eps).sum(), y)

    def whiten(image):
        centred = image.flatten() - image.mean()
        norm = (centred.pow(2).sum() + eps).sqrt()
        return centred / norm, norm

    (psi_x, _), (psi_y, norm) = whiten(x), whiten(y.detach())
    wanted = (psi_x - psi_x.dot(psi_y) * psi_y) / norm
    torch.testing.assert_close(gradient.flatten(), wanted)


def test_derivatives_survive_perfect_correlation():
    # With next to no eps rounding takes some of these scores beyond 1, where they are clipped.
    x, _ = images(16, 1, 4)
    y = x.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: pncc(x, y, 4, eps=1e-30), (y,))


def test_non_finite_values_stay_in_their_patches():
    x, y = images(1, 1, 9)
    x[0, 0, 4] = torch.nan
    assert pncc(x, y, 3).isnan().tolist() == [[False, False, True, True, True, False, False]]


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((2, 3), {}, ValueError, r"x must be \[B, C, \*S\] with 1 to 3"),
        (
            (2, 3, 4, 9),
            {},
            ValueError,
            r"patch_size must fit into the spatial shape \[4, 9\], got 8",
        ),
        ((2, 3, 9, 9), {"patch_size": (3, 3, 3)}, ValueError, "patch_size must have 2 entries"),
        ((2, 3, 9, 9), {"patch_size": 0}, ValueError, "patch_size must be >= 1"),
        ((2, 3, 9, 9), {"patch_size": 2.0}, TypeError, "patch_size must be an int or one int"),
        ((2, 3, 9, 9), {"stride": (1, 0)}, ValueError, "stride must be >= 1"),
        ((2, 3, 9, 9), {"eps": 0.0}, ValueError, "eps must be > 0"),
        ((2, 3, 9, 9), {"channels": "all"}, ValueError, "channels must be one of"),
        ((2, 3, 9, 9), {"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)
def test_wrong_arguments_are_named(shape, options, error, message):
    x = torch.ones(shape)
    with pytest.raises(error, match=message):
        pncc(x, x, **options)


CALLS = {
    "joint": (lambda x, y, **options: pncc(x, y, 4, **options)),
    "separate": (lambda x, y, **options: pncc(x, y, (3, 4), channels="separate", **options)),
    "gaps": (lambda x, y, **options: pncc(x, y, 2, stride=(3, 5), **options)),
    "sum": (lambda x, y, **options: pncc(x, y, 4, reduction="sum", **options)),
    "sum with gaps": (lambda x, y, **options: pncc(x, y, 2, stride=5, reduction="sum", **options)),
    "squared": (lambda x, y, **options: lncc(x, y, 5, **options)),
    "mean squared": (lambda x, y, **options: lncc(x, y, 5, reduction="mean", **options)),
}


def with_gradients(call, x, y, **options):
    x, y = (image.detach().requires_grad_() for image in (x, y))
    result = call(x, y, **options)
    upstream = torch.linspace(0.5, 2, result.numel(), dtype=result.dtype).view_as(result)
    return result, *torch.autograd.grad(result, (x, y), upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@every_level
def test_what_is_not_finite_stays_where_the_reference_has_it(backend, call, dtype):
    for image in range(2):
        for value in (torch.nan, torch.inf, -torch.inf):
            for place in ((0, 0, 0), (1, 0, 5), (1, 4, 6), (0, 10, 12)):
                made = images(2, 2, 11, 13, dtype=dtype)
                made[image, 1][place] = value
                wanted = with_gradients(call, *made, backend="reference")
                got = with_gradients(call, *made, backend=backend)
                for g, w in zip(got, wanted, strict=True):
                    assert torch.equal(g.isfinite(), w.isfinite())
                    finite = w.isfinite()
                    torch.testing.assert_close(g[finite], w[finite], rtol=1e-4, atol=1e-4)


@every_level
def test_an_image_without_finite_values(backend):
    x, y = images(1, 1, 6, 7)
    x[:] = torch.nan
    assert all(result.isnan().all() for result in with_gradients(CALLS["joint"], x, y))


@every_level
@pytest.mark.parametrize("name", ["sum", "sum with gaps", "mean squared"])
def test_gradients_of_sums_follow_what_comes_in(backend, name):
    x, y = images(3, 2, 9, 11).requires_grad_()
    sums = CALLS[name](x, y, backend=backend)
    upstreams = torch.tensor([[1.0, 0.0, -2.0], [math.inf, 1.0, math.nan]], dtype=torch.float64)
    wanted = CALLS[name](x, y, backend="reference")
    for upstream in upstreams:
        for _ in range(2):
            got, expected = (
                torch.autograd.grad(results, (x, y), upstream, retain_graph=True)
                for results in (sums, wanted)
            )
            for g, e in zip(got, expected, strict=True):
                assert torch.equal(g.isfinite(), e.isfinite())
                torch.testing.assert_close(g[e.isfinite()], e[e.isfinite()])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wants", [(True, False), (False, True), (True, True)])
def test_operators_of_sums_with_gradients(wants, dtype):
    x, y = images(2, 3, 8, 7, dtype=dtype).transpose(3, 4)
    operators, checks = torch.ops.geco_fast, ("test_schema", "test_faketensor")
    for operator, options in (
        (operators.pncc_with_gradients, ([3], [1], "joint", 1e-6, "sum")),
        (operators.lncc_with_gradients, (3, 0.0, 1e-5, "mean")),
    ):
        torch.library.opcheck(operator.default, (x, y, *options, *wants), test_utils=checks)


def box_sums(image, size):
    """Window sums of the image with zeros around it, by convolution."""
    dims = image.dim() - 2
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    kernel = image.new_ones(1, 1, *[size] * dims)
    return conv(image.flatten(0, 1).unsqueeze(1), kernel, padding=size // 2).view_as(image)


def squared_from_box_sums(x, y, size, smooth_nr, smooth_dr):
    volume = size ** (x.dim() - 2)
    x_sum, y_sum = box_sums(x, size), box_sums(y, size)
    cross = box_sums(x * y, size) - x_sum * y_sum / volume
    x_var = (box_sums(x * x, size) - x_sum**2 / volume).clamp(min=smooth_dr)
    y_var = (box_sums(y * y, size) - y_sum**2 / volume).clamp(min=smooth_dr)
    return (cross**2 + smooth_nr) / (x_var * y_var)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 3, 9), 3), ((2, 2, 8, 7), 5), ((1, 2, 5, 4, 6), 3), ((1, 1, 3, 2), 9), ((1, 1, 4, 5), 1)],
)
@pytest.mark.parametrize("smooth", [(0.0, 1e-5), (0.3, 2.0)])
def test_squared_is_that_of_box_sums(shape, size, smooth):
    x, y = (image.requires_grad_() for image in images(*shape))
    if size == 1:
        smooth = (smooth[0] + 0.1, smooth[1])
    scores = lncc(x, y, size, smooth_nr=smooth[0], smooth_dr=smooth[1])
    wanted = squared_from_box_sums(x, y, size, *smooth)
    torch.testing.assert_close(scores, wanted, rtol=1e-6, atol=1e-9)
    upstream = torch.randn(shape, dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(scores, (x, y), upstream),
        torch.autograd.grad(wanted, (x, y), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for reduction in ("sum", "mean"):
        reduced = lncc(x, y, size, smooth_nr=smooth[0], smooth_dr=smooth[1], reduction=reduction)
        torch.testing.assert_close(reduced, getattr(wanted.flatten(1), reduction)(1))


@every_level
@pytest.mark.parametrize("seed", range(12))
def test_any_sizes_and_strides(backend, seed):
    # Tiles of the kernel end at 128 rows and columns; rows of up to three vectors' widths.
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    dims = 1 + seed % 3
    longest = (600, 150, 24)[dims - 1]
    spatial = [number(1, longest if d == seed % dims else 12) for d in range(dims)]
    size = [number(1, min(s, 40)) for s in spatial]
    stride = [number(1, max(1, s // 4)) if seed % 2 else 1 for s in spatial]
    channels = ("joint", "separate")[seed // 3 % 2]
    x, y = images(2, number(1, 6), *spatial, seed=seed)
    reduction = ("none", "sum")[seed // 2 % 2]
    options = {"stride": stride, "channels": channels, "eps": 0.1, "reduction": reduction}

    def call(x, y, backend):
        return pncc(x, y, size, backend=backend, **options)

    for got, wanted in zip(
        with_gradients(call, x, y, backend=backend),
        with_gradients(call, x, y, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@every_level
@pytest.mark.parametrize("level", [1.0, 255.0, 1e4])
def test_flat_patches_in_a_bright_image(backend, level):
    # Half of it is black, half is at full brightness, and both are exactly flat.
    x = torch.zeros(1, 3, 24, 24)
    x[..., 12:] = level
    y = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def run(dtype, backend):
        return with_gradients(CALLS["joint"], x.to(dtype), y.to(dtype), backend=backend)

    exact, same = run(torch.float64, "reference"), run(torch.float32, "reference")
    for k, (got, s, e) in enumerate(zip(run(torch.float32, backend), same, exact, strict=True)):
        budget = Budget(f"result {k}", gradient=k > 0)
        budget.add(got, s, e)
        budget.check()


@every_level
def test_results_do_not_depend_on_the_number_of_threads(backend):
    x, y = images(3, 2, 150, 40, dtype=torch.float32)
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs += [[r for call in CALLS.values() for r in with_gradients(call, x, y)]]
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd and >= 1, got 4"),
        ({"kernel_size": -1}, ValueError, "kernel_size must be odd and >= 1, got -1"),
        ({"kernel_size": (3, 3)}, TypeError, "kernel_size must be an int"),
        ({"smooth_dr": -0.1}, ValueError, "smooth_dr must be >= 0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)
def test_wrong_arguments_of_the_squared_form_are_named(options, error, message):
    x = torch.ones(2, 3, 9, 9)
    with pytest.raises(error, match=message):
        lncc(x, x, **options)
