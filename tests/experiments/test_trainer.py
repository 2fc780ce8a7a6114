from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from geco_fast import constraints, nn
from geco_fast.experiments import (
    TrainConfig,
    TrainError,
    checkpoint,
    evaluate,
    plots,
    train,
    trainer,
)
from geco_fast.experiments.config import KAPPAS
from geco_fast.experiments.distributed import World
from geco_fast.experiments.metrics import TIME_COLUMNS, read_metrics
from geco_fast.experiments.run import Run, batch_indices
from geco_fast.objectives import OBJECTIVES

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, None)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
FILES = {
    "checkpoints",
    "config.json",
    "curves.png",
    "information_plane.png",
    "metrics.csv",
    "reconstructions.png",
    "samples.png",
    "summary.json",
    "tensorboard",
}


def _state(out):
    return checkpoint.load(checkpoint.latest(out / "checkpoints"), CPU)[0]


def _rows(out):
    """The metrics as text, but for the columns that hold times."""
    with (out / "metrics.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    kept = [i for i, name in enumerate(header) if name not in TIME_COLUMNS]
    return [[row[i] for i in kept] for row in (header, *rows)]


def _assert_same_run(out, other):
    state, expected = _state(out), _state(other)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert _rows(out) == _rows(other)


def _options(config: TrainConfig) -> list[str]:
    given = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            for item in value if isinstance(value, tuple) else (value,):
                given += [f"--{field.name.replace('_', '-')}", str(item)]
    return given


def _command(out, config: TrainConfig | None = None, *more: str) -> list[str]:
    options = [] if config is None else _options(config)
    return ["-m", "geco_fast", "train", "--out", str(out), *options, *more]


def _start(*arguments: str, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def _wait_for_checkpoint(process: subprocess.Popen, out, step: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        folder = checkpoint.latest(out / "checkpoints")
        if folder is not None and int(folder.name.removeprefix("step-")) >= step:
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"no checkpoint of step {step}: {process.communicate()}")


@pytest.fixture(autouse=True)
def _fewer_pictures(request, monkeypatch):
    """Pictures take longer than these runs, so only tests that look for them draw them."""
    if "pictures" not in request.node.name:
        for name in ("curves", "information_plane", "image_rows"):
            monkeypatch.setattr(plots, name, lambda *_: None)


def test_a_run_writes_its_folder_and_pictures(tmp_path, tiny):
    summary = train(tiny, tmp_path)
    assert set(os.listdir(tmp_path)) == FILES
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model", ["convdraw", "nvp"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, tiny, model, objective):
    config = dataclasses.replace(tiny, model=model, objective=objective)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(config, straight)
    train(dataclasses.replace(config, steps=3), resumed)
    train(config, resumed, resume=True)

    _assert_same_run(resumed, straight)
    columns = read_metrics(straight / "metrics.csv")
    assert np.array_equal(columns["step"], np.arange(1, 7))
    assert all(np.isfinite(column).all() for column in columns.values())
    assert ("lambda_re" in columns) == (objective == "geco")


@pytest.mark.parametrize("name", KAPPAS)
def test_each_constraint_trains_and_moves_its_lambda(tmp_path, tiny, name):
    config = dataclasses.replace(tiny, constraint=(name,), steps=4)
    summary = train(config, tmp_path)
    assert summary["held_out"]["constraints"].keys() == {name}
    columns = read_metrics(tmp_path / "metrics.csv")
    moved = np.sign(np.diff(np.log(columns[f"lambda_{name}"])))
    assert np.abs(moved).any()
    assert (tmp_path / "classifier.safetensors").exists() == (name in ("fre", "cla"))
    assert evaluate(tmp_path, images=16)["kl"] == summary["held_out"]["kl"]


def test_several_constraints_each_have_their_lambda(tmp_path, tiny):
    config = dataclasses.replace(tiny, constraint=("re", "pncc"), kappa=(0.2, 0.5), steps=2)
    train(config, tmp_path)
    columns = read_metrics(tmp_path / "metrics.csv")
    assert {"lambda_re", "lambda_pncc", "constraint_re", "constraint_pncc"} <= columns.keys()
    assert "beta" not in columns


@pytest.mark.parametrize("model", ["convdraw", "nvp"])
@pytest.mark.parametrize("data", ["color-mnist", "mnist-sum", "mnist-sum-hard", "mnist-rotate"])
def test_derived_data_without_a_download(tmp_path, tiny, model, data):
    config = dataclasses.replace(tiny, model=model, data=data, data_base="digits", steps=1)
    summary = train(config, tmp_path)
    assert summary["step"] == 1


@pytest.mark.parametrize("data", ["mnist", "cifar10", "mnist-rotate"])
def test_files_of_the_user(tmp_path, tiny, data_root, data):
    config = dataclasses.replace(tiny, data=data, data_root=str(data_root), steps=1)
    train(config, tmp_path / "run")
    moved = tmp_path / "moved"
    moved.symlink_to(data_root)
    assert evaluate(tmp_path / "run", images=8, data_root=str(moved))["images"] == 8


def test_a_finished_run_can_be_resumed_and_extended(tmp_path, tiny):
    train(tiny, tmp_path)
    before = _rows(tmp_path)
    train(tiny, tmp_path, resume=True)
    assert _rows(tmp_path) == before
    train(dataclasses.replace(tiny, steps=8), tmp_path, resume=True)
    assert len(_rows(tmp_path)) == len(before) + 2
    with pytest.raises(TrainError, match="steps must be >= 8"):
        train(tiny, tmp_path, resume=True)


def test_a_refused_resumption_leaves_the_run_as_it_was(tmp_path, tiny):
    train(tiny, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(TrainError, match="steps must be >="):
        train(dataclasses.replace(tiny, steps=1), tmp_path, resume=True)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(("trained", "message"), [(False, "nothing to save"), (True, "--resume")])
def test_an_interruption_outside_the_loop_says_how_to_go_on(
    tmp_path, tiny, monkeypatch, trained, message
):
    if trained:
        train(tiny, tmp_path)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "Run", interrupt)
    with pytest.raises(trainer.Interrupted, match=message):
        train(tiny, tmp_path, resume=trained)


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path, tiny):
    train(tiny, tmp_path)
    with pytest.raises(TrainError, match="holds a run already"):
        train(tiny, tmp_path)
    with pytest.raises(TrainError, match="cannot resume with seed 1"):
        train(dataclasses.replace(tiny, seed=1), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "mnist"}, "--data-root"),
        ({"data": "mnist", "data_root": "absent"}, "absent"),
        ({"downsample": 3}, "downsample=3"),
        ({"device": "cuda:x"}, "device must be"),
        ({"device": "meta"}, "device must be"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tiny, changes, message):
    with pytest.raises(TrainError, match=message):
        train(dataclasses.replace(tiny, **changes), tmp_path / "run")


