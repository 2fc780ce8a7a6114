"""Data sets of the paper's experiments, read from the user's files or built in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from geco_fast._checks import check_choice, describe
from geco_fast.data import celeba, cifar10, derived, digits, mnist
from geco_fast.data._files import download as _download
from geco_fast.data.dataset import (
    Batch,
    DataError,
    DataNotFoundError,
    ImageDataset,
    Source,
    StoredImages,
)

__all__ = ["DATASETS", "Batch", "DataError", "DataNotFoundError", "ImageDataset", "load"]

_READERS: dict[str, Callable[[Path, str, int | None], Source]] = {
    "mnist": mnist.read,
    "cifar10": cifar10.read,
    "celeba": celeba.read,
}
DATASETS = ("digits", *_READERS, *derived.TABLES)
"""Names that `load` knows."""


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    split: str = "train",
    image_size: int | None = None,
    base: str = "mnist",
    seed: int = 0,
    download: bool = False,
) -> ImageDataset:
    """Load a data set.

    ================  =======================================  ==========================
    name              image                                    context
    ================  =======================================  ==========================
    digits            scikit-learn's digits, 16x16             none
    mnist             MNIST's digits, 28x28                    none
    cifar10           CIFAR-10's photographs, 32x32 RGB        none
    celeba            central squares of a folder, 64x64 RGB   none
    color-mnist       three digits as red, green and blue      none
    mnist-triplets    I0, I1, I2                               none
    mnist-sum         I2                                       I0, I1
    mnist-sum-hard    I0, I1                                   I2
    mnist-rotate      another instance of I0's digit, turned   I0, I1
                      anticlockwise by 30 degrees times I1's
    ================  =======================================  ==========================

    I0 and I1 are any digits, I2 is one of the digit (l0 + l1) mod 10; the digits of an image or
    a context are its channels. The last five are 60,000 (test: 10,000) combinations of
    the training (test) images of ``base``, composed when asked for.

    Parameters
    ----------
    name : str
        One of `DATASETS`.
    root : path, optional
        Folder of the user's files; needed for all that is not built on ``digits``. Searched:
        itself and the usual folders below, e.g. ``mnist``, ``MNIST/raw``, ``cifar-10-batches-py``.
    split : {"train", "test"}
    image_size : int, optional
        Height and width in pixels to resize to; the table's sizes by default.
    base : {"mnist", "digits"}
        Labelled digits that the last five are built on.
    seed : int
        Determines the combinations of the last five; at least 0.
    download : bool
        Fetch files that are missing into ``root``, through torchvision.

    Raises
    ------
    ValueError
        If an argument is none of the above.
    DataError
        If files are missing (`DataNotFoundError`), damaged, or not what they should be; it is a
        `ValueError` too.
    """
    check_choice("name", name, DATASETS)
    check_choice("split", split, ("train", "test"))
    check_choice("base", base, ("mnist", "digits"))
    _check_whole("seed", seed, 0)
    if image_size is not None:
        _check_whole("image_size", image_size, 1)
    if name in derived.TABLES:
        base_images = cast(StoredImages, _read(base, root, split, image_size, download))
        return derived.compose(name, base_images, split, seed)
    source = _read(name, root, split, image_size, download)
    return ImageDataset(name, source, torch.arange(len(source))[:, None])


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {describe(value)}")


def _read(
    name: str,
    root: str | os.PathLike[str] | None,
    split: str,
    image_size: int | None,
    download: bool,
) -> Source:
    if name == "digits":
        return digits.read(split, image_size)
    if root is None:
        raise DataNotFoundError(f"root must be the folder of {name}'s files, got None")
    folder = Path(root)
    try:
        try:
            return _READERS[name](folder, split, image_size)
        except DataNotFoundError:
            if not download:
                raise
        _download(name, folder)
        return _READERS[name](folder, split, image_size)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error})") from error
