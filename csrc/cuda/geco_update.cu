// One step of GECO in one launch of one block; the formulas are in include/geco_update.h. A warp
// takes a constraint at a time: its lanes read the batch once, and the first of them does the few
// scalars. All arithmetic is in float64 and every sum has a fixed order. What has to move: the
// values once, and the state.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"
#include "include/geco_update.h"

namespace geco {
namespace cuda {
namespace {

using geco_update::Params;
using geco_update::State;

__device__ __forceinline__ double get(const State& state, std::int64_t l) {
  if (state.dtype == DType::kFloat64)
    return read(static_cast<const double*>(state.data) + l * state.stride);
  return double(read(static_cast<const float*>(state.data) + l * state.stride));
}

__device__ __forceinline__ void set(const State& state, std::int64_t l, double value) {
  if (state.dtype == DType::kFloat64)
    write(static_cast<double*>(state.data) + l * state.stride, value);
  else
    write(static_cast<float*>(state.data) + l * state.stride, float(value));
}

// NaN passes.
__device__ __forceinline__ double within(double x, double low, double high) {
  return x < low ? low : x > high ? high : x;
}

__device__ __forceinline__ double moved(const Params& p, double log_lambda, double ema) {
  double ascent = p.step_size * ema;
  if (ema <= 0) ascent *= p.speedup;
  if (p.softplus2) {
    const double root = exp(0.5 * log_lambda);  // softplus(w)
    const double slope = -expm1(-root);         // sigmoid(w)
    const double w = root + log(slope) + ascent * 2 * root * slope;
    const double softplus = (w > 0 ? w : 0.0) + log1p(exp(-fabs(w)));
    ascent = 2 * log(softplus) - log_lambda;
  }
  return within(log_lambda + within(ascent, p.down, p.up), p.low, p.high);
}

template <class Storage>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) geco_update_kernel(const Params p) {
  constexpr int kWarps = kThreads / kWarp;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  double* const penalties = shared_memory<double>();
  const std::int64_t step = read(p.step);
  const bool due = step >= p.warmup_steps && step % p.update_every == 0;
  double penalty = 0;
  for (std::int64_t l = warp; l < p.constraints; l += kWarps) {
    const Storage* const row = static_cast<const Storage*>(p.c_hat) + l * p.constraint_stride;
    double sum = 0;
    for (std::int64_t k = lane; k < p.batch; k += kWarp)
      sum += double(widen(read(row + k * p.batch_stride)));
    sum = sum_of_group<kWarp>(sum, nullptr);
    if (lane != 0) continue;
    const double c = sum / double(p.batch);
    const double log_lambda = get(p.log_lambda, l);
    const double lambda = exp(log_lambda);
    if (p.batch > 0) set(p.slope, l, lambda / double(p.batch));
    if (!p.update) {
      penalty += lambda * c;
      continue;
    }
    const double ema = step == 0 ? c : p.alpha * get(p.ema, l) + (1 - p.alpha) * c;
    penalty += lambda * ema;
    set(p.ema, l, ema);
    if (due) set(p.log_lambda, l, moved(p, log_lambda, ema));
  }
  if (lane == 0) penalties[warp] = penalty;
  // Nobody reads the step any more.
  __syncthreads();
  if (threadIdx.x == 0) {
    penalty = 0;
    for (int k = 0; k < kWarps; ++k) penalty += penalties[k];
    set(p.penalty, 0, penalty);
    if (p.update) write(p.step, step + 1);
  }
}

}  // namespace
}  // namespace cuda

void geco_update_step_cuda(const geco_update::Params& params, cudaStream_t stream) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    cuda::launch(cuda::geco_update_kernel<Storage>, 1, cuda::kThreads,
                 cuda::kThreads / cuda::kWarp * sizeof(double), stream, params);
  });
}

}  // namespace geco
