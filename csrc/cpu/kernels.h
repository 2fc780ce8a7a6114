// The CPU kernels of one instruction-set level, and the choice among levels.
// A kernel serves the elements [begin, end) of its index space, or of blocks of its rows, so a
// caller can share them out.
#pragma once

#include <cstdint>

#include "include/affine_coupling.h"
#include "include/conv_lstm.h"
#include "include/coupling_mlp.h"
#include "include/equilibrium_map.h"
#include "include/gaussian_latent.h"
#include "include/geco_update.h"
#include "include/layout.h"
#include "include/lstm_gates.h"
#include "include/pncc.h"
#include "include/squared_error.h"

namespace geco::cpu {

struct Kernels {
  void (*affine_coupling_forward)(const affine_coupling::Forward&, std::int64_t begin,
                                  std::int64_t end);
  void (*affine_coupling_backward)(const affine_coupling::Backward&, std::int64_t begin,
                                   std::int64_t end);
  void (*winograd_weight)(const conv_lstm::Weight&, std::int64_t begin, std::int64_t end);
  void (*winograd_weight_transposed)(const conv_lstm::Weight&, std::int64_t begin,
                                     std::int64_t end);
  void (*winograd_weight_backward)(const conv_lstm::Weight&, std::int64_t begin, std::int64_t end);
  void (*winograd_input)(const conv_lstm::Tiles&, std::int64_t begin, std::int64_t end);
  void (*winograd_gradient)(const conv_lstm::Tiles&, std::int64_t begin, std::int64_t end);
  // Scratch memory is the caller's, of as many floats as are asked for.
  std::int64_t (*winograd_forward_scratch)(const conv_lstm::Forward&);
  void (*winograd_forward)(const conv_lstm::Forward&, std::int64_t begin, std::int64_t end,
                           float* scratch);
  std::int64_t (*winograd_backward_input_scratch)(const conv_lstm::BackwardInput&);
  void (*winograd_backward_input)(const conv_lstm::BackwardInput&, std::int64_t begin,
                                  std::int64_t end, float* scratch);
  void (*winograd_backward_weight)(const conv_lstm::BackwardWeight&, std::int64_t begin,
                                   std::int64_t end);
  void (*coupling_mlp_forward_pack)(const coupling_mlp::Forward&, std::int64_t begin,
                                    std::int64_t end);
  // Scratch memory is the caller's, of as many elements as the parameters say.
  void (*coupling_mlp_forward)(const coupling_mlp::Forward&, std::int64_t begin, std::int64_t end,
                               void* scratch);
  void (*coupling_mlp_backward_pack)(const coupling_mlp::Backward&, std::int64_t begin,
                                     std::int64_t end);
  void (*coupling_mlp_backward)(const coupling_mlp::Backward&, std::int64_t begin, std::int64_t end,
                                void* scratch);
  void (*coupling_mlp_backward_weight)(const coupling_mlp::Backward&, std::int64_t begin,
                                       std::int64_t end, void* scratch);
  void (*coupling_mlp_backward_bias)(const coupling_mlp::Backward&, std::int64_t begin,
                                     std::int64_t end);
  void (*equilibrium_map_forward_pack)(const equilibrium_map::Forward&, std::int64_t begin,
                                       std::int64_t end);
  void (*equilibrium_map_forward)(const equilibrium_map::Forward&, std::int64_t begin,
                                  std::int64_t end);
  void (*equilibrium_map_forward_finish)(const equilibrium_map::Forward&, std::int64_t begin,
                                         std::int64_t end);
  void (*equilibrium_map_backward_pack)(const equilibrium_map::Backward&, std::int64_t begin,
                                        std::int64_t end);
  void (*equilibrium_map_backward)(const equilibrium_map::Backward&, std::int64_t begin,
                                   std::int64_t end);
  void (*equilibrium_map_backward_finish)(const equilibrium_map::Backward&, std::int64_t begin,
                                          std::int64_t end);
  void (*gaussian_latent_forward)(const gaussian_latent::Forward&, std::int64_t begin,
                                  std::int64_t end);
  void (*gaussian_latent_backward)(const gaussian_latent::Backward&, std::int64_t begin,
                                   std::int64_t end);
  void (*geco_update_step)(const geco_update::Params&);
  void (*lstm_gates_forward)(const lstm_gates::Forward&, std::int64_t begin, std::int64_t end);
  void (*lstm_gates_backward)(const lstm_gates::Backward&, std::int64_t begin, std::int64_t end);
  void (*transpose_images)(const layout::Transpose&, std::int64_t begin, std::int64_t end);
  // Scratch memory is the caller's, of as many doubles as are asked for.
  std::int64_t (*pncc_forward_scratch)(const pncc::Forward&);
  std::int64_t (*pncc_backward_scratch)(const pncc::Backward&);
  void (*pncc_forward)(const pncc::Forward&, std::int64_t begin, std::int64_t end, double* scratch);
  void (*pncc_backward)(const pncc::Backward&, std::int64_t begin, std::int64_t end,
                        double* scratch);
  void (*pncc_finish)(const pncc::Problem&);
  void (*squared_error_forward)(const squared_error::Forward&, std::int64_t begin,
                                std::int64_t end);
  void (*squared_error_backward)(const squared_error::Backward&, std::int64_t begin,
                                 std::int64_t end);
  // Not an operator but a yardstick. `sink` holds a factor, a term and room for a result; returns
  // how many operations were done.
  std::int64_t (*multiply_adds)(std::int64_t rounds, float* sink);
};

struct Level {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

// From the least to the most capable; the first runs everywhere.
const Level* levels(int* count);

// The level in use: the most capable one that this CPU supports, unless another was chosen.
const Level& active();

// False if the name is unknown or this CPU lacks the instructions.
bool choose(const char* name);

}  // namespace geco::cpu
