"""The readers of CIFAR-10, on made files and, with ``--data-root``, on its images."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from geco_fast.data import DataError, DataNotFoundError, load


@pytest.mark.parametrize(
    ("folder", "pickled"),
    [
        (".", True),
        ("cifar-10-batches-py", True),
        ("cifar10/cifar-10-batches-py", True),
        (".", False),
        ("cifar10", False),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_what_was_written(tmp_path, write_cifar10, folder, pickled, split):
    pixels, labels = write_cifar10(tmp_path / folder, pickled=pickled)[split]
    dataset = load("cifar10", tmp_path, split=split)
    image, context, label = dataset.batch(range(len(dataset)))
    assert dataset.image_shape == (3, 32, 32)
    assert dataset.num_classes == 10
    assert context is None
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    assert torch.equal((image * 255).round(), expected)
    assert torch.equal(label, torch.from_numpy(labels).long())


def short_bytes(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The instructions by which Python 2 and its numpy wrote the original files."""
    dtype = (
        b"cnumpy\ndtype\n(" + short_bytes(b"u1") + b"K\x00K\x01tR"
        b"(K\x03" + short_bytes(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    data = pixels.tobytes()
    shape = b"".join(b"J" + int(n).to_bytes(4, "little") for n in pixels.shape)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t"
        + short_bytes(b"b")
        + b"tR(K\x01("
        + shape
        + b"t"
        + dtype
        + b"\x89T"
        + len(data).to_bytes(4, "little")
        + data
        + b"tb"
    )
    items = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + short_bytes(b"data") + array + short_bytes(b"labels") + items + b"u."


def test_reads_python_2_pickles(tmp_path, rng):
    pixels = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
    content = python2_pickle(pixels, [7, 0, 9])
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], pixels)
    (tmp_path / "test_batch").write_bytes(content)
    image, _, label = load("cifar10", tmp_path, split="test").batch(range(3))
    assert label.tolist() == [7, 0, 9]
    assert np.array_equal((image * 255).round().numpy().reshape(3, -1), pixels)


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickle_cannot_run_code(tmp_path):
    trace = tmp_path / "trace"
    content = pickle.dumps({b"data": Malicious(f"touch {trace}"), b"labels": [0]})
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=r"test_batch: .*refused: it names posix\.system"):
        load("cifar10", tmp_path, split="test")
    assert not trace.exists()


def test_archive_cannot_hold_pickles(tmp_path):
    trace = tmp_path / "trace"
    x = np.array([Malicious(f"touch {trace}")], dtype=object)
    np.savez(tmp_path / "test.npz", x=x, y=np.zeros(1, np.uint8))
    with pytest.raises(DataError, match=r"test\.npz: not a readable \.npz file"):
        load("cifar10", tmp_path, split="test")
    assert not trace.exists()


X = np.zeros((4, 32, 32, 3), np.uint8)
Y = np.zeros(4, np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "y is not a file in the archive; wants the arrays 'x' and 'y'"),
        ({"images": X, "y": Y}, "x is not a file in the archive"),
        ({"x": X.astype(np.float32), "y": Y}, "wants 32x32 RGB images in uint8, got float32"),
        ({"x": X[:, :28], "y": Y}, "wants 32x32 RGB images in uint8"),
        ({"x": X[..., 0], "y": Y}, "wants 32x32 RGB images in uint8"),
        ({"x": X[:0], "y": Y[:0]}, "wants 32x32 RGB images in uint8"),
        ({"x": X, "y": Y[:3]}, r"labels of shape \[3\] for 4 images"),
        ({"x": X, "y": np.eye(4)}, r"labels of shape \[4, 4\] for 4 images"),
        ({"x": X, "y": Y + 0.5}, "labels must be integers, got float64"),
        ({"x": X, "y": Y + np.int8(-1)}, r"labels must lie in 0\.\.9, got -1"),
        ({"x": X, "y": Y + 10}, r"labels must lie in 0\.\.9, got 10"),
    ],
)
def test_wrong_archive_is_named_with_its_fault(tmp_path, arrays, message):
    path = tmp_path / "test.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", tmp_path, split="test")
    assert str(caught.value).startswith(str(path))


FLAT = X.reshape(4, -1)
FLOATS = np.zeros((4, 384))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"labels": [0]}, "b'data'"),
        ({b"data": FLAT}, "b'labels'"),
        ({b"data": FLAT.tolist(), b"labels": [0] * 4}, "not a batch of CIFAR-10"),
        ({b"data": FLAT[:, :-1].copy(), b"labels": [0] * 4}, "not a batch of CIFAR-10"),
        ({b"data": FLOATS, b"labels": [0] * 4}, "its array is not uint8"),
        ({b"data": FLAT, b"labels": [0] * 5}, r"labels of shape \[5\] for 4 images"),
        ({b"data": FLAT, b"labels": [0, 0, 0, "cat"]}, "labels must be integers"),
        ([], "not a batch of CIFAR-10"),
    ],
)
def test_wrong_pickle_is_named_with_its_fault(tmp_path, content, message):
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", tmp_path, split="test")
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "empty"])
def test_damaged_file(tmp_path, write_cifar10, pickled, damage):
    write_cifar10(tmp_path, pickled=pickled)
    path = tmp_path / ("test_batch" if pickled else "test.npz")
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "corrupt":
        data[:20] = bytes(20)
    else:
        data.clear()
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: not a"):
        load("cifar10", tmp_path, split="test")


def test_missing_batch_of_the_original(tmp_path, write_cifar10):
    write_cifar10(tmp_path, pickled=True)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3"):
        load("cifar10", tmp_path)


def test_two_archives_are_one_too_many(tmp_path, write_cifar10):
    write_cifar10(tmp_path, pickled=False)
    (tmp_path / "train_more.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 files train\*\.npz, wants one"):
        load("cifar10", tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"no data_batch_1 or train\*\.npz in any of"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_files(data_root, split):
    dataset = load("cifar10", data_root, split=split)
    assert dataset.image_shape == (3, 32, 32)
    image, _, label = dataset.batch(range(len(dataset)))
    count = label.bincount(minlength=10)
    assert count.min() > 0
    # Channel means of CIFAR-10, to one decimal of the pixel range: red above green above blue.
    red, green, blue = image.double().mean((0, 2, 3)).tolist()
    assert red > green > blue
    assert [round(value, 1) for value in (red, green, blue)] == [0.5, 0.5, 0.4]
