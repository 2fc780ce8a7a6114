from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from geco_fast.experiments import TrainError, checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        "model.weight": torch.randn(5, 7, generator=draw).t(),
        "geco.step": torch.tensor(12),
        "geco.ema": torch.randn(1, generator=draw, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }


def test_round_trip(tmp_path, tensors):
    folder = checkpoint.save(tmp_path, 12, tensors, {"config": {"seed": 0}})
    loaded, about = checkpoint.load(folder, CPU)
    assert checkpoint.latest(tmp_path) == folder
    assert about["step"] == 12
    assert about["config"] == {"seed": 0}
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_the_last_two_are_kept(tmp_path, tensors):
    for step in (5, 99, 100, 12345):
        checkpoint.save(tmp_path, step, tensors, {})
    assert sorted(os.listdir(tmp_path)) == ["step-00000100", "step-00012345"]


def test_an_interrupted_write_leaves_nothing_that_counts(tmp_path, tensors):
    (tmp_path / ".step-00000007.123").mkdir()
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None
    folder = checkpoint.save(tmp_path, 7, tensors, {})
    assert checkpoint.latest(tmp_path) == folder


def test_non_finite_state_is_refused_by_name(tmp_path, tensors):
    tensors["model.weight"][0, 0] = float("nan")
    with pytest.raises(TrainError, match=r"step 3: model\.weight is not finite"):
        checkpoint.save(tmp_path, 3, tensors, {})
    assert checkpoint.latest(tmp_path) is None


def _cut(folder):
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _flip(folder):
    path = folder / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _other_format(folder):
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "cut short or altered"),
        (_flip, "cut short or altered"),
        (_other_format, "format 99, this version reads 1"),
        (lambda folder: (folder / "state.safetensors").unlink(), "No such file"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "checkpoint.json").write_text("{}"), "'format' is missing"),
        (lambda folder: (folder / "checkpoint.json").write_text("[]"), "cannot be read"),
    ],
)
def test_damage_is_named_and_the_earlier_checkpoint_offered(tmp_path, tensors, damage, message):
    earlier = checkpoint.save(tmp_path, 1, tensors, {})
    folder = checkpoint.save(tmp_path, 2, tensors, {})
    damage(folder)
    with pytest.raises(TrainError, match=message) as caught:
        checkpoint.load(folder, CPU)
    assert str(folder) in str(caught.value)
    assert "remove that folder to go on from step-00000001" in str(caught.value)
    checkpoint.load(earlier, CPU)


@pytest.mark.parametrize("call", range(1, 4))
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, tensors, monkeypatch, call):
    earlier = checkpoint.save(tmp_path, 1, tensors, {})
    synchronise, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synchronise(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainError, match=r"step 2 not written to .*: No space left on device"):
        checkpoint.save(tmp_path, 2, tensors, {})
    assert not list(tmp_path.glob(".*"))
    checkpoint.load(earlier, CPU)


def test_a_write_refused_by_the_kernel(tmp_path):
    code = """
import resource, sys, torch
from pathlib import Path
from geco_fast.experiments import TrainError, checkpoint
root = Path(sys.argv[1])
checkpoint.save(root, 1, {"a": torch.zeros(10)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    checkpoint.save(root, 2, {"a": torch.zeros(10_000)}, {})
except TrainError as error:
    print(error)
checkpoint.load(checkpoint.latest(root), torch.device("cpu"))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "step 2 not written" in result.stdout
    assert "File too large; step-00000001 is whole" in result.stdout


def test_write_atomically_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
