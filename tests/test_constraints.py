"""Constraints against their formulas, and the networks in them staying fixed."""

import pytest
import torch
from torch import nn

from geco_fast.constraints import (
    ClassificationAccuracy,
    FeatureReconstructionError,
    LocalStatistics,
    PatchNCC,
    ReconstructionError,
)
from geco_fast.ops import pncc


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images():
    return torch.rand(2, 3, 2, 10, 9, dtype=torch.float64)


def classifier(classes=4):
    layers = nn.Conv2d(2, 3, 3), nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Flatten()
    return nn.Sequential(*layers, nn.LazyLinear(classes)).double().eval()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reconstruction_error(reduction):
    x, y = images()
    error = getattr(((x - y) ** 2).flatten(1), reduction)(1)
    constraint = ReconstructionError(0.3, reduction)
    torch.testing.assert_close(constraint(x, y), error - 0.09)
    assert (constraint(x, x) <= 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_feature_reconstruction_error(reduction):
    x, y = images()
    features = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    error = getattr(((features(x) - features(y)) ** 2).flatten(1), reduction)(1)
    constraint = FeatureReconstructionError(features, 0.3, reduction)
    torch.testing.assert_close(constraint(x, y), error - 0.09)


def test_classification_accuracy():
    x, y = images()
    labels = torch.tensor([0, 3, 1])
    network = classifier()
    network(x)
    wanted = 0.9 - network(y).softmax(1)[torch.arange(3), labels]
    torch.testing.assert_close(ClassificationAccuracy(network, 0.9)(x, y, labels), wanted)


@pytest.mark.parametrize("size", [3, (4, 2)])
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_patch_ncc(size, stride):
    x, y = images()
    scores = pncc(x, y, size, stride=stride).flatten(1)
    mean, total = (PatchNCC(0.9, size, stride, reduction) for reduction in ("mean", "sum"))
    torch.testing.assert_close(mean(x, y), (0.9 - scores).mean(1))
    torch.testing.assert_close(total(x, y), (0.9 - scores).sum(1))
    assert (mean(x, x) <= 0).all()


@pytest.mark.parametrize(
    ("spatial", "patch"), [((9,), 4), ((10, 9), 3), ((10, 9), (2, 5)), ((4, 5, 4), 2)]
)
def test_local_statistics(spatial, patch):
    x = torch.rand(2, 3, *spatial, dtype=torch.float64)
    statistics = LocalStatistics(patch, eps=1e-3)(x)
    sizes = (patch,) * len(spatial) if isinstance(patch, int) else patch
    grid = [s - k + 1 for s, k in zip(spatial, sizes, strict=True)]
    assert statistics.shape == (2, 6, *grid)
    for index in torch.cartesian_prod(*(torch.arange(g) for g in grid)).reshape(-1, len(grid)):
        place = [slice(int(i), int(i) + k) for i, k in zip(index, sizes, strict=True)]
        here = x[(slice(None), slice(None), *place)].flatten(2)
        found = statistics[(slice(None), slice(None), *index.tolist())]
        torch.testing.assert_close(found[:, :3], here.mean(2))
        torch.testing.assert_close(found[:, 3:], (here.var(2, correction=0) + 1e-3).sqrt())


def test_local_statistics_of_flat_images_have_finite_gradients():
    y = torch.full((1, 1, 6, 6), 0.3, requires_grad=True)
    x = torch.rand(1, 1, 6, 6)
    FeatureReconstructionError(LocalStatistics(3), 0.1)(x, y).sum().backward()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("make", [FeatureReconstructionError, ClassificationAccuracy])
def test_networks_stay_fixed(make):
    x, y = images()
    network = classifier()
    network(x)
    network.train()
    constraint = make(network, 0.5)
    parent = nn.Sequential(constraint).train()
    assert parent.training
    assert not any(module.training for module in network.modules())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    y.requires_grad_()
    constraint(x, y, torch.tensor([0, 1, 2])).sum().backward()
    assert y.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        ReconstructionError,
        lambda kappa: FeatureReconstructionError(nn.Identity(), kappa),
        lambda kappa: ClassificationAccuracy(nn.Identity(), kappa),
        PatchNCC,
    ],
)
def test_kappa_must_be_positive(make):
    for kappa in (0.0, -1.0):
        with pytest.raises(ValueError, match="kappa must be > 0"):
            make(kappa)
    with pytest.raises(TypeError, match="kappa must be a number"):
        make("0.1")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PatchNCC(1.5), ValueError, "kappa must be a correlation"),
        (lambda: ClassificationAccuracy(nn.Identity(), 1.5), ValueError, "kappa must be a prob"),
        (lambda: ReconstructionError(0.1, "none"), ValueError, "reduction must be one of"),
        (lambda: FeatureReconstructionError(abs, 0.1), TypeError, "features must be a torch.nn"),
        (lambda: LocalStatistics(3, eps=0.0), ValueError, "eps must be > 0"),
        (lambda: LocalStatistics(3)(torch.ones(2, 2)), ValueError, "x must be"),
        (lambda: LocalStatistics(3)(torch.ones(1, 1, 2, 5)), ValueError, "patch_size must fit"),
    ],
)
def test_wrong_construction_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.ones(2, 3), None, ValueError, "labels must be given"),
        (torch.ones(2, 3), torch.ones(2), TypeError, "labels must have the dtype int64"),
        (torch.ones(2, 3), torch.ones(3).long(), ValueError, r"labels must have shape \[2\]"),
        (torch.ones(2, 3, 1), torch.ones(2).long(), ValueError, "the classifier's output must be"),
    ],
)
def test_wrong_labels_are_named(logits, labels, error, message):
    with pytest.raises(error, match=message):
        ClassificationAccuracy(nn.Identity(), 0.5)(logits, logits, labels)
