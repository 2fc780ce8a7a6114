"""Small image classifier, for the constraints that need one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from geco_fast._checks import check_count
from geco_fast.nn._arguments import check_batch, check_image_shape
from geco_fast.nn.conv import Conv2d


class Classifier(nn.Module):
    """Convolutional classifier whose features and labels serve as constraints.

    Parameters
    ----------
    image_shape : (int, int, int)
        ``(C, H, W)``, with H and W at least 4.
    num_classes : int
        Number of classes.
    hidden_channels : int
        Channels of the first convolution; the features have twice as many.

    Attributes
    ----------
    features : Module
        ``[B, C, H, W]`` to ``[B, 2 * hidden_channels, H // 4, W // 4]``.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its range.

    Examples
    --------
    >>> import torch, geco_fast as gf
    >>> gf.nn.Classifier((1, 28, 28), 10)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, image_shape: Sequence[int], num_classes: int, *, hidden_channels: int = 32
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape("image_shape", image_shape, least=4)
        self.num_classes = check_count("num_classes", num_classes)
        hidden = check_count("hidden_channels", hidden_channels)
        channels, height, width = self.image_shape
        self.features = nn.Sequential(
            Conv2d(channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            Conv2d(hidden, 2 * hidden, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(2 * hidden * (height // 4) * (width // 4), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, C, H, W]``."""
        check_batch("x", x, self.image_shape, "image_shape")
        return self.head(self.features(x).flatten(1))
