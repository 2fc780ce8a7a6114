// What the CUDA kernels share: how they are launched, how they reach memory, and reductions.
//
// Every access to global memory goes through `read` and `write`, and all shared memory is dynamic:
// so a test can compile the same files for the CPU, in its emulation, and count and check.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "include/numeric.h"
#include "include/strided.h"

#ifdef GECO_EMULATION
#include "emulation.h"
#else
#include <cuda_fp16.h>
#endif

namespace geco::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Of a processor, for which registers suffice: left alone, ptxas spills some for more of them.
constexpr int kBlocksAtOnce = 2;
constexpr int kAccess = 16;  // bytes that a thread moves at once at most
// Blocks of a grid at most: what there is more of, they take in turns.
constexpr std::int64_t kMostBlocks = std::int64_t(1) << 20;
constexpr unsigned kAllLanes = ~0u;

inline int blocks_for(std::int64_t units, std::int64_t per_block) {
  const std::int64_t blocks = (units + per_block - 1) / per_block;
  return int(blocks < kMostBlocks ? blocks : kMostBlocks);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  // CUDA refuses an empty grid.
  if (grid.x == 0) return;
#ifdef GECO_EMULATION
  (void)stream;
  emulation::launch(kernel, grid, block, shared_bytes, arguments...);
#else
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  // clang-format on
#endif
}

// N neighbours in memory, which one access moves.
template <class Storage, int N>
struct alignas(sizeof(Storage) * N) Pack {
  Storage at[N];
};

#ifdef GECO_EMULATION
#define GECO_LINE , int line = __builtin_LINE()
#define GECO_PASS_LINE , line
#else
#define GECO_LINE
#define GECO_PASS_LINE
#endif

template <class T>
__device__ __forceinline__ T read(const T* p GECO_LINE) {
#ifdef GECO_EMULATION
  emulation::touch(p, sizeof(T), line, false);
#endif
  return *p;
}

template <class T>
__device__ __forceinline__ void write(T* p, const T& value GECO_LINE) {
#ifdef GECO_EMULATION
  emulation::touch(p, sizeof(T), line, true);
#endif
  *p = value;
}

template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef GECO_EMULATION
  return static_cast<T*>(emulation::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#endif
}

template <class To, class From>
__device__ __forceinline__ To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) {
  return bits_of<float>(std::uint32_t(x.bits) << 16);
}
__device__ __forceinline__ float widen(Float16 x) {
#ifdef GECO_EMULATION
  return float(bits_of<_Float16>(x.bits));
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}

template <class Storage>
struct Narrow;

template <>
struct Narrow<float> {
  static __device__ __forceinline__ float from(float x) { return x; }
};

template <>
struct Narrow<double> {
  static __device__ __forceinline__ double from(double x) { return x; }
};

template <>
struct Narrow<BFloat16> {
  static __device__ __forceinline__ BFloat16 from(float x) {
    const std::uint32_t bits = bits_of<std::uint32_t>(x);
    if (x != x) return {std::uint16_t(bits >> 16 | 0x40)};
    // To nearest, ties to even.
    return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};

template <>
struct Narrow<Float16> {
  static __device__ __forceinline__ Float16 from(float x) {
#ifdef GECO_EMULATION
    return {bits_of<std::uint16_t>(_Float16(x))};
#else
    return {__half_as_ushort(__float2half_rn(x))};
#endif
  }
};

// Number types' arithmetic goes on in.
template <class Storage>
using ComputeOf = typename Compute<Storage>::type;

// N numbers of an operand.
template <class T, int N>
struct Numbers {
  T at[N];
};

template <int N, class Storage>
__device__ __forceinline__ Numbers<ComputeOf<Storage>, N> read_numbers(const Storage* p GECO_LINE) {
#ifdef GECO_EMULATION
  emulation::touch(p, sizeof(Pack<Storage, N>), line, false);
#endif
  const Pack<Storage, N> pack = *reinterpret_cast<const Pack<Storage, N>*>(p);
  Numbers<ComputeOf<Storage>, N> numbers;
#pragma unroll
  for (int k = 0; k < N; ++k) numbers.at[k] = widen(pack.at[k]);
  return numbers;
}

template <int N, class Storage>
__device__ __forceinline__ void write_numbers(
    Storage* p, const Numbers<ComputeOf<Storage>, N>& numbers GECO_LINE) {
#ifdef GECO_EMULATION
  emulation::touch(p, sizeof(Pack<Storage, N>), line, true);
#endif
  Pack<Storage, N> pack;
#pragma unroll
  for (int k = 0; k < N; ++k) pack.at[k] = Narrow<Storage>::from(numbers.at[k]);
  *reinterpret_cast<Pack<Storage, N>*>(p) = pack;
}

// Offsets of all operands at a pack of N neighbours in the innermost dimension, the packs numbered
// in the order of the index space. Where it has one dimension no division is needed.
template <int N, class Operands>
__device__ __forceinline__ void place(const Operands& operands, std::int64_t pack,
                                      std::int64_t* offsets) {
  const int last = operands.dims - 1;
#pragma unroll
  for (int k = 0; k < Operands::kOperands; ++k) offsets[k] = 0;
  for (int d = last; d >= 0; --d) {
    const std::int64_t size = d == last ? operands.size[d] / N : operands.size[d];
    std::int64_t here = pack;
    if (d > 0) {
      // 64-bit division takes some forty instructions, and few spaces need it.
      if (static_cast<std::uint64_t>(pack | size) >> 32) {
        here = pack % size;
        pack /= size;
      } else {
        const std::uint32_t narrow = std::uint32_t(pack), by = std::uint32_t(size);
        here = narrow % by;
        pack = narrow / by;
      }
    }
    if (d == last) here *= N;
#pragma unroll
    for (int k = 0; k < Operands::kOperands; ++k) offsets[k] += here * operands.stride[k][d];
  }
}

// A thread's place in the operands, where it reads and writes packs of N numbers.
template <class Storage, int N, class Operands>
struct Here {
  using T = ComputeOf<Storage>;
  const Operands& operands;
  std::int64_t at[Operands::kOperands];

