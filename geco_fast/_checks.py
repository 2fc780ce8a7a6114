"""Argument checks shared by every public function: one clear error that names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def exporting() -> bool:
    """Whether a program is being exported.

    Dynamo of torch 2.11 takes `torch.compiler.is_exporting()` for true in every compilation.
    """
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def describe(value: object) -> str:
    """Short text of what came: a tensor's shape, else the value's type and value."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def alike(first: object, *others: object) -> bool:
    """Whether all are dense floating tensors of one dtype and device.

    The good case, told in a fraction of the time that it takes to name what is wrong.
    """
    if not isinstance(first, Tensor) or first.layout is not torch.strided:
        return False
    dtype, on_cpu = first.dtype, first.is_cpu
    if dtype not in FLOATING:
        return False
    for other in others:
        if (
            not isinstance(other, Tensor)
            or other.dtype is not dtype
            or other.layout is not torch.strided
            or not (other.is_cpu if on_cpu else other.device == first.device)
        ):
            return False
    return True


def check_tensor(name: str, value: object) -> None:
    """Raise `TypeError` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}")


def check_floating(name: str, value: object, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """Raise `TypeError` unless ``value`` is a tensor of one of the dtypes."""
    check_tensor(name, value)
    if value.layout != torch.strided:  # type: ignore[attr-defined]
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")  # type: ignore[attr-defined]
    if value.dtype not in dtypes:  # type: ignore[attr-defined]
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(value.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
        raise TypeError(f"{name} must have one of the dtypes {wanted}, got {got}")


def check_rank(name: str, value: Tensor, ranks: Sequence[int], layout: str) -> None:
    """Raise `ValueError` unless ``value`` has one of the ranks; ``layout`` names the axes."""
    if value.dim() not in ranks:
        raise ValueError(f"{name} must be {layout}, got {describe(value)}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise `ValueError` unless ``value`` has exactly this shape; ``why`` says where it is from."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)} ({why}), got {describe(value)}")


def check_alike(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors share dtype (`TypeError`) and device (`ValueError`)."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}"
        )


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless ``value`` is one of the choices."""
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise `TypeError` unless ``value`` is a real number; tensors are none."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """Return ``value``; raise unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raise `ValueError` unless ``value`` is a number above zero (or zero, where allowed)."""
    check_number(name, value)
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"{name} must be {'>= 0' if zero else '> 0'}, got {value!r}")
