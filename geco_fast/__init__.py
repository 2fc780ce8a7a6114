"""Fast training of constrained variational autoencoders (GECO, Rezende and Viola 2018)."""

from geco_fast import constraints, data, nn, objectives, ops
from geco_fast._backend import BackendUnavailable, use_backend
from geco_fast._info import info
from geco_fast._version import __version__
from geco_fast.geco import GECO
from geco_fast.objectives import VAEOutput

__all__ = [
    "GECO",
    "BackendUnavailable",
    "VAEOutput",
    "__version__",
    "constraints",
    "data",
    "info",
    "nn",
    "objectives",
    "ops",
    "use_backend",
]