def test_a_batch_divides_among_the_processes(tmp_path, tiny):
    with pytest.raises(TrainError, match="batch_size 8 must divide among 3 processes"):
        trainer._check_folder(tiny, tmp_path, False, World(0, 3, CPU, None))


def _nan_constraint(monkeypatch):
    forward = constraints.ReconstructionError.forward

    def spoiled(self, *args, **kwargs):
        value = forward(self, *args, **kwargs)
        spoiled.calls += 1
        return value * float("nan") if spoiled.calls == 4 else value

    spoiled.calls = 0
    monkeypatch.setattr(constraints.ReconstructionError, "forward", spoiled)


def _nan_output(term):
    def spoil(monkeypatch):
        forward = nn.ConvDraw.forward

        def spoiled(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            spoiled.calls += 1
            if spoiled.calls < 4:
                return output
            return output._replace(**{term: getattr(output, term) * float("inf")})

        spoiled.calls = 0
        monkeypatch.setattr(nn.ConvDraw, "forward", spoiled)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "objective", "term"),
    [
        (_nan_constraint, "geco", "constraint re"),
        (_nan_output("kl"), "geco", "kl"),
        (_nan_output("log_likelihood"), "elbo", "log likelihood"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path, tiny, monkeypatch, spoil, objective, term
):
    config = dataclasses.replace(tiny, objective=objective)
    spoil(monkeypatch)
    with pytest.raises(TrainError, match=f"step 4: the loss is .* not finite in {term};") as caught:
        train(config, tmp_path)
    folder = checkpoint.latest(tmp_path / "checkpoints")
    assert folder.name == "step-00000002"
    assert str(folder) in str(caught.value)
    assert all(torch.isfinite(value).all() for value in _state(tmp_path).values())


def test_weights_that_overflow_are_not_saved(tmp_path, tiny):
    config = dataclasses.replace(tiny, learning_rate=1e30, steps=50, checkpoint_every=1)
    with pytest.raises(TrainError, match="not finite"):
        train(config, tmp_path)
    if folder := checkpoint.latest(tmp_path / "checkpoints"):
        tensors, _ = checkpoint.load(folder, CPU)
        assert all(torch.isfinite(value).all() for value in tensors.values())


def test_a_full_disk_in_the_log_is_one_clear_error(tmp_path, tiny, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("geco_fast.experiments.metrics.MetricsLog.write", full)
    with pytest.raises(TrainError, match="No space left on device"):
        train(tiny, tmp_path)


@pytest.mark.parametrize(("size", "length"), [(8, 20), (7, 5), (5, 5), (1, 3)])
def test_every_epoch_sees_every_image_once(size, length):
    order = np.concatenate([batch_indices(0, 0, step, size, length) for step in range(3 * length)])
    for epoch in order[: len(order) // length * length].reshape(-1, length):
        assert np.array_equal(np.sort(epoch), np.arange(length))
    other = np.concatenate([batch_indices(1, 0, step, size, length) for step in range(3 * length)])
    assert not np.array_equal(order, other)


def test_sigma_follows_its_likelihood_and_nothing_else(tmp_path, tiny):
    run = Run(dataclasses.replace(tiny, dtype="float64"), tmp_path, ALONE)
    batch, noise = run.training_batch(0)
    output = run.model(batch.image, noise=noise)
    terms = run.terms(batch, output)
    expected = torch.autograd.grad(
        -output.log_likelihood.mean(), run.model.log_sigma, retain_graph=True
    )[0]
    run.sigma_loss(batch, terms).backward()
    torch.testing.assert_close(run.model.log_sigma.grad, expected)
    others = [v for n, v in run.model.named_parameters() if n != "log_sigma"]
    assert all(value.grad is None for value in others)


def test_the_seed_decides_and_global_randomness_does_not(tmp_path, tiny):
    config = dataclasses.replace(tiny, steps=2)
    state = torch.random.get_rng_state()
    train(config, tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    train(config, tmp_path / "b")
    train(dataclasses.replace(config, seed=1), tmp_path / "c")
    _assert_same_run(tmp_path / "a", tmp_path / "b")
    assert _rows(tmp_path / "a") != _rows(tmp_path / "c")


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, tiny):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    endless = dataclasses.replace(tiny, steps=1_000_000, checkpoint_every=7)
    process = _start(*_command(killed, endless))
    _wait_for_checkpoint(process, killed, 21)
    process.kill()
    process.communicate()
    step = int(checkpoint.latest(killed / "checkpoints").name.removeprefix("step-"))

    config = dataclasses.replace(endless, steps=step + 10)
    train(config, killed, resume=True)
    train(config, straight)
    _assert_same_run(killed, straight)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, tiny, signum):
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    endless = dataclasses.replace(tiny, steps=1_000_000, checkpoint_every=1000)
    process = _start(*_command(stopped, dataclasses.replace(endless, checkpoint_every=2)))
    _wait_for_checkpoint(process, stopped, 4)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    step = int(checkpoint.latest(stopped / "checkpoints").name.removeprefix("step-"))
    assert f"stopped at step {step}" in errors
    assert f"geco-fast train --resume --out {stopped}" in errors
    assert "Traceback" not in errors

    process = _start(*_command(stopped, None, "--resume", "--steps", str(step + 3)))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "squared error per pixel" in output
    train(dataclasses.replace(endless, steps=step + 3), straight)
    _assert_same_run(stopped, straight)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["geco", "elbo"])
@pytest.mark.parametrize("model", ["convdraw", "nvp"])
def test_two_processes_compute_what_one_does(tmp_path, tiny, model, objective):
    config = dataclasses.replace(tiny, model=model, objective=objective, dtype="float64", steps=8)
    one, two = tmp_path / "one", tmp_path / "two"
    train(config, one)
    process = _start(*TORCHRUN, *_command(two, config))
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    state, expected = _state(two), _state(one)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12, msg=name)
    columns, other = read_metrics(two / "metrics.csv"), read_metrics(one / "metrics.csv")
    for name in columns.keys() - set(TIME_COLUMNS):
        np.testing.assert_allclose(columns[name], other[name], rtol=1e-12, err_msg=name)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path, tiny):
    config = dataclasses.replace(tiny, steps=1_000_000)
    process = _start(*TORCHRUN, *_command(tmp_path, config))
    _wait_for_checkpoint(process, tmp_path, 4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    step = int(checkpoint.latest(tmp_path / "checkpoints").name.removeprefix("step-"))
    assert errors.count(f"stopped at step {step}") == 1
    train(dataclasses.replace(config, steps=step + 1), tmp_path, resume=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_a_run_to_resume(tmp_path, tiny):
    import resource

    train(dataclasses.replace(tiny, steps=2), tmp_path)
    kept = checkpoint.latest(tmp_path / "checkpoints")
    limit = (kept / "state.safetensors").stat().st_size // 2
    process = _start(
        *_command(tmp_path, None, "--resume", "--steps", "6"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith("Error: checkpoint of step 4 not written")
    assert len(errors.splitlines()) == 1
    assert checkpoint.latest(tmp_path / "checkpoints") == kept
    train(dataclasses.replace(tiny, steps=4), tmp_path, resume=True)
