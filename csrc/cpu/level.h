// Gathers the kernels of one instruction-set level. Each level_*.cpp includes this once, names its
// table and is compiled with that level's flags; no other file may include the kernels.
#pragma once

#include "cpu/affine_coupling.h"
#include "cpu/conv_lstm.h"
#include "cpu/coupling_mlp.h"
#include "cpu/equilibrium_map.h"
#include "cpu/gaussian_latent.h"
#include "cpu/geco_update.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/lstm_gates.h"
#include "cpu/peak.h"
#include "cpu/pncc.h"
#include "cpu/squared_error.h"

namespace geco::cpu {
namespace {

constexpr Kernels kKernels = {
    .affine_coupling_forward = affine_coupling_forward,
    .affine_coupling_backward = affine_coupling_backward,
    .winograd_weight = winograd_weight,
    .winograd_weight_transposed = winograd_weight_transposed,
    .winograd_weight_backward = winograd_weight_backward,
    .winograd_input = winograd_input,
    .winograd_gradient = winograd_gradient,
    .winograd_forward_scratch = winograd_forward_scratch,
    .winograd_forward = winograd_forward,
    .winograd_backward_input_scratch = winograd_backward_input_scratch,
    .winograd_backward_input = winograd_backward_input,
    .winograd_backward_weight = winograd_backward_weight,
    .coupling_mlp_forward_pack = coupling_mlp_forward_pack,
    .coupling_mlp_forward = coupling_mlp_forward,
    .coupling_mlp_backward_pack = coupling_mlp_backward_pack,
    .coupling_mlp_backward = coupling_mlp_backward,
    .coupling_mlp_backward_weight = coupling_mlp_backward_weight,
    .coupling_mlp_backward_bias = coupling_mlp_backward_bias,
    .equilibrium_map_forward_pack = equilibrium_map_forward_pack,
    .equilibrium_map_forward = equilibrium_map_forward,
    .equilibrium_map_forward_finish = equilibrium_map_forward_finish,
    .equilibrium_map_backward_pack = equilibrium_map_backward_pack,
    .equilibrium_map_backward = equilibrium_map_backward,
    .equilibrium_map_backward_finish = equilibrium_map_backward_finish,
    .gaussian_latent_forward = gaussian_latent_forward,
    .gaussian_latent_backward = gaussian_latent_backward,
    .geco_update_step = geco_update_step,
    .lstm_gates_forward = lstm_gates_forward,
    .lstm_gates_backward = lstm_gates_backward,
    .transpose_images = transpose_images,
    .pncc_forward_scratch = pncc_scratch,
    .pncc_backward_scratch = pncc_scratch,
    .pncc_forward = pncc_run,
    .pncc_backward = pncc_run,
    .pncc_finish = pncc_finish,
    .squared_error_forward = squared_error_forward,
    .squared_error_backward = squared_error_backward,
    .multiply_adds = multiply_adds,
};

}  // namespace
}  // namespace geco::cpu
