"""Local normalised cross-correlation as a loss."""

from __future__ import annotations

from torch import Tensor, nn

from geco_fast import ops
from geco_fast._checks import check_choice, check_positive, check_rank
from geco_fast.ops.pncc import check_kernel_size


class LNCCLoss(nn.Module):
    """Squared correlation of two images window by window, negated: -1 where they agree.

    Equal to MONAI's ``LocalNormalizedCrossCorrelationLoss`` with ``kernel_type="rectangular"``, but
    for the default of `spatial_dims`.

    Parameters
    ----------
    spatial_dims : int
        1, 2 or 3.
    kernel_size : int
        Side of the window, odd; the images have zeros around them.
    reduction : {"mean", "sum", "none"}
        Over batch, channels and pixels.
    smooth_nr, smooth_dr : float
        Added to the numerator, and the least sum of squares in the denominator, not negative.

    Raises
    ------
    ValueError
        If an option is out of its range.
    TypeError
        If an option has the wrong type.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> loss = gf.nn.LNCCLoss(kernel_size=9)
    >>> x = torch.rand(2, 1, 32, 32)
    >>> loss(x, 0.5 * x).round(decimals=3)
    tensor(-1.)
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        kernel_size: int = 3,
        *,
        reduction: str = "mean",
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
    ) -> None:
        super().__init__()
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims!r}")
        check_kernel_size(kernel_size)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_positive("smooth_nr", smooth_nr, zero=True)
        check_positive("smooth_dr", smooth_dr, zero=True)
        self.spatial_dims, self.kernel_size, self.reduction = spatial_dims, kernel_size, reduction
        self.smooth_nr, self.smooth_dr = float(smooth_nr), float(smooth_dr)

    def extra_repr(self) -> str:
        """Options, as `repr` shows them."""
        return (
            f"spatial_dims={self.spatial_dims}, kernel_size={self.kernel_size}, "
            f"reduction={self.reduction!r}, smooth_nr={self.smooth_nr}, smooth_dr={self.smooth_dr}"
        )

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return a scalar, or ``[B, C, *S]`` for "none"; images ``[B, C, *S]``, alike."""
        axes = "BC" + "DHW"[3 - self.spatial_dims :]
        layout = f"[{', '.join(axes)}]"
        check_rank("prediction", prediction, (2 + self.spatial_dims,), layout)
        scores = ops.lncc(
            prediction,
            target,
            self.kernel_size,
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
            reduction=self.reduction,
        )
        if self.reduction == "none":
            return -scores
        return -(scores.mean() if self.reduction == "mean" else scores.sum())
