"""Small files in the formats that the readers know."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture
def idx_bytes() -> Callable[[np.ndarray], bytes]:
    """An array of bytes as the content of an IDX file."""

    def convert(array: np.ndarray) -> bytes:
        header = np.array([0x0800 + array.ndim, *array.shape], ">u4")
        return header.tobytes() + array.astype(np.uint8).tobytes()

    return convert


@pytest.fixture
def write_mnist(rng, idx_bytes) -> Callable[..., dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Write both splits of a made MNIST, three images of each digit, and return its arrays.

    The first pixel is the image's index (plus 100 in the test split).
    """

    def write(folder: Path, *, gzipped: bool = True, side: int = 12):
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for split, prefix in (("train", "train"), ("test", "t10k")):
            x = rng.integers(0, 256, (30, side, side), dtype=np.uint8)
            x[:, 0, 0] = np.arange(30) + (100 if split == "test" else 0)
            y = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), 3))
            arrays[split] = x, y
            for stem, array in (("images-idx3", x), ("labels-idx1", y)):
                data = idx_bytes(array)
                path = folder / f"{prefix}-{stem}-ubyte"
                if gzipped:
                    path = path.with_name(f"{path.name}.gz")
                path.write_bytes(gzip.compress(data) if gzipped else data)
        return arrays

    return write


@pytest.fixture
def write_cifar10(rng) -> Callable[..., dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Write both splits of a made CIFAR-10, as pickles or archives, and return its arrays."""

    def write(folder: Path, *, pickled: bool):
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {}
        names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        for split, batches in names.items():
            x = rng.integers(0, 256, (4 * len(batches), 32, 32, 3), dtype=np.uint8)
            y = rng.integers(0, 10, len(x), dtype=np.uint8)
            arrays[split] = x, y
            if not pickled:
                np.savez_compressed(folder / f"{split}.npz", x=x, y=y)
                continue
            flat = np.ascontiguousarray(np.moveaxis(x, -1, 1)).reshape(len(x), -1)
            for i, batch in enumerate(batches):
                part = slice(4 * i, 4 * i + 4)
                content = {b"data": flat[part], b"labels": y[part].tolist()}
                (folder / batch).write_bytes(pickle.dumps(content, protocol=4))
        return arrays

    return write
