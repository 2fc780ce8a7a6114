"""The experiments end to end, at a size of seconds, on the built-in digits."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from geco_fast.cli.main import cli
from geco_fast.experiments import Interrupted, TrainConfig, plots
from geco_fast.experiments.paper import (
    EXPERIMENTS,
    SCALES,
    fig2,
    fig3,
    fig4,
    fig5,
    fig6,
    fig7,
    run_experiment,
    side_by_side,
    study,
    table2,
)
from geco_fast.experiments.paper.study import Study
from geco_fast.nn import ConditionalRealNVP
from geco_fast.nn.real_nvp import standard_normal_log_prob

SHORT: dict[str, Any] = {
    **{"image_size": 8, "batch_size": 8, "steps": 4, "log_every": 1, "eval_images": 16},
    "classifier_steps": 2,
}
DRAW = {"model": "convdraw", "hidden_channels": 4, "latent_channels": 2, "draw_steps": 2, **SHORT}
NVP = {"model": "nvp", "latent_features": 4, "couplings": 2, "hidden_features": 8, **SHORT}
TINY: dict[str, Any] = {
    "fig2": fig2.Config(points=16, side=4, betas=12, seeds=(0,), shown=(0.01, 0.3)),
    "fig3": fig3.Config(draw=DRAW),
    "fig4": fig4.Config(
        unconditional=("mnist", "cifar10"), conditional=("mnist-sum",), draw=DRAW, nvp=NVP
    ),
    "fig5": fig5.Config(seeds=(0,), draw=DRAW),
    "fig6": fig6.Config({"mnist": ({}, {"re": 0.1, "cla": 0.9})}, shown=4, draw=DRAW),
    "fig7": fig7.Config(points=20, side=4, steps=5, seeds=(0,)),
    "table2": table2.Config(data=("color-mnist",), seeds=(0,), images=20, samples=10, nvp=NVP),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pictures of each training take longer than it does.
    for picture in ("curves", "information_plane", "image_rows"):
        monkeypatch.setattr(plots, picture, lambda *_: None)
    for name, config in TINY.items():
        found = dataclasses.replace(EXPERIMENTS[name], scales=dict.fromkeys(SCALES, config))
        monkeypatch.setitem(EXPERIMENTS, name, found)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, so that trainings that several experiments want are run once."""
    return tmp_path_factory.mktemp("paper")


def no_more(*_: Any, **__: Any) -> None:
    raise AssertionError("done before")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_writes_its_results(
    name: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    claims = run_experiment(name, shared, threads=1, command="the command", say=said.append)
    folder = shared / name
    content = json.loads((folder / "results.json").read_text())
    assert [claim["verdict"] for claim in content["claims"]] == [c.verdict for c in claims]
    assert content["command"] == "the command"
    assert content["versions"]["torch"] == torch.__version__
    assert content["config"] == json.loads(json.dumps(dataclasses.asdict(TINY[name])))
    assert content["digits"] == "digits"
    header, *lines = (folder / "results.csv").read_text().splitlines()
    assert len(lines) == len(content["rows"]) > 0
    assert set(header.split(",")) == {key for row in content["rows"] for key in row}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "figure.svg").read_text()
    left_out = "  cifar10 is left out: its files are not in --data-root"
    assert (left_out in said) == (name == "fig4")

    # A second call takes what is there, and says the same.
    monkeypatch.setattr(side_by_side, "train", no_more)
    for module, work in ((fig2, "iterate"), (fig7, "iterate"), (table2, "marginal_kl")):
        monkeypatch.setattr(module, work, no_more)
    assert run_experiment(name, shared, threads=1, say=said.append) == claims


def test_trainings_are_shared_and_told_apart(shared: Path) -> None:
    config = TrainConfig(**DRAW)
    first, again = Study(shared, "one", threads=1, say=lambda _: None).train([config, config])
    (same,) = Study(shared, "two", threads=1, say=no_more).train([config])
    assert same.folder == first.folder == again.folder
    other = dataclasses.replace(config, seed=1)
    assert study._name(other) != study._name(config)


