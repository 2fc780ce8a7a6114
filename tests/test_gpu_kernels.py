"""Triton's kernels compile for every architecture, and the page about them is theirs."""

from __future__ import annotations

from importlib.metadata import version

import pytest

pytest.importorskip("triton")
from geco_fast.bench import gpu_kernels


def check(rows: list[gpu_kernels.Row]) -> None:
    assert rows
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= gpu_kernels.SHARED_LIMIT, row


def test_main_cases_are_on_the_page() -> None:
    rows = gpu_kernels.compiled([gpu_kernels.SHOWN], every=False)
    check(rows)
    text = gpu_kernels.PAGE.read_text()
    assert f"Triton {version('triton')} " in text, "run `python -m geco_fast.bench.gpu_kernels`"
    for row in rows:
        line = " | ".join(map(str, gpu_kernels.resource_line(row)))
        assert line in text, "run `python -m geco_fast.bench.gpu_kernels`"


@pytest.mark.slow
@pytest.mark.parametrize("target", gpu_kernels.TARGETS)
def test_every_configuration_compiles(target: str) -> None:
    check(gpu_kernels.compiled([target], every=True))
