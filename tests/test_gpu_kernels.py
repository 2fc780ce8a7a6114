"""Triton's kernels compile for every architecture, and the page about them is theirs."""

from __future__ import annotations

from importlib.metadata import version

import pytest

pytest.importorskip("triton")
from geco_fast.bench import gpu_kernels


def test_main_cases_are_on_the_page() -> None:
    rows = gpu_kernels.compiled([gpu_kernels.SHOWN])
    assert rows
    text = gpu_kernels.PAGE.read_text()
    assert f"Triton {version('triton')} " in text, "run `python -m geco_fast.bench.gpu_kernels`"
    for row in rows:
        assert row["shared"] <= gpu_kernels.SHARED_LIMIT, row
        line = " | ".join(map(str, gpu_kernels.resource_line(row)))
        assert line in text, "run `python -m geco_fast.bench.gpu_kernels`"
