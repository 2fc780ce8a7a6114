from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from geco_fast.experiments import TrainConfig, plots


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_image_rows(tmp_path, channels):
    draw = torch.Generator().manual_seed(channels)
    rows = {
        "data": torch.rand(5, channels, 9, 7, generator=draw),
        "context": torch.rand(5, 2, 9, 7, generator=draw),
    }
    plots.image_rows(tmp_path / "rows.png", rows, "Images")
    with Image.open(tmp_path / "rows.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[1] > 1000
    assert pixels.min() < 30


@pytest.mark.parametrize("objective", ["geco", "elbo"])
def test_curves_and_plane(tmp_path, objective):
    config = TrainConfig(objective=objective, constraint=("re", "pncc"))
    columns = {"step": np.arange(1.0, 21.0)}
    names = ["re", "kl", "log_likelihood", "constraint_re", "constraint_pncc"]
    names += ["lambda_re", "lambda_pncc"] if objective == "geco" else []
    random = np.random.default_rng(0)
    columns |= {name: random.random(20) for name in names}
    for draw, name in ((plots.curves, "curves"), (plots.information_plane, "plane")):
        draw(tmp_path / f"{name}.png", columns, config)
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 400
