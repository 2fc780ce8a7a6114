from __future__ import annotations

import pytest

from geco_fast.experiments import TrainConfig


@pytest.fixture
def tiny() -> TrainConfig:
    """A run of a second: 8x8 digits, a model of a few thousand parameters."""
    return TrainConfig(
        image_size=8,
        hidden_channels=4,
        latent_channels=2,
        draw_steps=2,
        latent_features=4,
        couplings=2,
        hidden_features=8,
        batch_size=8,
        steps=6,
        checkpoint_every=2,
        log_every=1,
        eval_images=16,
        threads=1,
        classifier_steps=5,
    )
