// Squared error of each row, forward and backward; the formula is in include/squared_error.h.
// Memory is all there is to it: forward reads both operands once; backward reads them again and
// writes what is wanted.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"
#include "include/squared_error.h"

namespace geco {
namespace cuda {
namespace {

using squared_error::kX;
using squared_error::kY;

struct SquaredErrorForward {
  template <class Storage, int N, class Operands>
  __device__ __forceinline__ auto operator()(const Here<Storage, N, Operands>& here) const {
    const auto x = here.in(kX), y = here.in(kY);
    ComputeOf<Storage> sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) sum += (x.at[n] - y.at[n]) * (x.at[n] - y.at[n]);
    return sum;
  }
};

struct SquaredErrorBackward {
  double divisor;

  template <class Storage, int N, class Operands>
  __device__ __forceinline__ void operator()(const Here<Storage, N, Operands>& here,
                                             ComputeOf<Storage> grad) const {
    using T = ComputeOf<Storage>;
    using B = squared_error::Backward;
    const T factor = T(2 * double(grad) / divisor);
    auto x = here.in(kX), y = here.in(kY);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x.at[n] = (x.at[n] - y.at[n]) * factor;
      y.at[n] = -x.at[n];
    }
    if (here.has(B::kGradX)) here.out(B::kGradX, x);
    if (here.has(B::kGradY)) here.out(B::kGradY, y);
  }
};

}  // namespace
}  // namespace cuda

void squared_error_forward_cuda(const squared_error::Forward& params, cudaStream_t stream) {
  cuda::sum_rows(params.dtype, params.rows, params.sums, stream, cuda::SquaredErrorForward{});
}

void squared_error_backward_cuda(const squared_error::Backward& params, cudaStream_t stream) {
  cuda::for_each_in_rows(params.dtype, params.rows, params.grad, stream,
                         cuda::SquaredErrorBackward{params.divisor});
}

}  // namespace geco
