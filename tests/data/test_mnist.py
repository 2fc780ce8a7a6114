"""The IDX reader, on made files and, with ``--data-root``, on MNIST."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from geco_fast.data import DataError, DataNotFoundError, load


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("folder", [".", "mnist", "MNIST/raw", "mnist/raw"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_what_was_written(tmp_path, write_mnist, folder, gzipped, split):
    pixels, labels = write_mnist(tmp_path / folder, gzipped=gzipped)[split]
    dataset = load("mnist", tmp_path, split=split)
    image, context, label = dataset.batch(range(len(dataset)))
    assert dataset.image_shape == (1, 12, 12)
    assert dataset.num_classes == 10
    assert context is None
    assert torch.equal((image * 255).round(), torch.from_numpy(pixels)[:, None].float())
    assert torch.equal(label, torch.from_numpy(labels).long())


def test_root_may_be_a_string(tmp_path, write_mnist):
    write_mnist(tmp_path)
    assert len(load("mnist", str(tmp_path))) == 30


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "shape", "damage", "message"),
    [
        (IMAGES, (30,), None, "magic number 0x00000801, wants 0x00000803"),
        (LABELS, (30, 1, 1), None, "magic number 0x00000803, wants 0x00000801"),
        (IMAGES, (0, 0, 0), lambda b: b"", "0 bytes, too short for an IDX header of 16"),
        (IMAGES, (0, 0, 0), lambda b: b[:15], "15 bytes, too short"),
        (IMAGES, (30, 12, 12), lambda b: b[:-1], r"4319 bytes after the header, wants 4320 for"),
        (IMAGES, (30, 12, 12), lambda b: b + b"0", "4321 bytes after the header, wants 4320"),
        (IMAGES, (0, 0, 0), lambda b: b[:4] + b"\xff" * 12, "0 bytes after the header"),
        (IMAGES, (30, 12, 11), None, r"wants square images, got shape \[30, 12, 11\]"),
        (IMAGES, (0, 12, 12), None, r"got shape \[0, 12, 12\]"),
        (IMAGES, (30, 0, 0), None, r"got shape \[30, 0, 0\]"),
        (LABELS, (29,), None, r"labels of shape \[29\] for 30 images"),
        (LABELS, (30,), lambda b: b[:-1] + b"\n", r"labels must lie in 0\.\.9, got 10"),
    ],
)
def test_damaged_file_is_named_with_its_fault(
    tmp_path, write_mnist, idx_bytes, file, shape, damage, message
):
    write_mnist(tmp_path, gzipped=False)
    content = idx_bytes(np.zeros(shape))
    (tmp_path / file).write_bytes(damage(content) if damage else content)
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path)
    assert str(caught.value).startswith(str(tmp_path / file))


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "not gzip"])
def test_damaged_gzip(tmp_path, write_mnist, damage):
    write_mnist(tmp_path)
    path = tmp_path / f"{IMAGES}.gz"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "corrupt":
        data[len(data) // 2] ^= 0xFF
    else:
        data = bytearray(gzip.decompress(data))
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path.name}: cannot be read"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("missing", [IMAGES, LABELS])
def test_missing_file(tmp_path, write_mnist, missing):
    write_mnist(tmp_path)
    (tmp_path / f"{missing}.gz").unlink()
    with pytest.raises(DataNotFoundError, match=rf"mnist: no {missing} or {missing}\.gz in any of"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_real_files(data_root, split, count):
    dataset = load("mnist", data_root, split=split)
    assert len(dataset) == count
    assert dataset.image_shape == (1, 28, 28)
    image, _, label = dataset.batch(range(count))
    first = {"train": [5, 0, 4, 1, 9, 2], "test": [7, 2, 1, 0, 4, 1]}[split]
    assert label[:6].tolist() == first
    # The mean of MNIST's training pixels is known to be 0.1307; strokes are bright on black.
    if split == "train":
        assert round(image.double().mean().item(), 4) == 0.1307
    assert label.bincount(minlength=10).min() > 0.08 * count
