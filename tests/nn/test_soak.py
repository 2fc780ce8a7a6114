"""Long training, for what a short one doesn't show."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn

import geco_fast as gf

STEPS, SETTLED = 2000, 400
MODELS = {
    "ConvDraw": lambda: gf.nn.ConvDraw((1, 16, 16), hidden_channels=16, steps=3, downsample=2),
    "recomputing": lambda: gf.nn.ConvDraw(
        (1, 16, 16), hidden_channels=16, steps=3, downsample=2, recompute=True
    ),
    "VAE+NVP": lambda: gf.nn.NVPVAE((1, 16, 16), couplings=4, hidden_features=(64, 64)),
    "reversible": lambda: gf.nn.NVPVAE(
        (1, 16, 16), couplings=4, hidden_features=(64, 64), reversible=True
    ),
}


def resident_bytes() -> int:
    """What the process holds once glibc has given back what it only keeps at hand."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", MODELS)
def test_memory_does_not_grow(name: str) -> None:
    torch.manual_seed(0)
    make: Callable[[], nn.Module] = MODELS[name]
    model = make()
    geco = gf.GECO({"re": gf.constraints.ReconstructionError(0.1)}, step_size=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    held = []
    for step in range(STEPS):
        x = torch.rand(8, 1, 16, 16)
        output = model(x)
        loss = geco(output.kl, geco.evaluate_constraints(x, output.reconstruction))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= SETTLED and step % 100 == 0:
            held.append(resident_bytes())
    assert loss.isfinite()
    # A leak grows steadily; less than 700 bytes a step. What is loaded late comes once.
    growth = [after - before for before, after in pairwise(held)]
    assert median(growth) < 2**16, growth
