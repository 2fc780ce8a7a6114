"""MNIST, and all that comes in its file format: four IDX files, gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch

from geco_fast.data._files import class_labels, find
from geco_fast.data.dataset import DataError, StoredImages

FOLDERS = (".", "mnist", "MNIST/raw", "mnist/raw")
ENDS = ("", ".gz")
PREFIX = {"train": "train", "test": "t10k"}


def read(root: Path, split: str, image_size: int | None) -> StoredImages:
    """Images ``[N, 1, S, S]`` and labels of one split."""
    prefix = PREFIX[split]
    images_path = find("mnist", root, FOLDERS, f"{prefix}-images-idx3-ubyte", ENDS)
    labels_path = find("mnist", images_path.parent, ".", f"{prefix}-labels-idx1-ubyte", ENDS)
    pixels = read_idx(images_path, 3)
    labels = read_idx(labels_path, 1)
    count, height, width = pixels.shape
    if count == 0 or height == 0 or height != width:
        raise DataError(f"{images_path}: wants square images, got shape {list(pixels.shape)}")
    return StoredImages(
        torch.from_numpy(pixels)[:, None],
        class_labels(labels_path, labels, count),
        image_size,
    )


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Read an IDX file of bytes with ``rank`` dimensions.

    Raises
    ------
    DataError
        If the magic number is another, or the file is longer or shorter than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    header = 4 + 4 * rank
    if len(data) < header:
        raise DataError(f"{path}: {len(data)} bytes, too short for an IDX header of {header}")
    magic, *shape = np.frombuffer(data, ">u4", 1 + rank).tolist()
    if magic != 0x0800 + rank:
        raise DataError(f"{path}: magic number {magic:#010x}, wants {0x0800 + rank:#010x}")
    if len(data) - header != prod(shape):
        raise DataError(
            f"{path}: {len(data) - header} bytes after the header, "
            f"wants {prod(shape)} for shape {shape}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()
