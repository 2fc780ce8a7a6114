// Kernels for the operators whose schemas geco_fast/_registry.py defines: one line each. This file
// is compiled into each library: that of the CPU, and that of CUDA, which has fewer.
#include "ops/affine_coupling.h"
#include "ops/conv_lstm.h"
#include "ops/coupling_mlp.h"
#include "ops/equilibrium_map.h"
#include "ops/gaussian_latent.h"
#include "ops/geco_update.h"
#include "ops/lstm_gates.h"
#include "ops/pncc.h"
#include "ops/squared_error.h"

#if defined(GECO_CUDA) && !defined(GECO_EMULATION)
#define GECO_KEY CUDA
#else
#define GECO_KEY CPU
#endif

STABLE_TORCH_LIBRARY_IMPL(geco_fast, GECO_KEY, m) {
  m.impl("affine_coupling", TORCH_BOX(&geco::affine_coupling_op));
  m.impl("affine_coupling_backward", TORCH_BOX(&geco::affine_coupling_backward_op));
  m.impl("equilibrium_map", TORCH_BOX(&geco::equilibrium_map_op));
  m.impl("equilibrium_map_backward", TORCH_BOX(&geco::equilibrium_map_backward_op));
  m.impl("gaussian_latent", TORCH_BOX(&geco::gaussian_latent_op));
  m.impl("gaussian_latent_backward", TORCH_BOX(&geco::gaussian_latent_backward_op));
  m.impl("geco_update", TORCH_BOX(&geco::geco_update_op));
  m.impl("lncc", TORCH_BOX(&geco::lncc_op));
  m.impl("lncc_backward", TORCH_BOX(&geco::lncc_backward_op));
  m.impl("lncc_with_gradients", TORCH_BOX(&geco::lncc_with_gradients_op));
  m.impl("lstm_gates", TORCH_BOX(&geco::lstm_gates_op));
  m.impl("lstm_gates_backward", TORCH_BOX(&geco::lstm_gates_backward_op));
  m.impl("pncc", TORCH_BOX(&geco::pncc_op));
  m.impl("pncc_backward", TORCH_BOX(&geco::pncc_backward_op));
  m.impl("pncc_with_gradients", TORCH_BOX(&geco::pncc_with_gradients_op));
  m.impl("squared_error", TORCH_BOX(&geco::squared_error_op));
  m.impl("squared_error_backward", TORCH_BOX(&geco::squared_error_backward_op));
#ifndef GECO_CUDA
  m.impl("coupling_layer", TORCH_BOX(&geco::coupling_layer_op));
  m.impl("coupling_layer_backward", TORCH_BOX(&geco::coupling_layer_backward_op));
  m.impl("coupling_mlp", TORCH_BOX(&geco::coupling_mlp_op));
  m.impl("coupling_mlp_backward", TORCH_BOX(&geco::coupling_mlp_backward_op));
  m.impl("coupling_mlp_with_hidden", TORCH_BOX(&geco::coupling_mlp_with_hidden_op));
  m.impl("winograd_backward", TORCH_BOX(&geco::winograd_backward_op));
  m.impl("winograd_conv2d", TORCH_BOX(&geco::winograd_conv2d_op));
  m.impl("winograd_step", TORCH_BOX(&geco::winograd_step_op));
  m.impl("winograd_weight", TORCH_BOX(&geco::winograd_weight_op));
  m.impl("winograd_weight_backward", TORCH_BOX(&geco::winograd_weight_backward_op));
#endif
}
