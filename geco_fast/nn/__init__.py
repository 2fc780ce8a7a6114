"""Modules: ConvLSTM and ConvDraw, coupling flows and the VAE built on them, a classifier, LNCC."""

from geco_fast.nn.classifier import Classifier
from geco_fast.nn.conv import Conv2d
from geco_fast.nn.conv_draw import ConvDraw
from geco_fast.nn.conv_lstm import ConvLSTM, ConvLSTMCell
from geco_fast.nn.coupling import AffineCoupling
from geco_fast.nn.lncc import LNCCLoss
from geco_fast.nn.nvp_vae import NVPVAE
from geco_fast.nn.real_nvp import ConditionalRealNVP

__all__ = [
    "NVPVAE",
    "AffineCoupling",
    "Classifier",
    "ConditionalRealNVP",
    "Conv2d",
    "ConvDraw",
    "ConvLSTM",
    "ConvLSTMCell",
    "LNCCLoss",
]
