// Gaussian sample and divergence, forward and backward; the formulas are in
// include/gaussian_latent.h. What has to move, in elements of an operand: 5 read and 1 written
// forward; backward 6 read and 1 written for each wanted gradient. Three exponentials make an
// element: the product of two would give the third, but overflow where it doesn't and lose digits
// near the prior.
#include "cuda/kernels.h"
#include "cuda/math.cuh"
#include "cuda/rows.cuh"
#include "include/gaussian_latent.h"

namespace geco {
namespace cuda {
namespace {

using gaussian_latent::kNoise;
using gaussian_latent::kPLogStd;
using gaussian_latent::kPMean;
using gaussian_latent::kQLogStd;
using gaussian_latent::kQMean;

struct GaussianLatentForward {
  template <class Storage, int N, class Operands>
  __device__ __forceinline__ auto operator()(const Here<Storage, N, Operands>& here) const {
    using T = ComputeOf<Storage>;
    const auto q_mean = here.in(kQMean), q_log_std = here.in(kQLogStd);
    const auto p_mean = here.in(kPMean), p_log_std = here.in(kPLogStd);
    auto z = here.in(kNoise);
    T sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      z.at[n] = q_mean.at[n] + exp_of(q_log_std.at[n]) * z.at[n];
      const T distance = (q_mean.at[n] - p_mean.at[n]) * exp_of(-p_log_std.at[n]);
      const T ratio = T(2) * (q_log_std.at[n] - p_log_std.at[n]);
      sum += T(0.5) * (exp_excess(ratio) + distance * distance);
    }
    here.out(gaussian_latent::Forward::kZ, z);
    return sum;
  }
};

// A gradient that is absent is left out rather than taken as zero: zero times infinity is NaN.
struct GaussianLatentBackward {
  bool has_kl;

  template <class Storage, int N, class Operands>
  __device__ __forceinline__ void operator()(const Here<Storage, N, Operands>& here,
                                             ComputeOf<Storage> grad_kl) const {
    using T = ComputeOf<Storage>;
    using B = gaussian_latent::Backward;
    Numbers<T, N> d_mean{}, d_log_std{};
    const auto q_log_std = here.in(kQLogStd);
    if (here.has(B::kGradZ)) {
      d_mean = here.in(B::kGradZ);
      Numbers<T, N> d_noise;
#pragma unroll
      for (int n = 0; n < N; ++n) d_noise.at[n] = d_mean.at[n] * exp_of(q_log_std.at[n]);
      if (here.has(B::kGradQLogStd)) {
        const auto noise = here.in(kNoise);
#pragma unroll
        for (int n = 0; n < N; ++n) d_log_std.at[n] = d_noise.at[n] * noise.at[n];
      }
      if (here.has(B::kGradNoise)) here.out(B::kGradNoise, d_noise);
    } else if (here.has(B::kGradNoise)) {
      here.out(B::kGradNoise, d_mean);
    }
    if (has_kl) {
      const auto q_mean = here.in(kQMean), p_log_std = here.in(kPLogStd);
      auto p_mean = here.in(kPMean);
      Numbers<T, N> d_p_log_std;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const T inverse_std = exp_of(-p_log_std.at[n]);
        const T distance = (q_mean.at[n] - p_mean.at[n]) * inverse_std;
        const T excess = expm1_of(T(2) * (q_log_std.at[n] - p_log_std.at[n]));
        const T to_mean = grad_kl * distance * inverse_std;
        d_mean.at[n] += to_mean;
        d_log_std.at[n] += grad_kl * excess;
        p_mean.at[n] = -to_mean;
        d_p_log_std.at[n] = -grad_kl * (excess + distance * distance);
      }
      if (here.has(B::kGradPMean)) here.out(B::kGradPMean, p_mean);
      if (here.has(B::kGradPLogStd)) here.out(B::kGradPLogStd, d_p_log_std);
    } else {
      if (here.has(B::kGradPMean)) here.out(B::kGradPMean, Numbers<T, N>{});
      if (here.has(B::kGradPLogStd)) here.out(B::kGradPLogStd, Numbers<T, N>{});
    }
    if (here.has(B::kGradQMean)) here.out(B::kGradQMean, d_mean);
    if (here.has(B::kGradQLogStd)) here.out(B::kGradQLogStd, d_log_std);
  }
};

}  // namespace
}  // namespace cuda

void gaussian_latent_forward_cuda(const gaussian_latent::Forward& params, cudaStream_t stream) {
  cuda::sum_rows(params.dtype, params.rows, params.kl, stream, cuda::GaussianLatentForward{});
}

void gaussian_latent_backward_cuda(const gaussian_latent::Backward& params, cudaStream_t stream) {
  cuda::for_each_in_rows(params.dtype, params.rows, params.grad_kl, stream,
                         cuda::GaussianLatentBackward{params.grad_kl.data != nullptr});
}

}  // namespace geco
