"""Operand checks and autocast rules shared by the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geco_fast._checks import alike, check_alike, check_floating, check_shape, describe


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; False where there is none, as on "meta"."""
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def autocast_to_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, bring 16-bit tensors to float32; else return them as they are."""
    if not autocast_enabled(tensors[0].device.type):
        return tensors
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def autocast_to_lower(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, bring all but float64 tensors to autocast's dtype, as `torch.matmul` does."""
    device = tensors[0].device.type
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors
    )


def same_shape_operands(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Check named operands ``[B, ...]`` that share shape, dtype and device; apply autocast.

    Under autocast 16-bit operands come back in float32, and so may differ in dtype at first.
    """
    operands = tuple(tensors.values())
    if alike(*operands):
        shape = operands[0].shape
        for tensor in operands:
            if tensor.shape != shape or not shape:
                break
        else:
            wide = operands[0].dtype in (torch.float32, torch.float64)
            return operands if wide else autocast_to_float32(*operands)
    for name, tensor in tensors.items():
        check_floating(name, tensor)
    (first_name, first), *others = tensors.items()
    if first.dim() == 0:
        raise ValueError(f"{first_name} must be [B, ...], got {describe(first)}")
    for name, tensor in others:
        check_shape(name, tensor, first.shape, f"that of {first_name}")
    operands = autocast_to_float32(*tensors.values())
    for name, tensor in zip(tensors, operands, strict=True):
        check_alike(name, tensor, first_name, operands[0])
    return operands


def per_dimension(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One positive integer per spatial dimension, from one for all or a sequence."""
    values = (value,) * count if isinstance(value, int) else value
    if not isinstance(values, (tuple, list)) or not all(
        isinstance(entry, (int, torch.SymInt)) and not isinstance(entry, bool) for entry in values
    ):
        raise TypeError(f"{name} must be an int or one int per dimension, got {describe(value)}")
    if len(values) != count:
        raise ValueError(f"{name} must have {count} entries, one per dimension, got {value!r}")
    if min(values) < 1:
        raise ValueError(f"{name} must be >= 1, got {value!r}")
    return tuple(values)
