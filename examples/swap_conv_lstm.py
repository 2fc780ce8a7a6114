"""Take over the weights of a ConvLSTM cell written elsewhere, and compute the same.

`ConvLSTMCell.from_module` recognises a cell by its attributes and reorders gates and channels.
Run: python examples/swap_conv_lstm.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import geco_fast as gf


class Cell(nn.Module):
    """A common way to write it: one convolution over [x, h], gates in the order i, f, o, g."""

    def __init__(self, input_dim: int, hidden_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.conv = nn.Conv2d(
            input_dim + hidden_dim, 4 * hidden_dim, kernel_size, padding=kernel_size // 2
        )

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = self.conv(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


def main() -> None:
    """Run both cells over one sequence and compare states and gradients, in float64."""
    torch.manual_seed(0)
    theirs = Cell(3, 16, 5).double()
    ours = gf.nn.ConvLSTMCell.from_module(theirs)
    print(ours)

    frames = torch.randn(6, 2, 3, 12, 12, dtype=torch.float64)
    results = []
    for cell in (theirs, ours):
        x = frames.clone().requires_grad_()
        h = c = torch.zeros(2, 16, 12, 12, dtype=torch.float64)
        for frame in x:
            h, c = cell(frame, (h, c))
        (h * c).sum().backward()
        results.append({"h": h, "c": c, "gradient": x.grad})
    for name, wanted in results[0].items():
        got = results[1][name]
        torch.testing.assert_close(got, wanted)
        print(f"{name}: largest difference {(got - wanted).abs().max():.1e}")


if __name__ == "__main__":
    main()
