"""Data sets of several digits: which digits, which angle, which split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geco_fast.data import Batch, DataError, ImageDataset, load
from geco_fast.data.dataset import rotate
from geco_fast.data.derived import EXAMPLES, TABLES

CHANNELS = {
    "color-mnist": (3, None),
    "mnist-triplets": (3, None),
    "mnist-sum": (1, 2),
    "mnist-sum-hard": (2, 1),
    "mnist-rotate": (1, 2),
}
SPLITS = ("train", "test")


@pytest.fixture
def root(tmp_path, write_mnist):
    write_mnist(tmp_path)
    return tmp_path


def everything(dataset: ImageDataset) -> Batch:
    return dataset.batch(range(len(dataset)))


def digits_of(base: ImageDataset, channels: torch.Tensor) -> torch.Tensor:
    """Labels ``[B, C]`` of channels that are, bit for bit, images of the base."""
    images, _, labels = everything(base)
    first = (255 * images[:, 0, 0, 0]).round().long()
    index = (255 * channels[:, :, 0, 0]).round().long() - first[0]
    assert torch.equal(images[index, 0], channels)
    return labels[index]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TABLES)
def test_digits_of_each_channel(root, name, split):
    dataset = load(name, root, split=split)
    base = load("mnist", root, split=split)
    assert len(dataset) == EXAMPLES[split]
    image, context, label = everything(dataset)
    channels, context_channels = CHANNELS[name]
    assert dataset.image_shape == (channels, 12, 12)
    assert dataset.context_shape == (context_channels and (context_channels, 12, 12))

    if name == "mnist-rotate":
        l0 = digits_of(base, context)[:, 0]
        assert torch.equal(label, l0)
        return
    target = digits_of(base, image)
    assert torch.equal(label, target[:, 0])
    if name == "color-mnist":
        return
    if name == "mnist-triplets":
        l0, l1, l2 = target.T
    elif name == "mnist-sum":
        (l0, l1), l2 = digits_of(base, context).T, target[:, 0]
    else:
        (l0, l1), l2 = target.T, digits_of(base, context)[:, 0]
    assert torch.equal(l2, (l0 + l1) % 10)


@pytest.mark.parametrize("split", SPLITS)
def test_rotated_image_is_another_instance_turned_by_the_second_digit(root, split):
    dataset = load("mnist-rotate", root, split=split)
    base = load("mnist", root, split=split)
    images, _, labels = everything(base)
    image, context, _ = dataset.batch(range(200))
    l0, l1 = digits_of(base, context).T
    for i in range(200):
        instances = images[labels == l0[i]]
        turned = rotate(instances, (30 * l1[i]).expand(len(instances)))
        same = (turned == image[i]).flatten(1).all(1)
        assert same.sum() == 1
        assert not torch.equal(instances[same][0, 0], context[i, 0])


@pytest.mark.parametrize("name", TABLES)
def test_splits_share_no_source_image(root, name):
    # The first pixel tells an image of the training split, 0..29, from one of the test split,
    # 100..129, unless the image is turned.
    for split, indices in (("train", range(30)), ("test", range(100, 130))):
        batch = everything(load(name, root, split=split))
        parts = [batch.context] if name == "mnist-rotate" else [batch.image, batch.context]
        seen = [(255 * x[:, :, 0, 0]).round().unique() for x in parts if x is not None]
        assert {int(code) for codes in seen for code in codes} == set(indices)


@pytest.mark.parametrize("base", ["digits", "mnist"])
@pytest.mark.parametrize("name", TABLES)
def test_seed_determines_the_examples(root, name, base):
    def tensors(seed, split="train"):
        batch = load(name, root, base=base, seed=seed, split=split).batch(range(50))
        return torch.cat([part.flatten() for part in batch if part is not None])

    assert torch.equal(tensors(0), tensors(0))
    assert not torch.equal(tensors(0), tensors(1))
    assert not torch.equal(tensors(0), tensors(0, "test"))


def test_splits_combine_their_images_differently(root):
    train, test = (everything(load("color-mnist", root, split=split)).image for split in SPLITS)
    codes = (255 * train[:10_000, :, 0, 0]).round(), (255 * test[:, :, 0, 0]).round() - 100
    assert not torch.equal(*codes)


def test_order_of_the_base_images_is_not_that_of_the_examples(root):
    labels = everything(load("color-mnist", root)).label[:30]
    assert not torch.equal(labels, everything(load("mnist", root)).label)


@pytest.mark.parametrize("name", TABLES)
def test_labels_are_drawn_evenly(name):
    # A chi-squared statistic with k degrees of freedom has mean k and deviation sqrt(2 k).
    dataset = load(name, base="digits")
    label = everything(dataset).label
    base = load("digits", split="train")
    share = everything(base).label.bincount(minlength=10).double() / len(base)
    if name == "mnist-sum":
        share = torch.stack(
            [sum(share[i] * share[(s - i) % 10] for i in range(10)) for s in range(10)]
        )
    expected = len(dataset) * share
    statistic = ((label.bincount(minlength=10) - expected) ** 2 / expected).sum()
    assert statistic < 9 + 5 * np.sqrt(18)


def test_base_must_hold_every_digit(tmp_path, idx_bytes):
    labels = np.repeat(np.arange(10), 2)[:-1]
    pixels = np.zeros((19, 4, 4))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    with pytest.raises(DataError, match="base must hold two images of each digit, got 1 of a 9"):
        load("mnist-rotate", tmp_path)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TABLES)
def test_real_files(data_root, name, split):
    dataset = load(name, data_root, split=split)
    image, context, label = dataset.batch(range(0, len(dataset), 10))
    channels, context_channels = CHANNELS[name]
    assert image.shape == (EXAMPLES[split] // 10, channels, 28, 28)
    assert context is None or context.shape[1:] == (context_channels, 28, 28)
    assert image.isfinite().all()
    assert label.unique().tolist() == list(range(10))
    # MNIST's mean pixel is 0.13, and a turned digit stays inside the frame.
    assert round(image.double().mean().item(), 1) == 0.1
