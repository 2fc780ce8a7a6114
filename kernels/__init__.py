"""Triton kernels, one module per operator; installed as `geco_fast.kernels`."""
