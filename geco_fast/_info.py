"""What this installation can do."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from geco_fast._backend import BACKENDS, LIBRARY, unavailable_reason
from geco_fast._version import __version__


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def info() -> str:
    """Describe versions, and each backend: active, or why not and what to do.

    Returns
    -------
    str
        Lines for a person, one fact each; also printed by ``geco-fast info``.
    """
    lines = [
        f"geco-fast  {__version__}",
        f"python     {platform.python_version()} on {platform.machine()}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton     {_version('triton')}",
    ]
    if LIBRARY is not None:
        build = LIBRARY.build_info()
        sets = ", ".join(LIBRARY.instruction_sets())
        lines += [
            f"library    {build['compiler']}, for torch {build['torch_target']} and newer",
            f"processor  {LIBRARY.instruction_set()} in use (has {sets})",
        ]
    for backend in BACKENDS[1:]:
        reason = unavailable_reason(backend)
        lines.append(f"backend {backend}: " + (f"not active: {reason}" if reason else "active"))
    return "\n".join(lines)
