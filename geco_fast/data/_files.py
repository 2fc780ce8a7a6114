"""Where files are looked for, and what is common to their readers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geco_fast.data.dataset import DataError, DataNotFoundError

TORCHVISION = {"mnist": "MNIST", "cifar10": "CIFAR10", "celeba": "CelebA"}


def find(name: str, root: Path, folders: Sequence[str], stem: str, ends: Sequence[str]) -> Path:
    """Return the first ``root/folder/stem + end`` that exists.

    Raises
    ------
    DataNotFoundError
        If none does.
    """
    for folder in folders:
        for end in ends:
            path = root / folder / f"{stem}{end}"
            if path.is_file():
                return path
    raise not_found(name, root, folders, " or ".join(f"{stem}{end}" for end in ends))


def not_found(name: str, root: Path, folders: Sequence[str], wanted: str) -> DataNotFoundError:
    """Error that says what was looked for and where."""
    places = ", ".join(str(root / folder) for folder in folders)
    return DataNotFoundError(f"{name}: no {wanted} in any of {places}; set root or download=True")


def class_labels(path: Path, labels: Any, count: int) -> Tensor:
    """Turn labels into int64 ``[count]``, checked to be ``count`` whole numbers from 0 to 9."""
    values = np.asarray(labels)
    if values.shape != (count,):
        raise DataError(f"{path}: labels of shape {list(values.shape)} for {count} images")
    if values.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be integers, got {values.dtype}")
    if values.min() < 0 or values.max() > 9:
        wrong = values[(values < 0) | (values > 9)][0]
        raise DataError(f"{path}: labels must lie in 0..9, got {wrong}")
    return torch.from_numpy(values.astype(np.int64))


def require(module: str, purpose: str) -> ModuleType:
    """Import a module that only the extra ``train`` installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{purpose} needs {module.partition('.')[0]}: pip install 'geco-fast[train]'"
        ) from error


def download(name: str, root: Path) -> None:
    """Fetch a data set into ``root`` through torchvision.

    Raises
    ------
    DataError
        If torchvision is missing or cannot get it.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(
            f"download=True needs torchvision: install it, or put the files of {name} in {root}"
        ) from error
    try:
        getattr(datasets, TORCHVISION[name])(str(root), download=True)
    except Exception as error:
        raise DataError(f"{name}: torchvision cannot download it ({error})") from error
