"""Checkpoints that are either whole or not there: tensors in safetensors, the rest in JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from geco_fast.experiments.config import TrainError

FORMAT = 1
KEEP = 2


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def save(root: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """Write the checkpoint of a step as ``root/step-XXXXXXXX`` and drop all but the last two.

    The folder is written beside its place, synchronised to disk and then renamed, so a crash at
    any moment leaves the earlier checkpoints whole.

    Raises
    ------
    TrainError
        A tensor is not finite, or the disk refuses the data.
    """
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise TrainError(f"step {step}: {name} is not finite; no checkpoint was written")
    folder = root / f"step-{step:08d}"
    if folder.exists():
        return folder
    temporary = root / f".{folder.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        data = safetensors.torch.save({k: v.cpu().contiguous() for k, v in tensors.items()})
        about = about | {
            "format": FORMAT,
            "step": step,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        _write(temporary / "state.safetensors", data)
        _write(temporary / "checkpoint.json", (json.dumps(about, indent=2) + "\n").encode())
        _sync(temporary)
        temporary.rename(folder)
        _sync(root)
    except OSError as error:
        kept = latest(root)
        raise TrainError(
            f"checkpoint of step {step} not written to {folder}: {error.strerror}; "
            + (f"{kept.name} is whole" if kept else "there is no earlier checkpoint")
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _folders(root)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(root: Path) -> Path | None:
    """The newest checkpoint under ``root``, or None."""
    folders = _folders(root)
    return folders[-1] if folders else None


def load(folder: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: its tensors, and what `save` was told about it, ``step`` included.

    Raises
    ------
    TrainError
        A file is missing, cut short, altered or of another format.
    """
    try:
        about = json.loads((folder / "checkpoint.json").read_text())
        data = (folder / "state.safetensors").read_bytes()
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}, this version reads {FORMAT}")
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise ValueError("state.safetensors is cut short or altered (sha256 differs)")
        tensors = safetensors.torch.load(data)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        others = [other.name for other in _folders(folder.parent) if other != folder]
        mend = f"; remove that folder to go on from {others[-1]}" if others else ""
        raise TrainError(f"checkpoint {folder} cannot be read: {reason}{mend}") from error
    return {name: value.to(device) for name, value in tensors.items()}, about


def _folders(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"), key=lambda folder: folder.name)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
