"""Data sets made of several digits each: tables of which digit goes where."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from geco_fast.data.dataset import DataError, ImageDataset, StoredImages

EXAMPLES = {"train": 60_000, "test": 10_000}


class _Draw:
    """Draws ``count`` examples at a time from the digits that carry ``labels``."""

    def __init__(self, labels: Tensor, count: int, rng: np.random.Generator) -> None:
        self.labels = labels.numpy()
        self._count = count
        self._rng = rng
        self._by_class = np.argsort(self.labels, kind="stable")
        self._rank = np.argsort(self._by_class)
        self._size = np.bincount(self.labels, minlength=10)
        self._first = np.cumsum(self._size) - self._size
        if self._size.min() < 2:
            rare = int(self._size.argmin())
            raise DataError(
                f"base must hold two images of each digit, got {self._size[rare]} of a {rare}"
            )

    def any(self, slots: int) -> np.ndarray:
        """Any digits, ``[count, slots]``."""
        return self._rng.integers(len(self.labels), size=(self._count, slots))

    def of_class(self, digit: np.ndarray) -> np.ndarray:
        """Some image of each of the digits ``[count]``."""
        return self._by_class[self._first[digit] + self._rng.integers(self._size[digit])]

    def another(self, index: np.ndarray) -> np.ndarray:
        """For each image, another one of the same digit."""
        digit = self.labels[index]
        step = self._rng.integers(1, self._size[digit])
        position = self._rank[index] - self._first[digit] + step
        return self._by_class[self._first[digit] + position % self._size[digit]]

    def sum_triples(self) -> np.ndarray:
        """Triples ``[count, 3]`` in which the last digit is the sum of the others modulo 10."""
        pair = self.any(2)
        return np.column_stack([pair, self.of_class(self.labels[pair].sum(1) % 10)])


def _color(draw: _Draw) -> dict[str, np.ndarray]:
    return {"image": draw.any(3)}


def _triplets(draw: _Draw) -> dict[str, np.ndarray]:
    return {"image": draw.sum_triples()}


def _sum(draw: _Draw) -> dict[str, np.ndarray]:
    triples = draw.sum_triples()
    return {"image": triples[:, 2:], "context": triples[:, :2]}


def _sum_hard(draw: _Draw) -> dict[str, np.ndarray]:
    triples = draw.sum_triples()
    return {"image": triples[:, :2], "context": triples[:, 2:]}


def _rotate(draw: _Draw) -> dict[str, np.ndarray]:
    pair = draw.any(2)
    return {
        "image": draw.another(pair[:, 0])[:, None],
        "context": pair,
        "degrees": 30 * draw.labels[pair[:, 1]],
    }


TABLES: dict[str, Callable[[_Draw], dict[str, np.ndarray]]] = {
    "color-mnist": _color,
    "mnist-triplets": _triplets,
    "mnist-sum": _sum,
    "mnist-sum-hard": _sum_hard,
    "mnist-rotate": _rotate,
}


def compose(name: str, digits: StoredImages, split: str, seed: int) -> ImageDataset:
    """Build the data set ``name`` over labelled digits; the same seed gives the same examples."""
    # The split is part of the key: train and test must not pair their digits alike.
    key = [seed, list(TABLES).index(name), list(EXAMPLES).index(split)]
    draw = _Draw(digits.labels, EXAMPLES[split], np.random.default_rng(key))
    tables = {part: torch.from_numpy(table) for part, table in TABLES[name](draw).items()}
    return ImageDataset(name, digits, **tables)
