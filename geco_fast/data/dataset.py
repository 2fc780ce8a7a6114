"""What every data set is: labelled pictures, and tables that say how an example combines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset


class DataError(ValueError):
    """Data cannot be read: the message names the file and what is wrong with it."""


class DataNotFoundError(DataError):
    """The files of a data set are not where they were looked for."""


class Batch(NamedTuple):
    """Examples of an `ImageDataset`.

    Attributes
    ----------
    image : Tensor
        What is modelled, float32 in [0, 1], ``[B, C, H, W]``.
    context : Tensor or None
        What it is conditioned on, float32 in [0, 1], ``[B, Cc, H, W]``.
    label : Tensor or None
        Class of the image (of its first channel, where the channels are different pictures),
        int64 ``[B]``.
    """

    image: Tensor
    context: Tensor | None = None
    label: Tensor | None = None


class Source(Protocol):
    """Pictures of one shape, chosen by index."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one picture."""

    @property
    def labels(self) -> Tensor | None:
        """Class of each picture, int64 ``[N]``."""

    def __len__(self) -> int: ...

    def __call__(self, index: Tensor) -> Tensor:
        """Pictures ``[K, C, H, W]``, float32 in [0, 1], at the int64 index ``[K]``."""


@dataclass(frozen=True)
class StoredImages:
    """Pictures held in memory in whole numbers from 0 to ``maximum``.

    ``pixels`` is uint8 ``[N, C, h, w]``; a picture is resized (bilinear, antialiased) when it is
    asked for, so that nothing is rounded a second time.
    """

    pixels: Tensor
    labels: Tensor
    image_size: int | None = None
    maximum: int = 255

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        if self.image_size is not None:
            height = width = self.image_size
        return channels, height, width

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, index: Tensor) -> Tensor:
        images = self.pixels[index].to(torch.float32) / self.maximum
        size = self.shape[1:]
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
            images = images.clamp_(0, 1)
        return images


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn square pictures about their centre, anticlockwise as seen on a screen.

    Parameters
    ----------
    images : Tensor
        ``[B, C, S, S]``; bilinear between pixels, zero outside.
    degrees : Tensor
        One angle per picture, ``[B]``.
    """
    angle = degrees.to(torch.float64).deg2rad()
    cos, sin = angle.cos(), angle.sin()
    # Rows point down, so this matrix, which maps a target pixel to its source, is the usual
    # rotation matrix of the plane and not its transpose.
    to_source = torch.stack([cos, -sin, sin, cos], dim=-1).view(-1, 2, 2)
    side = images.shape[-1]
    identity = torch.eye(2, 3, dtype=torch.float64)[None]
    target = F.affine_grid(identity, [1, 1, side, side], align_corners=False).view(1, -1, 2)
    grid = (target @ to_source.mT).view(-1, side, side, 2).to(images.dtype)
    return F.grid_sample(images, grid, align_corners=False).clamp_(0, 1)


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Images, with a context and a label where the data set has them.

    Examples are composed when they are asked for. A `torch.utils.data.DataLoader` collates them
    into a dictionary of the parts that exist, so ``Batch(**examples)`` is one of its batches;
    `batch` makes the same at once.

    Parameters
    ----------
    name : str
        Name of the data set.
    source : Source
        The pictures.
    image : Tensor
        int64 ``[N, S]``: the S pictures of the source that are stacked along the channels of
        example n.
    context : Tensor, optional
        int64 ``[N, Sc]``: the same for its context.
    degrees : Tensor, optional
        ``[N]``: angle by which the image (not the context) is turned anticlockwise.

    Attributes
    ----------
    name : str
    image_shape : tuple of int
        ``(C, H, W)``.
    context_shape : tuple of int or None
        ``(Cc, H, W)``.
    num_classes : int or None
        Labels lie in ``range(num_classes)``.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        image: Tensor,
        context: Tensor | None = None,
        degrees: Tensor | None = None,
    ) -> None:
        self.name = name
        self.image_shape = self._stacked_shape(source, image)
        self.context_shape = None if context is None else self._stacked_shape(source, context)
        self.num_classes = None if source.labels is None else 10
        self._source = source
        self._image = image
        self._context = context
        self._degrees = degrees

    @staticmethod
    def _stacked_shape(source: Source, table: Tensor) -> tuple[int, int, int]:
        channels, height, width = source.shape
        return channels * table.shape[1], height, width

    def __len__(self) -> int:
        return len(self._image)

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> Batch:
        """Compose the examples at ``indices``.

        Parameters
        ----------
        indices : sequence of int, array or Tensor
            ``[B]``, any integer dtype; negative ones count from the end.

        Returns
        -------
        Batch
            ``image [B, C, H, W]``, ``context [B, Cc, H, W]`` or None, ``label [B]`` or None.

        Raises
        ------
        TypeError
            If ``indices`` are not integers.
        ValueError
            If ``indices`` have another rank than 1.
        IndexError
            If one is out of range.
        DataError
            If an image file cannot be decoded.
        """
        index = self._check_indices(indices)
        image = self._stack(self._image[index], self.image_shape)
        if self._degrees is not None:
            image = rotate(image, self._degrees[index])
        context = label = None
        if self._context is not None and self.context_shape is not None:
            context = self._stack(self._context[index], self.context_shape)
        if self._source.labels is not None:
            label = self._source.labels[self._image[index, 0]]
        return Batch(image, context, label)

    def _stack(self, table: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return self._source(table.flatten()).reshape(-1, *shape)

    def _check_indices(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        index = indices.numpy(force=True) if isinstance(indices, Tensor) else np.asarray(indices)
        if index.ndim != 1:
            raise ValueError(f"indices must be [B], got shape {list(index.shape)}")
        if index.size and index.dtype.kind not in "iu":
            raise TypeError(f"indices must be integers, got {index.dtype}")
        count = len(self)
        outside = index[(index < -count) | (index >= count)]
        if outside.size:
            raise IndexError(f"indices must lie in [-{count}, {count}), got {outside[0]}")
        return torch.from_numpy(index.astype(np.int64))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        parts = {k: v for k, v in self.batch(indices)._asdict().items() if v is not None}
        return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]

    def __repr__(self) -> str:
        context = f", context {list(self.context_shape)}" if self.context_shape else ""
        return f"{self.name}: {len(self)} images {list(self.image_shape)}{context}"
