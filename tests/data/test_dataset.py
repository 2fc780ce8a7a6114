"""What every data set does: batches, indices, data loaders, rotation."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from geco_fast.data import DATASETS, Batch, ImageDataset, load
from geco_fast.data.dataset import StoredImages, rotate

BUILT_IN = [name for name in DATASETS if name not in ("mnist", "cifar10", "celeba")]


def built_in(name: str, **options) -> ImageDataset:
    return load(name, base="digits", **options)


def assert_same(actual: Batch, expected: Batch) -> None:
    torch.testing.assert_close(actual._asdict(), expected._asdict(), rtol=0, atol=0)


@pytest.mark.parametrize("image_size", [None, 7, 8, 20])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_batch_has_the_stated_shapes_types_and_range(name, split, image_size):
    dataset = built_in(name, split=split, image_size=image_size)
    image, context, label = dataset.batch([3, 0, len(dataset) - 1])

    side = image_size or 16
    assert dataset.image_shape[1:] == (side, side)
    assert image.shape == (3, *dataset.image_shape)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    if dataset.context_shape is None:
        assert context is None
    else:
        assert context.shape == (3, *dataset.context_shape)
        assert context.dtype == torch.float32
        assert 0 <= context.min() < context.max() <= 1
    assert label.shape == (3,)
    assert label.dtype == torch.int64
    assert 0 <= label.min() <= label.max() < dataset.num_classes


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_example_does_not_depend_on_its_batch(name):
    dataset = built_in(name)
    order = np.random.default_rng(0).integers(len(dataset), size=9)
    whole = dataset.batch(order)
    for row, index in enumerate(order):
        alone = dataset.batch([index])
        assert_same(alone, Batch(*(None if part is None else part[row, None] for part in whole)))


@pytest.mark.parametrize("name", BUILT_IN)
def test_empty_batch(name):
    dataset = built_in(name)
    image, context, label = dataset.batch([])
    assert image.shape == (0, *dataset.image_shape)
    assert context is None or context.shape == (0, *dataset.context_shape)
    assert label.shape == (0,)


@pytest.mark.parametrize(
    "indices",
    [
        range(4),
        (0, 1, 2, 3),
        np.arange(4, dtype=np.uint8),
        np.arange(4)[::-1][::-1],
        torch.arange(4, dtype=torch.int32),
        torch.arange(8)[::2] // 2,
        [-1442, -1441, 2, 3],
    ],
)
def test_indices_in_any_form(indices):
    dataset = built_in("digits")
    assert len(dataset) == 1442
    assert_same(dataset.batch(indices), dataset.batch([0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 1442], IndexError, r"indices must lie in \[-1442, 1442\), got 1442"),
        ([-1443], IndexError, "got -1443"),
        (3, ValueError, r"indices must be \[B\], got shape \[\]"),
        ([[1, 2]], ValueError, r"got shape \[1, 2\]"),
        ([0.0, 1.0], TypeError, "indices must be integers, got float64"),
        (torch.ones(1442, dtype=torch.bool), TypeError, "indices must be integers, got bool"),
        (["a"], TypeError, "indices must be integers"),
    ],
)
def test_wrong_indices(indices, error, message):
    with pytest.raises(error, match=message):
        built_in("digits").batch(indices)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["digits", "mnist-rotate"])
def test_data_loader_collates_into_batches(name, workers):
    dataset = built_in(name)
    loader = DataLoader(torch.utils.data.Subset(dataset, range(10)), 4, num_workers=workers)
    batches = [Batch(**examples) for examples in loader]
    assert [len(batch.image) for batch in batches] == [4, 4, 2]
    for first, batch in zip((0, 4, 8), batches, strict=True):
        assert_same(batch, dataset.batch(range(first, min(first + 4, 10))))


def test_iteration_ends():
    dataset = built_in("digits", split="test")
    examples = [dataset[i] for i in range(len(dataset))]
    assert len(list(dataset)) == len(examples) == len(dataset)
    assert examples[0].keys() == {"image", "label"}
    assert examples[0]["image"].shape == dataset.image_shape


def test_pickled_dataset_gives_the_same_examples():
    dataset = built_in("mnist-rotate")
    copy = pickle.loads(pickle.dumps(dataset))
    assert_same(copy.batch(range(5)), dataset.batch(range(5)))


def test_stored_images_are_not_changed_by_use():
    pixels = torch.randint(0, 256, (3, 1, 5, 5), dtype=torch.uint8)
    source = StoredImages(pixels, torch.zeros(3, dtype=torch.int64))
    images = source(torch.tensor([2, 0]))
    assert torch.equal(images, pixels[[2, 0]] / 255)
    images.zero_()
    assert torch.equal(source(torch.tensor([2, 0])), pixels[[2, 0]] / 255)


def test_upscaling_is_bilinear():
    pixels = torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8)
    source = StoredImages(pixels, torch.zeros(1, dtype=torch.int64), image_size=4)
    weight = torch.tensor([1, 0.75, 0.25, 0], dtype=torch.float64)
    expected = weight[:, None] * (1 - weight) + (1 - weight[:, None]) * weight
    assert torch.equal(source(torch.tensor([0]))[0, 0].double(), expected)


@pytest.mark.parametrize("side", [1, 7, 8, 28])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4])
def test_quarter_turns_move_pixels_anticlockwise(side, turns):
    pixels = torch.randint(0, 256, (3, 2, side, side), generator=torch.manual_seed(side))
    turned = rotate(pixels.float() / 255, torch.full((3,), 90 * turns))
    assert torch.equal((turned * 255).round().long(), pixels.rot90(turns, dims=(2, 3)))


def test_rotation_angles_are_per_picture_and_degrees():
    # A dot on the right, at the radius of 8 pixels from the centre of 21.
    dot = torch.zeros(12, 1, 21, 21)
    dot[:, 0, 10, 18] = 1
    degrees = 30 * torch.arange(12)
    turned = rotate(dot, degrees)[:, 0]
    mass = turned.sum((1, 2))
    offset = torch.arange(21) - 10
    right = (turned.sum(1) * offset).sum(1) / mass
    up = -(turned.sum(2) * offset).sum(1) / mass
    angle = torch.atan2(up, right).rad2deg() % 360
    # The dot's bilinear footprint can move its centre of mass by less than half a pixel.
    error = (angle - degrees + 180) % 360 - 180
    assert error.abs().max() < torch.rad2deg(torch.tensor(0.5 / 8))


def test_rotation_leaves_zeros_where_nothing_was():
    turned = rotate(torch.ones(1, 1, 16, 16), torch.tensor([45]))[0, 0]
    assert turned[0, 0] == turned[0, -1] == turned[-1, 0] == turned[-1, -1] == 0
    assert turned[8, 8] == 1
