"""Sizes of the models and lengths of their trainings, at both scales.

The paper gives the learning rates, alpha = 0.99 and the tolerances; every size is open there. The
small scale halves the images and is short: lambda then starts where long trainings arrive.
"""

from __future__ import annotations

from typing import Any

Options = dict[str, Any]

DRAW: dict[str, Options] = {
    "small": {
        "model": "convdraw",
        "image_size": 16,
        "hidden_channels": 16,
        "latent_channels": 4,
        "draw_steps": 4,
        "steps": 1600,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "lambda_init": 1000.0,
        "eval_images": 500,
    },
    "paper": {
        "model": "convdraw",
        "hidden_channels": 128,
        "latent_channels": 8,
        "draw_steps": 16,
        "steps": 1_000_000,
        "learning_rate": 1e-5,
        "alpha": 0.99,
        "batch_size": 64,
        "eval_images": 0,
        "checkpoint_every": 5000,
        "log_every": 200,
    },
}
NVP: dict[str, Options] = {
    "small": {
        "model": "nvp",
        "image_size": 16,
        "latent_features": 32,
        "hidden_features": 128,
        "steps": 7200,
        "learning_rate": 1e-3,
        "lambda_init": 300.0,
        "eval_images": 500,
    },
    "paper": {
        "model": "nvp",
        "latent_features": 64,
        "couplings": 8,
        "hidden_features": 512,
        "steps": 2_000_000,
        "learning_rate": 1e-6,
        "alpha": 0.99,
        "batch_size": 64,
        "eval_images": 0,
        "checkpoint_every": 5000,
        "log_every": 200,
    },
}
