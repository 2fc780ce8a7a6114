"""The processes of a run: one, or as many as torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geco_fast.experiments.config import TrainError


@dataclass(frozen=True)
class World:
    """This process's place among the processes of the run."""

    rank: int
    size: int
    device: torch.device
    group: Any

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def share(self, values: Any, dim: int = 0) -> Any:
        """This process's part of a global batch: an array, or a tensor split along ``dim``."""
        count = values.shape[dim] // self.size
        part = slice(self.rank * count, (self.rank + 1) * count)
        return values[(slice(None),) * dim + (part,)]

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean over the processes of scalars (tensors are first averaged), read by the host."""
        stacked = torch.stack([value.detach().double().mean() for value in values.values()])
        if self.group is not None:
            dist.all_reduce(stacked, group=self.group)
            stacked /= self.size
        return dict(zip(values, stacked.tolist(), strict=True))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the processes."""
        if self.group is None:
            return model
        return nn.parallel.DistributedDataParallel(model, process_group=self.group)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.group is not None:
            dist.barrier(group=self.group)


@contextmanager
def connect(device: str) -> Iterator[World]:
    """Join the run's processes, by NCCL on CUDA devices and by gloo on the CPU.

    Raises
    ------
    TrainError
        The device does not exist here.
    """
    try:
        chosen = torch.device(
            device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
    except RuntimeError:
        raise TrainError(f"device must be auto, cpu or cuda, got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise TrainError(f"device {device}: torch sees no CUDA device here; use --device cpu")
    if chosen.type not in ("cpu", "cuda"):
        raise TrainError(f"device must be auto, cpu or cuda, got {device!r}")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, chosen, None)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    except ValueError as error:
        raise TrainError(f"WORLD_SIZE is {size}, but {error}; start by torchrun") from error
    try:
        yield World(dist.get_rank(), size, chosen, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
