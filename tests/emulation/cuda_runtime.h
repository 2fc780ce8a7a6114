// Stands in for CUDA's header of this name where kernels are compiled for the CPU: what a kernel
// may use of the language and of the run time, and no more.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace geco::emulation {

// The running thread waits until all threads of the block, or all of `mask` in its warp, have come
// to the same.
void wait_for_block();
void wait_for_warp(unsigned mask);
// The same with an exchange: returns the bytes that the lane `source` brought.
void exchange(unsigned mask, void* value, std::size_t bytes, int source);
int lane();

}  // namespace geco::emulation

inline void __syncthreads() { geco::emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask = ~0u) { geco::emulation::wait_for_warp(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  geco::emulation::exchange(mask, &value, sizeof value, source & 31);
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, geco::emulation::lane() ^ distance);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  // Past the last lane a thread gets its own value back.
  const int source = geco::emulation::lane() + distance;
  return __shfl_sync(mask, value, source < 32 ? source : geco::emulation::lane());
}
