// Work on rows apart: each has a sum or a factor of its own.
//
// A row is cut into blocks of kBlock elements, and a group of threads, a warp or a block of them,
// takes one at a time. Its threads' sums meet in a tree of fixed shape, and the sums of a row's
// blocks in a second launch: no atomics, the same bits in every run.
#pragma once

#include "cuda/common.cuh"

namespace geco::cuda {

// A thread's place in a row.
template <class Storage, int N, class Rows>
__device__ __forceinline__ auto here_in(const Rows& rows, std::int64_t row, std::int64_t pack) {
  Here<Storage, N, decltype(rows.first)> here(rows.first, pack);
#pragma unroll
  for (int k = 0; k < Rows::kOperands; ++k) here.at[k] += row * rows.step[k];
  return here;
}

// Sum over a group of kLanes threads, at its first one. `scratch` has one number for each warp.
template <int kLanes>
__device__ __forceinline__ double sum_of_group(double sum, double* scratch) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if constexpr (kLanes > kWarp) {
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = 0;
    if (threadIdx.x == 0)
      for (int k = 0; k < kLanes / kWarp; ++k) sum += scratch[k];
    // The next sum goes to the same place.
    __syncthreads();
  }
  return sum;
}

template <class Storage, int N, int kLanes, class Rows, class Term>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    sum_rows_kernel(const __grid_constant__ Rows rows, std::int64_t blocks, const RowSums sums,
                    const Term term) {
  using T = ComputeOf<Storage>;
  constexpr int kGroups = kThreads / kLanes;
  const std::int64_t units = rows.count * blocks, step = std::int64_t(gridDim.x) * kGroups;
  const std::int64_t packs = rows.length / N;
  for (std::int64_t unit = std::int64_t(blockIdx.x) * kGroups + threadIdx.x / kLanes; unit < units;
       unit += step) {
    const std::int64_t row = unit / blocks, block = unit % blocks;
    const std::int64_t first = block * (kBlock / N);
    const std::int64_t last = packs < first + kBlock / N ? packs : first + kBlock / N;
    T sum = 0;
    for (std::int64_t pack = first + threadIdx.x % kLanes; pack < last; pack += kLanes)
      sum += term(here_in<Storage, N>(rows, row, pack));
    const double total = sum_of_group<kLanes>(sum, shared_memory<double>());
    if (threadIdx.x % kLanes == 0) {
      if (sums.partial != nullptr)
        write(sums.partial + unit, total);
      else
        write(static_cast<T*>(sums.total) + row, T(total / sums.divisor));
    }
  }
}

// Rows of a warp each that every multiprocessor of a GPU has some of.
constexpr std::int64_t kManyRows = 1024;

// Adds up `term` of every place of each row.
template <class Rows, class Term>
void sum_rows(DType dtype, const Rows& rows, const RowSums& sums, cudaStream_t stream,
              const Term& term) {
  visit_storage(dtype, [&]<class Storage>(Storage*) {
    at_width<Storage>(rows, [&]<int N>(Constant<N>) {
      const std::int64_t blocks = rows.length > kBlock ? (rows.length + kBlock - 1) / kBlock : 1;
      const auto with = [&]<int kLanes>(Constant<kLanes>) {
        launch(sum_rows_kernel<Storage, N, kLanes, Rows, Term>,
               blocks_for(rows.count * blocks, kThreads / kLanes), kThreads,
               kThreads / kWarp * sizeof(double), stream, rows, blocks, sums, term);
      };
      // A warp is enough for so few packs that few threads of a block would have any: at once where
      // rows are few, and one after another where they keep the GPU busy.
      const std::int64_t packs = rows.length / N;
      if (packs <= kWarp || (packs <= 4 * kWarp && rows.count >= kManyRows))
        with(Constant<kWarp>{});
      else
        with(Constant<kThreads>{});
    });
  });
}

template <class Storage, int N, class Rows, class Body>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    for_each_in_rows_kernel(const __grid_constant__ Rows rows, const RowScalars scalars,
                            const Body body) {
  using T = ComputeOf<Storage>;
  const std::int64_t packs = rows.length / N, step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t k = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; k < rows.count * packs;
       k += step) {
    std::int64_t row, pack;
    if (static_cast<std::uint64_t>(k | packs) >> 32) {
      row = k / packs;
      pack = k % packs;
    } else {
      row = std::uint32_t(k) / std::uint32_t(packs);
      pack = std::uint32_t(k) % std::uint32_t(packs);
    }
    const T scalar = scalars.data == nullptr
                         ? T(0)
                         : read(static_cast<const T*>(scalars.data) + row * scalars.stride);
    body(here_in<Storage, N>(rows, row, pack), scalar);
  }
}

// Runs `body` with every place of each row and the row's number, zero where there are none.
template <class Rows, class Body>
void for_each_in_rows(DType dtype, const Rows& rows, const RowScalars& scalars, cudaStream_t stream,
                      const Body& body) {
  visit_storage(dtype, [&]<class Storage>(Storage*) {
    at_width<Storage>(rows, [&]<int N>(Constant<N>) {
      launch(for_each_in_rows_kernel<Storage, N, Rows, Body>,
             blocks_for(rows.count * (rows.length / N), kThreads), kThreads, 0, stream, rows,
             scalars, body);
    });
  });
}

}  // namespace geco::cuda
