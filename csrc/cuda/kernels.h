// Launchers of the CUDA kernels. Each takes the parameters of its operator and the stream.
#pragma once

#include <cuda_runtime.h>

#include "include/affine_coupling.h"
#include "include/equilibrium_map.h"
#include "include/gaussian_latent.h"
#include "include/geco_update.h"
#include "include/lstm_gates.h"
#include "include/pncc.h"
#include "include/squared_error.h"

namespace geco {

// Sums [rows, blocks] whose sums over the blocks, divided, are `total`, of dtype float32 or
// float64.
struct PartialSums {
  const double* partial;
  std::int64_t blocks;
  double divisor;
  std::int64_t rows;
  DType dtype;
  void* total;
};

void add_partial_sums_cuda(const PartialSums& params, cudaStream_t stream);
void affine_coupling_forward_cuda(const affine_coupling::Forward& params, cudaStream_t stream);
void affine_coupling_backward_cuda(const affine_coupling::Backward& params, cudaStream_t stream);
void equilibrium_map_forward_cuda(const equilibrium_map::ForwardOnDevice& params,
                                  cudaStream_t stream);
void equilibrium_map_backward_cuda(const equilibrium_map::BackwardOnDevice& params,
                                   cudaStream_t stream);
void gaussian_latent_forward_cuda(const gaussian_latent::Forward& params, cudaStream_t stream);
void gaussian_latent_backward_cuda(const gaussian_latent::Backward& params, cudaStream_t stream);
void geco_update_step_cuda(const geco_update::Params& params, cudaStream_t stream);
void lstm_gates_forward_cuda(const lstm_gates::Forward& params, cudaStream_t stream);
void lstm_gates_backward_cuda(const lstm_gates::Backward& params, cudaStream_t stream);
void pncc_pivots_cuda(const pncc::OnDevice& params, cudaStream_t stream);
void pncc_scores_cuda(const pncc::OnDevice& params, cudaStream_t stream);
void pncc_gradients_cuda(const pncc::OnDevice& params, cudaStream_t stream);
void squared_error_forward_cuda(const squared_error::Forward& params, cudaStream_t stream);
void squared_error_backward_cuda(const squared_error::Backward& params, cudaStream_t stream);

}  // namespace geco