def test_an_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def interrupted(config: TrainConfig, out: Path, *, resume: bool) -> None:
        calls.append(resume)
        (out / "checkpoints" / "step-00000002").mkdir(parents=True, exist_ok=True)
        raise Interrupted(signal.SIGINT, "stopped at step 2; to go on: geco-fast train --resume")

    monkeypatch.setattr(side_by_side, "train", interrupted)
    for _ in range(2):
        with pytest.raises(Interrupted, match="stopped at step 2; to go on: the same command"):
            run_experiment("fig3", tmp_path, threads=1, say=lambda _: None)
    assert calls == [False, True]


def test_finished_parts_are_kept(tmp_path: Path) -> None:
    ours = Study(tmp_path, "x", "key", say=lambda _: None)
    first = ours.part("a", lambda: {"b": [1.0, 2.0]})
    np.testing.assert_array_equal(first["b"], [1.0, 2.0])
    assert ours.part("a", no_more)["b"].tolist() == [1.0, 2.0]  # type: ignore[arg-type]
    # Those of another configuration are not taken.
    other = Study(tmp_path, "x", "other", say=lambda _: None)
    assert other.part("a", lambda: {"b": 3.0})["b"] == 3.0


def test_marginal_kl_is_that_of_all_pairs() -> None:
    torch.manual_seed(0)
    flow = ConditionalRealNVP(4, 3, couplings=2, hidden_features=(8,)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(0, 0.3)
    features, noise = torch.randn(12, 3).double(), torch.randn(7, 4).double()
    average, marginal = table2.marginal_kl(flow, features, noise, pairs=30)
    with torch.no_grad():
        z, log_q = flow.sample_and_log_prob(features[:7], noise=noise)
        pairs = torch.stack([flow.log_prob(z, row.expand(7, 3)) for row in features], 1)
    log_prior = standard_normal_log_prob(z)
    wanted = (pairs.logsumexp(1) - math.log(12) - log_prior).mean().item()
    assert marginal == pytest.approx(wanted, rel=1e-9)
    assert average == pytest.approx((log_q - log_prior).mean().item(), rel=1e-9)
    assert average - marginal <= math.log(12)
    # Where nothing tells the images apart, their mixture is each one's posterior.
    average, marginal = table2.marginal_kl(flow, features[:1].expand(12, 3), noise)
    assert average == pytest.approx(marginal, rel=1e-9)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["experiment", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    result = invoke("fig7", "--out", tmp_path, "--threads", 1)
    assert result.exit_code == 0, result.output
    for part in ("about a minute on two cores", "fig7: fixed points", "thin manifolds: "):
        assert part in result.output
    content = json.loads((tmp_path / "fig7" / "results.json").read_text())
    assert content["command"] == "geco-fast experiment fig7"
    assert "full size" in invoke("fig7", "--scale", "paper", "--out", tmp_path).output


def test_seeds_are_chosen(shared: Path) -> None:
    result = invoke("fig6", "--out", shared, "--threads", 1, "--seeds", 2)
    assert result.exit_code == 0, result.output
    assert "about 4 minutes on two cores" in result.output
    content = json.loads((shared / "fig6" / "results.json").read_text())
    assert content["command"] == "geco-fast experiment fig6 --seeds 2"
    assert content["config"]["seeds"] == [0, 1]
    assert {row["seed"] for row in content["rows"]} == {0, 1}
    assert invoke("fig6", "--seeds", 0).exit_code == 2
    with pytest.raises(ValueError, match="seeds must be >= 1, got 0"):
        run_experiment("fig6", shared, seeds=0)


def test_command_runs_all(shared: Path) -> None:
    result = invoke("all", "--out", shared, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert all(f"{name}: " in result.output for name in EXPERIMENTS)


def test_command_errors_are_one_line(tmp_path: Path) -> None:
    assert invoke("fig9").exit_code == 2
    file = tmp_path / "file"
    file.write_text("")
    result = invoke("fig7", "--out", file / "below")
    assert result.exit_code == 2
    assert result.output.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.output
