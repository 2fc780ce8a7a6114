"""Constraints on a reconstruction, for `geco_fast.GECO`.

Every module is called ``constraint(x, reconstruction, labels=None)`` and returns ``[B]``, at most 0
where the constraint is satisfied (Rezende and Viola, "Taming VAEs", 2018, table 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geco_fast import ops
from geco_fast._checks import check_choice, check_positive, check_rank, check_shape, describe
from geco_fast.ops.pncc import check_patches
from geco_fast.reference._precision import widen
from geco_fast.reference.pncc import extract_patches


class _Constraint(nn.Module):
    """A tolerance, and networks that are held fixed: no gradient, evaluation mode."""

    def __init__(self, kappa: float, **networks: nn.Module) -> None:
        super().__init__()
        check_positive("kappa", kappa)
        self.kappa = kappa
        for name, network in networks.items():
            if not isinstance(network, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {describe(network)}")
            self.add_module(name, network.requires_grad_(False).eval())

    def train(self, mode: bool = True) -> _Constraint:
        super().train(mode)
        for network in self.children():
            network.eval()
        return self

    def extra_repr(self) -> str:
        return f"kappa={self.kappa}"


class ReconstructionError(_Constraint):
    """Squared error less the squared tolerance.

    Parameters
    ----------
    kappa : float
        Tolerance above 0, in units of the data: the root mean square error per value that is
        allowed ("mean"), or the Euclidean norm of the whole error ("sum").
    reduction : {"mean", "sum"}
        Over all but the batch.

    Raises
    ------
    ValueError
        If `kappa` is not positive or `reduction` is unknown.
    """

    def __init__(self, kappa: float, reduction: str = "mean") -> None:
        super().__init__(kappa)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction

    def forward(self, x: Tensor, reconstruction: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``[B]``; both images ``[B, ...]``, of one shape and dtype."""
        return ops.squared_error(x, reconstruction, reduction=self.reduction) - self.kappa**2


class FeatureReconstructionError(_Constraint):
    """Squared error of features less the squared tolerance.

    Parameters
    ----------
    features : torch.nn.Module
        Maps images to ``[B, ...]``: part of a classifier, or `LocalStatistics`. It is held fixed:
        its parameters lose their gradient and it stays in evaluation mode.
    kappa : float
        Tolerance above 0, in units of the features, as in `ReconstructionError`.
    reduction : {"mean", "sum"}
        Over all but the batch.

    Raises
    ------
    ValueError
        If `kappa` is not positive or `reduction` is unknown.
    TypeError
        If `features` is not a module.
    """

    features: nn.Module

    def __init__(self, features: nn.Module, kappa: float, reduction: str = "mean") -> None:
        super().__init__(kappa, features=features)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction

    def forward(self, x: Tensor, reconstruction: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``[B]``; images as `features` takes them."""
        error = ops.squared_error(
            self.features(x), self.features(reconstruction), reduction=self.reduction
        )
        return error - self.kappa**2


class ClassificationAccuracy(_Constraint):
    """Tolerance less the probability that a classifier gives to the right class.

    Parameters
    ----------
    classifier : torch.nn.Module
        Maps images to logits ``[B, K]``. It is held fixed: its parameters lose their gradient and
        it stays in evaluation mode.
    kappa : float
        Probability in (0, 1] that the reconstruction's class must reach.

    Raises
    ------
    ValueError
        If `kappa` is not positive or above 1.
    TypeError
        If `classifier` is not a module.

    Notes
    -----
    The paper's table prints ``l^T c - kappa``; as a constraint ``<= 0`` it is ``kappa - l^T c``.
    """

    classifier: nn.Module

    def __init__(self, classifier: nn.Module, kappa: float) -> None:
        super().__init__(kappa, classifier=classifier)
        if kappa > 1:
            raise ValueError(f"kappa must be a probability, at most 1, got {kappa!r}")

    def forward(self, x: Tensor, reconstruction: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``[B]``; labels int64 ``[B]``."""
        if labels is None:
            raise ValueError("labels must be given, int64 [B], got None")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must have the dtype int64, got {labels.dtype}")
        (logits,) = widen(self.classifier(reconstruction))
        check_rank("the classifier's output", logits, (2,), "logits [B, K]")
        check_shape("labels", labels, logits.shape[:1], "one per image")
        return self.kappa - logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


class PatchNCC(_Constraint):
    """Tolerance less the normalised cross-correlation of patches, see `geco_fast.ops.pncc`.

    Parameters
    ----------
    kappa : float
        Correlation in (0, 1] that patches must reach.
    patch_size, stride : int or sequence of int
        One for all or one per spatial dimension.
    reduction : {"mean", "sum"}
        Over patches. The sum is that of the paper's table, ``sum_i (kappa - score_i)``.

    Raises
    ------
    ValueError
        If `kappa` is not positive or above 1, or `reduction` is unknown.
    """

    def __init__(
        self,
        kappa: float,
        patch_size: int | Sequence[int] = 8,
        stride: int | Sequence[int] = 1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(kappa)
        if kappa > 1:
            raise ValueError(f"kappa must be a correlation, at most 1, got {kappa!r}")
        check_choice("reduction", reduction, ("mean", "sum"))
        self.patch_size, self.stride, self.reduction = patch_size, stride, reduction

    def forward(self, x: Tensor, reconstruction: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``[B]``; both images ``[B, C, *S]``, of one shape and dtype."""
        mean = ops.pncc(x, reconstruction, self.patch_size, stride=self.stride, reduction="mean")
        if self.reduction == "mean":
            return self.kappa - mean
        sizes, strides = check_patches(x, self.patch_size, self.stride)
        grid = zip(x.shape[2:], sizes, strides, strict=True)
        return math.prod((s - size) // step + 1 for s, size, step in grid) * (self.kappa - mean)


class LocalStatistics(nn.Module):
    """Mean and standard deviation of every patch: features for `FeatureReconstructionError`.

    Parameters
    ----------
    patch_size : int or sequence of int
        One for all or one per spatial dimension.
    eps : float
        Added to the variance, in units of the data squared, so that flat patches have a finite
        gradient.

    Raises
    ------
    ValueError
        If `eps` is not positive.
    """

    def __init__(self, patch_size: int | Sequence[int], eps: float = 1e-6) -> None:
        super().__init__()
        check_positive("eps", eps)
        self.patch_size, self.eps = patch_size, eps

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, *S]`` to ``[B, 2C, *S']``: means, then standard deviations.

        Only patches inside the image count, at stride 1; 16-bit images give float32.
        """
        check_rank("x", x, (3, 4, 5), "[B, C, *S] with 1 to 3 spatial dimensions")
        size, stride = check_patches(x, self.patch_size, 1)
        (x,) = widen(x)
        axes = tuple(range(-len(size), 0))
        variance, mean = torch.var_mean(extract_patches(x, size, stride), axes, correction=0)
        return torch.cat([mean, torch.sqrt(variance + self.eps)], dim=1)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, eps={self.eps}"
