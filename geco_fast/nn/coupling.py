"""Affine coupling layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from geco_fast import ops
from geco_fast._checks import check_choice, check_count, check_positive
from geco_fast.nn._arguments import check_batch
from geco_fast.ops._coupling_layer import Coupling, coupling_layer, join, project, split
from geco_fast.reference.affine_coupling import SCALE_MAPS
from geco_fast.reference.coupling_mlp import ACTIVATIONS


class Conditioner(NamedTuple):
    """Parameters of a coupling layer's conditioner."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    context_weight: Tensor | None


class AffineCoupling(nn.Module):
    r"""Affine coupling layer, conditional or not.

    The features are split in two; one part passes unchanged and decides how the other is scaled and
    shifted: :math:`y_2 = x_2 \exp(s(x_1, v)) + t(x_1, v)`, with :math:`s, t` a chain of linear
    layers. The first part has ``features // 2`` features.

    Parameters
    ----------
    features : int
        Number of features, at least 2.
    context_features : int
        Features of the context `v`; 0 for none. It enters through a linear layer of its own,
        `context_projection`, added before the first activation.
    hidden_features : sequence of int
        Widths of the hidden layers, at least one.
    scale_map : {"tanh", "atan", "exp", "sigmoid"}
        How the scale is bounded, and `clamp` its bound; see `geco_fast.ops.affine_coupling`.
    clamp : float
        Bound of ``s`` for "tanh" and "atan".
    mask : {"first", "second"}
        Which part passes unchanged.
    activation : str
        Hidden activation; see `geco_fast.ops.coupling_mlp`.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its range.

    Notes
    -----
    Dinh et al., "Density estimation using Real NVP" (2017), eq. 7 and 8. The last linear layer
    starts at zero, so that a fresh layer is the identity (but for "sigmoid").

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> layer = gf.nn.AffineCoupling(6, context_features=3, hidden_features=(32,))
    >>> y, log_det = layer(torch.randn(4, 6), torch.randn(4, 3))
    >>> y.shape, log_det.shape
    (torch.Size([4, 6]), torch.Size([4]))
    """

    def __init__(
        self,
        features: int,
        *,
        context_features: int = 0,
        hidden_features: Sequence[int] = (512, 512),
        scale_map: str = "tanh",
        clamp: float = 2.0,
        mask: str = "first",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.features = check_count("features", features, least=2)
        self.context_features = check_count("context_features", context_features, least=0)
        hidden = tuple(hidden_features)
        if not hidden:
            raise ValueError("hidden_features must name at least one hidden layer, got none")
        for i, width in enumerate(hidden):
            check_count(f"hidden_features[{i}]", width)
        check_choice("scale_map", scale_map, SCALE_MAPS)
        check_positive("clamp", clamp)
        check_choice("mask", mask, ("first", "second"))
        check_choice("activation", activation, ACTIVATIONS)
        self.scale_map = scale_map
        self.clamp = clamp
        self.mask = mask
        self.activation = activation

        first = features // 2
        kept = first if mask == "first" else features - first
        widths = (kept, *hidden, 2 * (features - kept))
        layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.layers: Sequence[nn.Linear] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.context_projection: nn.Linear | None = None
        if context_features:
            self.context_projection = nn.Linear(context_features, hidden[0], bias=False)

    def extra_repr(self) -> str:
        return f"{self.features}, mask={self.mask!r}, scale_map={self.scale_map!r}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x`` to ``y``.

        Parameters
        ----------
        x : Tensor
            ``[B, features]``.
        context : Tensor, optional
            ``[B, context_features]``; required where the layer has context features.

        Returns
        -------
        y : Tensor
            ``[B, features]``.
        log_det : Tensor
            Log determinant of the Jacobian, ``[B]``.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype is wrong, or the context is missing or unexpected.
        """
        self.check("x", x, context)
        return self.transform(x, context, self.conditioner(), inverse=False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``y`` back to ``x``, as `forward` otherwise; `log_det` is of this direction."""
        self.check("y", y, context)
        return self.transform(y, context, self.conditioner(), inverse=True)

    def check(self, name: str, x: Tensor, context: Tensor | None) -> None:
        """Raise unless the input, called ``name``, and the context fit the layer."""
        batch = check_batch(name, x, (self.features,), "features")
        if (context is None) != (self.context_features == 0):
            wanted = "be None" if context is not None else "be given"
            raise ValueError(
                f"context must {wanted} where context_features is {self.context_features}"
            )
        if context is not None:
            why = f"context_features, one row for each of {name}"
            check_batch("context", context, (self.context_features,), why, batch=batch)

    def conditioner(self) -> Conditioner:
        """The parameters that `transform` takes."""
        return Conditioner(
            tuple(layer.weight for layer in self.layers),
            tuple(layer.bias for layer in self.layers),
            None if self.context_projection is None else self.context_projection.weight,
        )

    def transform(
        self, x: Tensor, context: Tensor | None, conditioner: Conditioner, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """`forward` or `inverse` with these parameters, unchecked."""
        weights, biases, context_weight = conditioner
        keeps_second = self.mask == "second"
        coupling = Coupling(self.activation, keeps_second, inverse, self.scale_map, self.clamp)
        return coupling_layer(x, context, context_weight, weights, biases, coupling)

    def scale_and_shift(
        self, kept: Tensor, context: Tensor | None, conditioner: Conditioner
    ) -> tuple[Tensor, ...]:
        """`log_scale` and `shift` of the changed part, given the kept one."""
        weights, biases, context_weight = conditioner
        projection = project(context, context_weight)
        return ops.coupling_mlp(
            kept, projection, weights, biases, activation=self.activation
        ).chunk(2, dim=1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept and the changed part."""
        return split(x, self.mask == "second")

    def join(self, kept: Tensor, changed: Tensor) -> Tensor:
        """The inverse of `split`."""
        return join(kept, changed, self.mask == "second")
