from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from geco_fast.experiments.metrics import Display, MetricsLog, read_metrics


def _row(step: int) -> dict[str, float]:
    return {"step": step, "seconds": 2.0 * step, "re": 1 / (3 * step)}


def test_rows_come_back_exactly(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(_row(step))
    log.close()
    columns = read_metrics(tmp_path / "metrics.csv")
    assert list(columns) == ["step", "seconds", "re"]
    assert np.array_equal(columns["re"], [1 / 3, 1 / 6, 1 / 9])


def test_a_resumed_log_is_cut_back_to_its_step(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(_row(step))
    log.close()
    path = tmp_path / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole + "4,8.0,0.0")

    log = MetricsLog(tmp_path, step=2)
    assert log.seconds == 4.0
    log.write(_row(3))
    log.close()
    assert path.read_text() == whole


def test_a_fresh_log_replaces_what_was_never_saved(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,seconds\n1,2.0\n")
    log = MetricsLog(tmp_path)
    log.write(_row(1))
    log.close()
    assert list(read_metrics(tmp_path / "metrics.csv")) == ["step", "seconds", "re"]


def test_plain_lines_name_what_matters(tiny):
    text = io.StringIO()
    row = {"step": 1, "re": 0.05, "kl": 3.0, "lambda_re": 2.0, "beta": 0.5}
    with Display(tiny, 0, console=Console(file=text, soft_wrap=True)) as display:
        display.show(row | {"images_per_second": 100.0})
    for part in ("step 1/6", "RE 0.05000 (kappa^2 0.01000)", "KL 3.0", "lambda 2", "beta 0.5"):
        assert part in text.getvalue()


def test_live_table_on_a_terminal(tiny):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160)
    row = {"step": 2, "re": 0.05, "kl": 3.0, "images_per_second": 100.0}
    with Display(tiny, 0, console=console) as display:
        display.show(row)
    assert "2/6" in text.getvalue()
    assert "kappa^2" in text.getvalue()
