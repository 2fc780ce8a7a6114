"""Every operator in plain PyTorch: the definition that kernels are held to."""

from geco_fast.reference.affine_coupling import affine_coupling
from geco_fast.reference.conv_lstm import conv2d, conv_lstm_step
from geco_fast.reference.coupling_mlp import coupling_mlp
from geco_fast.reference.equilibrium_map import equilibrium_map
from geco_fast.reference.gaussian_latent import gaussian_latent
from geco_fast.reference.geco_update import geco_update
from geco_fast.reference.lstm_gates import lstm_gates
from geco_fast.reference.pncc import lncc, pncc
from geco_fast.reference.squared_error import squared_error

__all__ = [
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
    "squared_error",
]
