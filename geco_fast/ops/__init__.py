"""The operators' public functions."""

from geco_fast.ops.affine_coupling import affine_coupling
from geco_fast.ops.conv_lstm import PreparedWeight, conv2d, conv_lstm_step, prepare_weight
from geco_fast.ops.coupling_mlp import coupling_mlp
from geco_fast.ops.equilibrium_map import equilibrium_map
from geco_fast.ops.gaussian_latent import gaussian_latent
from geco_fast.ops.geco_update import geco_update
from geco_fast.ops.lstm_gates import lstm_gates
from geco_fast.ops.pncc import lncc, pncc
from geco_fast.ops.squared_error import squared_error

__all__ = [
    "PreparedWeight",
    "affine_coupling",
    "conv2d",
    "conv_lstm_step",
    "coupling_mlp",
    "equilibrium_map",
    "gaussian_latent",
    "geco_update",
    "lncc",
    "lstm_gates",
    "pncc",
    "prepare_weight",
    "squared_error",
]
