"""CIFAR-10: the original pickled batches, or ``train*.npz`` and ``test*.npz``."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geco_fast.data._files import class_labels, not_found
from geco_fast.data.dataset import DataError, StoredImages

FOLDERS = (".", "cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py")
_ARRAY_NAMES = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
)
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def read(root: Path, split: str, image_size: int | None) -> StoredImages:
    """Images ``[N, 3, 32, 32]`` and labels of one split."""
    for folder in (root / name for name in FOLDERS):
        archives = sorted(folder.glob(f"{split}*.npz"))
        if len(archives) > 1:
            raise DataError(f"{folder}: {len(archives)} files {split}*.npz, wants one")
        if archives:
            return _stored([(archives[0], *_read_npz(archives[0]))], image_size)
        paths = [folder / name for name in BATCHES[split]]
        if any(path.is_file() for path in paths):
            return _stored([(path, *_read_pickle(path)) for path in paths], image_size)
    raise not_found("cifar10", root, FOLDERS, f"{BATCHES[split][0]} or {split}*.npz")


def _stored(
    parts: list[tuple[Path, np.ndarray, np.ndarray]], image_size: int | None
) -> StoredImages:
    pixels, labels = [], []
    for path, x, y in parts:
        if x.dtype != np.uint8 or x.shape[1:] != (3, 32, 32) or not len(x):
            raise DataError(f"{path}: wants 32x32 RGB images in uint8, got {x.dtype} {x.shape}")
        pixels.append(torch.tensor(x))
        labels.append(class_labels(path, y, len(x)))
    return StoredImages(torch.cat(pixels), torch.cat(labels), image_size)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            x, y = archive["x"], archive["y"]
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}; wants the arrays 'x' and 'y'") from error
    # A damaged archive may raise nearly anything.
    except Exception as error:
        raise DataError(f"{path}: not a readable .npz file ({error})") from error
    return (np.moveaxis(x, -1, 1) if x.ndim == 4 else x), y


class _Inert:
    """Takes the place of whatever a pickled array is built from; only remembers what it is given.

    numpy is not let near the file: its own ``__setstate__`` trusts what it reads.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds plain data, with `_Inert` for numpy's names, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _ARRAY_NAMES:
            return _Inert
        raise pickle.UnpicklingError(f"refused: it names {module}.{name}")


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        _, shape, dtype, fortran_order, data = content[b"data"].state
        if dtype.arguments[0] not in ("u1", b"u1") or fortran_order:
            raise ValueError("its array is not uint8 in C order")
        pixels = np.frombuffer(data, np.uint8).reshape(shape).reshape(-1, 3, 32, 32)
        return pixels, np.asarray(content[b"labels"])
    # A damaged pickle may raise nearly anything.
    except Exception as error:
        raise DataError(f"{path}: not a batch of CIFAR-10 ({error})") from error
