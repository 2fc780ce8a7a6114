"""CelebA, or any folder of images: decoded when asked for, cropped to a square and resized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geco_fast.data._files import not_found, require
from geco_fast.data.dataset import DataError

FOLDERS = (".", "img_align_celeba", "celeba", "celeba/img_align_celeba")
SUFFIXES = (".jpg", ".jpeg", ".png")
PARTITION = "list_eval_partition.txt"
PARTS = {"train": "0", "test": "2"}


@dataclass(frozen=True)
class ImageFiles:
    """Image files as RGB pictures of ``image_size`` pixels a side."""

    paths: list[Path]
    image_size: int
    labels: None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __call__(self, index: Tensor) -> Tensor:
        pixels = np.empty((len(index), self.image_size, self.image_size, 3), np.uint8)
        for row, i in zip(pixels, index.tolist(), strict=True):
            row[:] = decode(self.paths[i], self.image_size)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32) / 255


def decode(path: Path, size: int) -> np.ndarray:
    """Central square of an image, resized (bilinear, antialiased): uint8 ``[size, size, 3]``."""
    pil = require("PIL.Image", "reading image files")
    try:
        with pil.open(path) as image:
            width, height = image.size
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            box = (left, top, left + side, top + side)
            square = image.convert("RGB").resize((size, size), pil.Resampling.BILINEAR, box=box)
            return np.asarray(square)
    # Pillow reports damaged files by these four.
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded ({error})") from error


def read(root: Path, split: str, image_size: int | None) -> ImageFiles:
    """Image files of one split, in the order of their names.

    The split is the official one if ``list_eval_partition.txt`` lies in the folder or above it;
    otherwise the first nine tenths are for training and the rest for testing.
    """
    for folder in (root / name for name in FOLDERS):
        paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
        if paths:
            chosen = _split(folder, paths, split)
            if not chosen:
                raise DataError(f"{folder}: none of its {len(paths)} images is in split {split!r}")
            return ImageFiles(chosen, image_size or 64)
    raise not_found("celeba", root, FOLDERS, "jpg or png image")


def _split(folder: Path, paths: list[Path], split: str) -> list[Path]:
    for listing in (folder / PARTITION, folder.parent / PARTITION):
        if listing.is_file():
            part = _read_partition(listing)
            unlisted = next((path.name for path in paths if path.name not in part), None)
            if unlisted is not None:
                raise DataError(f"{listing}: does not list the image {unlisted}")
            return [path for path in paths if part[path.name] == PARTS[split]]
    first_test = len(paths) * 9 // 10
    return paths[:first_test] if split == "train" else paths[first_test:]


def _read_partition(listing: Path) -> dict[str, str]:
    part: dict[str, str] = {}
    for number, line in enumerate(listing.read_text("utf-8", errors="replace").splitlines(), 1):
        match line.split():
            case [name, ("0" | "1" | "2") as value]:
                part[name] = value
            case []:
                pass
            case _:
                raise DataError(f"{listing}: line {number} is {line!r}, wants 'NAME 0|1|2'")
    return part
