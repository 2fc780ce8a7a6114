// Functions in the two types of arithmetic. CUDA's own are good to two units in the last place;
// none of them is one of the fast, approximate ones.
#pragma once

#include "cuda/common.cuh"

namespace geco::cuda {

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float expm1_of(float x) { return expm1f(x); }
__device__ __forceinline__ double expm1_of(double x) { return expm1(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float atan_of(float x) { return atanf(x); }
__device__ __forceinline__ double atan_of(double x) { return atan(x); }

template <class T>
__device__ __forceinline__ T sigmoid(T x) {
  return T(1) / (T(1) + exp_of(-x));
}

// exp(x) - 1 - x: a series where the difference would cancel.
template <class T>
__device__ __forceinline__ T exp_excess(T x) {
  if (!(x > T(-0.5) && x < T(0.5))) return expm1_of(x) - x;
  constexpr int kTerms = sizeof(T) == sizeof(double) ? 18 : 10;
  T p = 1;
#pragma unroll
  for (int n = kTerms; n >= 3; --n) p = T(1) + p * x * T(1.0 / n);
  return T(0.5) * x * x * p;
}

}  // namespace geco::cuda
