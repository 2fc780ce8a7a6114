"""GECO in a training loop of your own: a plain VAE on the built-in digits, held to kappa.

Watch lambda rise until the error is small enough, then fall while the KL shrinks.
Run: python examples/geco_in_your_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import geco_fast as gf

KAPPA = 0.15  # root mean square error per pixel that is allowed
EPOCHS = 20


class VAE(nn.Module):
    """Any model of yours that returns a reconstruction and a KL per image."""

    def __init__(self, pixels: int = 256, hidden: int = 128, latent: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.encoder(x).chunk(2, dim=1)
        z = mean + log_std.exp() * torch.randn_like(mean)
        kl = (0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std).sum(1)
        return self.decoder(z).view_as(x), kl


def main() -> None:
    """Train, then measure on held-out images."""
    torch.manual_seed(0)
    model = VAE()
    # The rate is per unit of the constraint, and a satisfied squared error is at most kappa^2.
    geco = gf.GECO(
        {"re": gf.constraints.ReconstructionError(KAPPA)},
        alpha=0.9,
        step_size=0.05 / KAPPA**2,
        max_log_step=0.05,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = DataLoader(gf.data.load("digits"), batch_size=64, shuffle=True, drop_last=True)

    for epoch in range(EPOCHS):
        for batch in loader:
            reconstruction, kl = model(batch["image"])
            values = geco.evaluate_constraints(batch["image"], reconstruction)
            loss = geco(kl, values)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 5 == 4:
            log = geco.log_dict()
            error = log["constraint/re"] + KAPPA**2
            print(
                f"epoch {epoch + 1:2}  error {error:.4f} (kappa^2 {KAPPA**2:.4f})  "
                f"KL {kl.mean():5.2f}  lambda {log['lambda/re']:6.0f}"
            )

    test = gf.data.load("digits", split="test")
    x = test.batch(range(len(test))).image
    with torch.no_grad():
        reconstruction, kl = model(x)
        error = gf.ops.squared_error(x, reconstruction).mean()
    print(f"held out  error / kappa^2 {error / KAPPA**2:.2f}  KL {kl.mean():.2f} nats per image")


if __name__ == "__main__":
    main()
