from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import geco_fast
from geco_fast.bench import limits, report, results
from geco_fast.cli.main import cli
from geco_fast.experiments import TrainConfig, checkpoint, plots

ROOT = report.ROOT

TINY = [
    *("--image-size", "8", "--hidden-channels", "4", "--latent-channels", "2"),
    *("--draw-steps", "2", "--batch-size", "8", "--steps", "3"),
    *("--log-every", "1", "--eval-images", "16"),
]


def _run(*arguments: object):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Pictures take longer than these runs; only the shared run draws them."""
    for name in ("curves", "information_plane", "image_rows"):
        monkeypatch.setattr(plots, name, lambda *_: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    result = _run("train", *TINY, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_help_names_every_option_and_its_default():
    text = " ".join(_run("train", "--help").output.split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    for default in ("[default: convdraw]", "[default: 32", "[default: re]", "[default: 0.9"):
        assert default in text
    for command in ("train", "evaluate"):
        assert command in _run("--help").output
        assert _run(command, "-h").exit_code == 0


def test_a_run_prints_its_summary(trained):
    out, output = trained
    for part in ("squared error per pixel", "error / kappa^2", "lambda re", f"is in {out}"):
        assert part in output


def test_evaluate_repeats_the_summary(trained):
    out, _ = trained
    result = _run("evaluate", out, "--images", 16, "--json")
    assert result.exit_code == 0, result.output
    measured = json.loads(result.output)
    assert measured.pop("step") == 3
    assert measured == json.loads((out / "summary.json").read_text())["held_out"]
    assert "squared error per pixel" in _run("evaluate", out, "--images", 16).output


def test_resume_needs_no_options(trained):
    out, _ = trained
    result = _run("train", "--resume", "--out", out, "--steps", 4)
    assert result.exit_code == 0, result.output
    assert checkpoint.latest(out / "checkpoints").name == "step-00000004"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--stepz", "3"], "No such option"),
        (["train", "--steps", "x"], "not a valid integer"),
        (["train", "--steps", "0"], "steps must be >= 1"),
        (["train", "--model", "gan"], "'gan' is not one of"),
        (["train", "--kappa", "-1"], "kappa of re must be > 0"),
        (["train", "--constraint", "re", "--kappa", "1", "--kappa", "2"], "kappa must be given"),
        (["train", "--data-root", "/nowhere/at/all"], "does not exist"),
        (["train", "--data", "mnist", "--out", "OUT"], "--data-root names the folder"),
        (["train", "--image-size", "15", "--out", "OUT"], "downsample=2"),
        (["train", "--resume", "--out", "OUT"], "holds no run"),
        (["evaluate", "OUT/absent"], "does not exist"),
        (["evaluate", "OUT"], "holds no run"),
        (["teach"], "No such command"),
    ],
)
def test_a_mistake_is_one_clear_line_and_status_2(tmp_path, arguments, message):
    result = _run(*(argument.replace("OUT", str(tmp_path)) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_damaged_checkpoint_is_named(tmp_path, command):
    assert _run("train", *TINY, "--out", tmp_path / "run").exit_code == 0
    folder = checkpoint.latest(tmp_path / "run" / "checkpoints")
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    options = {"train": ["--resume", "--out"], "evaluate": []}[command]
    result = _run(command, *options, tmp_path / "run")
    assert result.exit_code == 2
    assert str(folder) in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_missing_library_names_the_extra():
    code = "import sys; sys.modules['rich'] = None; from geco_fast.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'geco-fast[train]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_info_prints_what_the_package_knows():
    result = _run("info")
    assert result.exit_code == 0
    assert result.output == geco_fast.info() + "\n"


def test_bench_prints_a_table_and_keeps_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "COPIED_BYTES", 2**20)
    path, chart = tmp_path / "results.json", tmp_path / "speed.svg"
    options = ["--op", "lstm_gates", "--case", "batch-1", "--pairs", 3, "--seconds", 0.5]
    options += ["--json", path]
    result = _run("bench", *options, "--against", "self", "--threads", 1, "--threads", 2)
    assert result.exit_code == 0, result.output
    kept = results.read(path)
    assert {(row.direction, row.threads) for row in kept.rows} == {
        (direction, threads) for direction in ("forward", "forward+backward") for threads in (1, 2)
    }
    assert [run["torch"] for run in kept.runs] == [torch.__version__]
    for row in kept.rows:
        assert row.case in result.output
    result = _run("bench", *options, "--against", "eager", "--chart", chart)
    assert result.exit_code == 0, result.output
    again = results.read(path)
    assert again.rows[: len(kept.rows)] == kept.rows
    assert {row.rival for row in again.rows} == {"self", "eager"}
    assert "against eager" in chart.read_text()


def test_bench_refuses_a_wrong_result(monkeypatch):
    def wrong(gates, c):
        return tuple(1.01 * result for result in geco_fast.reference.lstm_gates(gates, c))

    monkeypatch.setattr(geco_fast.ops, "lstm_gates", wrong)
    result = _run("bench", "--op", "lstm_gates", "--case", "batch-1", "--against", "eager")
    assert result.exit_code == 2
    assert "no time for a wrong result" in result.output
    assert "Traceback" not in result.output


def test_bench_renders_documents(tmp_path, monkeypatch):
    for name in ("ROOT", "RESULTS", "CHART"):
        path = getattr(report, name)
        monkeypatch.setattr(report, name, tmp_path / path.relative_to(ROOT))
    report.RESULTS.mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "<!-- results: none.json headline -->\n<!-- end of results -->\n"
    )
    result = _run("bench", "--render")
    assert result.output.splitlines() == ["wrote README.md", "wrote docs/speed.svg"]
    assert report.NONE_YET in (tmp_path / "README.md").read_text()
    assert _run("bench", "--render").output == ""
    report.RESULTS.rmdir()
    assert "--render works in a checkout" in _run("bench", "--render").output
