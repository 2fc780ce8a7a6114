"""Triton's kernels compile for every architecture, and the page about them is theirs."""

from __future__ import annotations

from importlib.metadata import version

import pytest

pytest.importorskip("triton")
from geco_fast.bench import gpu_kernels

MEND = "run `python -m geco_fast.bench.gpu_kernels`"


def test_page_is_about_this_code() -> None:
    text = gpu_kernels.PAGE.read_text()
    assert f"Triton {version('triton')} " in text, MEND
    assert f"`{gpu_kernels.fingerprint()}`" in text, MEND


def test_main_cases_are_on_the_page() -> None:
    rows = gpu_kernels.compiled([gpu_kernels.SHOWN])
    assert rows
    text = gpu_kernels.PAGE.read_text()
    for row in rows:
        assert row["shared"] <= gpu_kernels.SHARED_LIMIT, row
        assert row["spilled"] == 0, row
        assert " | ".join(map(str, gpu_kernels.resource_line(row))) in text, MEND
