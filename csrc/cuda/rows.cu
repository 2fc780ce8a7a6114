// The second launch of sums over long rows: a warp adds up a row's partial sums.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace geco {
namespace cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    add_partial_sums_kernel(const PartialSums params) {
  constexpr int kGroups = kThreads / kWarp;
  const std::int64_t step = std::int64_t(gridDim.x) * kGroups;
  for (std::int64_t row = std::int64_t(blockIdx.x) * kGroups + threadIdx.x / kWarp;
       row < params.rows; row += step) {
    double sum = 0;
    for (std::int64_t k = threadIdx.x % kWarp; k < params.blocks; k += kWarp)
      sum += read(params.partial + row * params.blocks + k);
    sum = sum_of_group<kWarp>(sum, nullptr);
    if (threadIdx.x % kWarp == 0)
      write(static_cast<T*>(params.total) + row, T(sum / params.divisor));
  }
}

}  // namespace
}  // namespace cuda

void add_partial_sums_cuda(const PartialSums& params, cudaStream_t stream) {
  const auto with = [&]<class T>(T) {
    cuda::launch(cuda::add_partial_sums_kernel<T>,
                 cuda::blocks_for(params.rows, cuda::kThreads / cuda::kWarp), cuda::kThreads, 0,
                 stream, params);
  };
  if (params.dtype == DType::kFloat64)
    with(double{});
  else
    with(float{});
}

}  // namespace geco
