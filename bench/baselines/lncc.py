"""Squared local cross-correlation of the registration libraries."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from geco_fast.bench.rivals import Rival
from geco_fast.testing.cases import Case


def _reduced(case: Case, scores: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Scores ``[B, C, *S]`` reduced to the result's shape, by the case's `reduction`."""
    (result,) = case.define(case.tensors(torch.float32))
    reduction = case.options.get("reduction", "none")

    def call(x: Tensor, y: Tensor) -> Tensor:
        found = scores(x, y)
        if reduction == "none":
            return found
        return getattr(found, reduction)(tuple(range(result.dim(), found.dim())))

    return call


def _square(case: Case) -> bool:
    """Whether all sides of the window are as long, which is all that they take."""
    return isinstance(case.options.get("kernel_size", 3), int)


def _class(module: str) -> Callable[[Case], Callable[..., Tensor]]:
    """MONAI's class, or FireANTs' of the same arguments."""

    def build(case: Case) -> Callable[..., Tensor]:
        loss = importlib.import_module(module).LocalNormalizedCrossCorrelationLoss(
            spatial_dims=len(case.shapes["x"]) - 2,
            kernel_size=case.options.get("kernel_size", 3),
            kernel_type="rectangular",
            reduction="none",
            smooth_nr=case.options.get("smooth_nr", 0.0),
            smooth_dr=case.options.get("smooth_dr", 1e-5),
        )
        return _reduced(case, lambda x, y: -loss(x, y))

    return build


def _neurite(case: Case) -> Callable[..., Tensor]:
    from neurite.nn.functional import ncc

    size, eps = case.options.get("kernel_size", 3), case.options.get("smooth_dr", 1e-5)

    # Means of each image's channel are the finest that it returns.
    return _reduced(case, lambda x, y: ncc(x, y, window_size=size, eps=eps, reduction=None))


NOTE = "E[x^2] - E[x]^2, held to 1e-3 instead of the accuracy rule"
RIVALS = {
    "MONAI": Rival(_class("monai.losses"), _square, 1e-3, NOTE),
    "FireANTs": Rival(_class("fireants.losses.cc"), _square, 1e-3, f"unfused; {NOTE}"),
    "neurite": Rival(
        _neurite,
        lambda case: _square(case) and case.options.get("reduction") == "mean",
        1e-3,
        NOTE,
    ),
}