  __device__ __forceinline__ Here(const Operands& operands, std::int64_t pack)
      : operands(operands) {
    place<N>(operands, pack, at);
  }
  __device__ __forceinline__ bool has(int k) const { return operands.data[k] != nullptr; }
  __device__ __forceinline__ Numbers<T, N> in(int k GECO_LINE) const {
    return read_numbers<N>(static_cast<const Storage*>(operands.data[k]) + at[k] GECO_PASS_LINE);
  }
  __device__ __forceinline__ Numbers<T, N> in_or_zeros(int k GECO_LINE) const {
    return has(k) ? in(k GECO_PASS_LINE) : Numbers<T, N>{};
  }
  __device__ __forceinline__ void out(int k, const Numbers<T, N>& numbers GECO_LINE) const {
    write_numbers<N>(static_cast<Storage*>(operands.data[k]) + at[k], numbers GECO_PASS_LINE);
  }
};

// Whether every present operand can be moved N elements at a time.
template <class Storage, int N, int Inputs, int Outputs>
bool is_packed(const Strided<Inputs, Outputs>& operands) {
  const int last = operands.dims - 1;
  if (last < 0 || operands.size[last] % N != 0) return false;
  for (int k = 0; k < operands.kOperands; ++k) {
    if (operands.data[k] == nullptr) continue;
    if (reinterpret_cast<std::uintptr_t>(operands.data[k]) % (sizeof(Storage) * N)) return false;
    if (operands.stride[k][last] != 1) return false;
    for (int d = 0; d < last; ++d)
      if (operands.stride[k][d] % N) return false;
  }
  return true;
}

template <class Storage, int N, int Inputs, int Outputs>
bool is_packed(const Rows<Inputs, Outputs>& rows) {
  if (!is_packed<Storage, N>(rows.first)) return false;
  for (int k = 0; k < rows.kOperands; ++k)
    if (rows.first.data[k] != nullptr && rows.count > 1 && rows.step[k] % N) return false;
  return true;
}

// A number that is known when a kernel is compiled.
template <int N>
struct Constant {};

// Calls `launch_packs` with the elements of a pack: 16 bytes where the layout allows it, else one.
template <class Storage, class Operands, class Launch>
void at_width(const Operands& operands, Launch launch_packs) {
  constexpr int kWidest = kAccess / int(sizeof(Storage));
  if (is_packed<Storage, kWidest>(operands))
    launch_packs(Constant<kWidest>{});
  else
    launch_packs(Constant<1>{});
}

template <class Storage, int N, class Operands, class Body>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    for_each_kernel(const __grid_constant__ Operands operands, std::int64_t packs,
                    const Body body) {
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t pack = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; pack < packs;
       pack += step)
    body(Here<Storage, N, Operands>(operands, pack));
}

// Runs `body` with every place of an index space.
template <class Operands, class Body>
void for_each(DType dtype, const Operands& operands, cudaStream_t stream, const Body& body) {
  visit_storage(dtype, [&]<class Storage>(Storage*) {
    at_width<Storage>(operands, [&]<int N>(Constant<N>) {
      const std::int64_t packs = operands.numel() / N;
      launch(for_each_kernel<Storage, N, Operands, Body>, blocks_for(packs, kThreads), kThreads, 0,
             stream, operands, packs, body);
    });
  });
}

}  // namespace geco::cuda
