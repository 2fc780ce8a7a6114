// Fixed-point map of reconstruction vectors, forward and backward, streaming over the data; the
// formulas are in include/equilibrium_map.h and on docs/ops/equilibrium_map.md. A block has a tile
// of kRows rows of data by kVectors vectors: a lane has a row, a warp kEach vectors, so a sum over
// rows is a warp's own and a sum over vectors is a thread's. Squared distances are made of the
// differences, in tiles of kDepth dimensions that pass through shared memory; they are computed
// again in every pass, and nothing of size n x m is stored. What has to move is x and psi; they are
// read once for every tile of the other, from the cache: the arithmetic takes longer.
#include "cuda/kernels.h"
#include "cuda/math.cuh"
#include "cuda/rows.cuh"
#include "include/equilibrium_map.h"

namespace geco {
namespace cuda {
namespace {

using equilibrium_map::BackwardOnDevice;
using equilibrium_map::ForwardOnDevice;
using equilibrium_map::OnDevice;

constexpr int kRows = kWarp, kWarps = kThreads / kWarp, kEach = 8, kVectors = kWarps * kEach;
static_assert(kVectors == equilibrium_map::kVectorsOfBlock);
constexpr int kDepth = 16;
// Dimensions are summed in runs, and runs in groups of tiles: as exact as pairwise sums.
constexpr int kRun = 8, kGroup = 10;
// Dimensions that a warp takes at once, one a lane, and those up to which a lane has them all.
constexpr int kColumns = kWarp, kFew = 4;
// Elements from a row of a tile to the next: no two lanes meet in a bank, and kEach stay aligned.
constexpr int kRowStep = kDepth + 1, kVectorStep = kVectors + 4, kColumnStep = kColumns + 1;

__device__ __forceinline__ double temperature_of(const OnDevice& p) {
  switch (p.beta_dtype) {
    case DType::kFloat64:
      return read(static_cast<const double*>(p.beta));
    case DType::kBFloat16:
      return double(widen(read(static_cast<const BFloat16*>(p.beta))));
    case DType::kFloat16:
      return double(widen(read(static_cast<const Float16*>(p.beta))));
    default:
      return double(read(static_cast<const float*>(p.beta)));
  }
}

template <class Storage>
__device__ __forceinline__ const Storage* at(const Matrix& matrix, std::int64_t row,
                                             std::int64_t column) {
  return static_cast<const Storage*>(matrix.data) + row * matrix.row + column * matrix.column;
}

// What is subtracted before an exponential: x, or 0 for -inf.
template <class T>
__device__ __forceinline__ T finite_or_zero(T x) {
  return x == -T(INFINITY) ? T(0) : x;
}

// Puts a tile [rows, columns] of a matrix, zero where it ends, into shared memory. Neighbours in
// memory are neighbouring threads' to load.
template <class Storage, class T>
__device__ __forceinline__ void load_tile(const Matrix& from, std::int64_t first_row,
                                          std::int64_t end_row, std::int64_t first_column,
                                          int columns, int rows, T* to, int row_step,
                                          int column_step) {
  const bool along_rows = from.row == 1 && from.column != 1;
  for (int k = threadIdx.x; k < rows * columns; k += kThreads) {
    const int row = along_rows ? k % rows : k / columns;
    const int column = along_rows ? k / rows : k % columns;
    T value = 0;
    if (first_row + row < end_row)
      value = widen(read(at<Storage>(from, first_row + row, first_column + column)));
    to[row * row_step + column * column_step] = value;
  }
}

// A block's shared memory: tiles of data, of vectors and, backward, of their images' gradients and
// of the images; then what only some kernels have.
template <class T>
struct Tiles {
  T *rows, *vectors, *grads, *mapped, *rest;

  __device__ __forceinline__ explicit Tiles(bool with_gradient) {
    vectors = shared_memory<T>();
    grads = vectors + kDepth * kVectorStep;
    mapped = grads + (with_gradient ? kDepth * kVectorStep : 0);
    rows = mapped + (with_gradient ? kDepth * kVectorStep : 0);
    rest = rows + (kRows * kRowStep + 3) / 4 * 4;
  }
  static std::size_t bytes(bool with_gradient, std::size_t more) {
    const int tiles = with_gradient ? 3 : 1;
    return (tiles * kDepth * kVectorStep + (kRows * kRowStep + 3) / 4 * 4 + more) * sizeof(T);
  }
};

template <class T>
struct Pairs {
  T distance[kEach];  // |x - psi|^2
  T product[kEach];   // grad . (x - mapped)
};

// Those of a thread's row with its vectors. Ends in a barrier: the tiles may be written again.
template <class Storage, class T>
__device__ __forceinline__ Pairs<T> pairs_of(const OnDevice& p, const Matrix* grad_mapped,
                                             std::int64_t first_row, std::int64_t end_row,
                                             std::int64_t first_vector, const Tiles<T>& tiles) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  Pairs<T> whole{}, group{};
  int in_group = 0;
  for (std::int64_t first = 0; first < p.d; first += kDepth) {
    const int columns = p.d - first < kDepth ? int(p.d - first) : kDepth;
    load_tile<Storage>(p.x, first_row, end_row, first, columns, kRows, tiles.rows, kRowStep, 1);
    load_tile<Storage>(p.psi, first_vector, p.m, first, columns, kVectors, tiles.vectors, 1,
                       kVectorStep);
    if (grad_mapped != nullptr) {
      load_tile<T>(*grad_mapped, first_vector, p.m, first, columns, kVectors, tiles.grads, 1,
                   kVectorStep);
      load_tile<T>(p.mapped, first_vector, p.m, first, columns, kVectors, tiles.mapped, 1,
                   kVectorStep);
    }
    __syncthreads();
    for (int begin = 0; begin < columns; begin += kRun) {
      Pairs<T> run{};
      for (int k = begin; k < begin + kRun && k < columns; ++k) {
        const T x = tiles.rows[lane * kRowStep + k];
        const int own = k * kVectorStep + warp * kEach;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const T difference = x - tiles.vectors[own + j];
          run.distance[j] += difference * difference;
        }
        if (grad_mapped != nullptr) {
#pragma unroll
          for (int j = 0; j < kEach; ++j)
            run.product[j] += tiles.grads[own + j] * (x - tiles.mapped[own + j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        group.distance[j] += run.distance[j];
        group.product[j] += run.product[j];
      }
    }
    if (++in_group == kGroup) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        whole.distance[j] += group.distance[j];
        whole.product[j] += group.product[j];
      }
      group = {};
      in_group = 0;
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    whole.distance[j] += group.distance[j];
    whole.product[j] += group.product[j];
  }
  return whole;
}

// The logarithm of a vector's prior.
template <class Storage>
__device__ __forceinline__ ComputeOf<Storage> prior_of(const OnDevice& p, std::int64_t vector) {
  using T = ComputeOf<Storage>;
  if (p.log_prior.data == nullptr) return T(p.uniform);
  return widen(read(static_cast<const Storage*>(p.log_prior.data) + vector * p.log_prior.step));
}

template <class Storage>
__global__ void __launch_bounds__(kThreads, 1)
    normaliser_kernel(const __grid_constant__ ForwardOnDevice p) {
  using T = ComputeOf<Storage>;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const Tiles<T> tiles(false);
  T* const bounds = tiles.rest;  // [warp, row], as are the totals
  T* const totals = bounds + kThreads;
  const T temperature = T(temperature_of(p));
  for (std::int64_t first_row = std::int64_t(blockIdx.x) * kRows; first_row < p.n;
       first_row += std::int64_t(gridDim.x) * kRows) {
    T largest = -T(INFINITY), total = 0;
    for (std::int64_t first = 0; first < p.m; first += kVectors) {
      const Pairs<T> pairs = pairs_of<Storage>(p, nullptr, first_row, p.n, first, tiles);
      T z[kEach], larger = largest;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const std::int64_t vector = first + warp * kEach + j;
        z[j] = vector < p.m ? prior_of<Storage>(p, vector) - pairs.distance[j] / temperature
                            : -T(INFINITY);
        larger = z[j] > larger ? z[j] : larger;
      }
      const T bound = finite_or_zero(larger);
      T terms = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) terms += exp_of(z[j] - bound);
      total = total * exp_of(largest - bound) + terms;
      largest = larger;
    }
    bounds[threadIdx.x] = largest;
    totals[threadIdx.x] = total;
    __syncthreads();
    if (warp == 0 && first_row + lane < p.n) {
      for (int k = 1; k < kWarps; ++k) {
        const T other = bounds[k * kWarp + lane];
        largest = other > largest ? other : largest;
      }
      const T bound = finite_or_zero(largest);
      double sum = 0;
      for (int k = 0; k < kWarps; ++k)
        sum += double(totals[k * kWarp + lane]) * double(exp_of(bounds[k * kWarp + lane] - bound));
      // The sum has inf - inf in it.
      const T result = largest == T(INFINITY) ? largest : T(double(bound) + log(sum));
      write(static_cast<T*>(p.log_normaliser) + first_row + lane, result);
    }
    __syncthreads();
  }
}

// Sums over the rows of data: of weights times x_i or, `Centred`, times x_i - psi_a, for a warp's
// vectors, in float64. Up to kFew dimensions a lane has those of its rows, and lanes are added in
// the end; up to kColumns each lane has a dimension; else they are in global memory, where the
// thread that adds to one is always the same.
enum class Kept { kFew, kFits, kBeyond };

template <class Storage, Kept kKeptIn, bool kCentred>
struct WeightedSums {
  using T = ComputeOf<Storage>;
  static constexpr int kKept = kKeptIn == Kept::kFew ? kFew : kKeptIn == Kept::kFits ? 1 : 0;
  double kept[kEach][kKept > 0 ? kKept : 1] = {};

  __device__ __forceinline__ void scale(const double (&factor)[kEach]) {
#pragma unroll
    for (int j = 0; j < kEach; ++j)
#pragma unroll
      for (int k = 0; k < kKept; ++k) kept[j][k] *= factor[j];
  }

  // Adds the rows of a tile, of which `tiles` has the last dimensions. `weights` is the warp's room
  // for [row, vector]; `sums` [m, d] has what was there multiplied by `factor`, or zero if `anew`.
  // All threads are through with the tiles when it returns.
  __device__ __forceinline__ void add(const OnDevice& p, const Tiles<T>& tiles,
                                      const T (&weight)[kEach], std::int64_t first_row,
                                      std::int64_t end_row, std::int64_t first_vector, T* weights,
                                      double* sums, const double (&factor)[kEach], bool anew) {
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    const std::int64_t own = first_vector + warp * kEach;
    if constexpr (kKeptIn == Kept::kFew) {
#pragma unroll
      for (int k = 0; k < kFew; ++k) {
        if (k >= p.d || first_row + lane >= end_row) break;
        const T x = tiles.rows[lane * kRowStep + k];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const T centre = kCentred ? tiles.vectors[k * kVectorStep + warp * kEach + j] : T(0);
          if (own + j < p.m) kept[j][k] += double(weight[j] * (x - centre));
        }
      }
      __syncthreads();
    } else {
#pragma unroll
      for (int j = 0; j < kEach; ++j) weights[lane * kEach + j] = weight[j];
      const int rows = end_row - first_row < kRows ? int(end_row - first_row) : kRows;
      T* const data = shared_memory<T>();  // in place of the tiles
      for (std::int64_t first = 0; first < p.d; first += kColumns) {
        const int columns = p.d - first < kColumns ? int(p.d - first) : kColumns;
        __syncthreads();
        load_tile<Storage>(p.x, first_row, end_row, first, columns, kRows, data, kColumnStep, 1);
        __syncthreads();
        if (lane >= columns) continue;
        T centre[kEach] = {}, tile[kEach] = {};
        if constexpr (kCentred) {
#pragma unroll
          for (int j = 0; j < kEach; ++j)
            if (own + j < p.m) centre[j] = widen(read(at<Storage>(p.psi, own + j, first + lane)));
        }
        for (int row = 0; row < rows; ++row) {
          const T x = data[row * kColumnStep + lane];
#pragma unroll
          for (int j = 0; j < kEach; ++j) tile[j] += weights[row * kEach + j] * (x - centre[j]);
        }
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if constexpr (kKeptIn == Kept::kFits) {
            kept[j][0] += double(tile[j]);
          } else if (own + j < p.m) {
            double* const sum = sums + (own + j) * p.d + first + lane;
            write(sum, anew ? double(tile[j]) : read(sum) * factor[j] + double(tile[j]));
          }
        }
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void store(const OnDevice& p, std::int64_t first_vector,
                                        double* sums) const {
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const std::int64_t vector = first_vector + warp * kEach + j;
      if constexpr (kKeptIn == Kept::kFew) {
#pragma unroll
        for (int k = 0; k < kFew; ++k) {
          const double sum = sum_of_group<kWarp>(kept[j][k], nullptr);
          if (lane == 0 && k < p.d && vector < p.m) write(sums + vector * p.d + k, sum);
        }
      } else if constexpr (kKeptIn == Kept::kFits) {
        if (lane < p.d && vector < p.m) write(sums + vector * p.d + lane, kept[j][0]);
      }
    }
  }
};

// Numbers that the warps' rooms for weights take.
constexpr int room_of(Kept kept) { return kept == Kept::kFew ? 0 : kThreads * kEach; }
static_assert(kRows * kColumnStep <= kDepth * kVectorStep);

// A tile of vectors with one of the splits of the data.
struct Part {
  std::int64_t first_vector, split, begin, end;

  __device__ __forceinline__ Part(const OnDevice& p, std::int64_t block, std::int64_t split)
      : first_vector(block * kVectors),
        split(split),
        begin(split * p.split_rows),
        end(begin + p.split_rows < p.n ? begin + p.split_rows : p.n) {}
};

// The largest over a warp. NaN never is.
template <class T>
__device__ __forceinline__ T largest_of_warp(T x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

template <class Storage, Kept kKeptIn>
__global__ void __launch_bounds__(kThreads, 1)
    sums_kernel(const __grid_constant__ ForwardOnDevice p) {
  using T = ComputeOf<Storage>;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const Tiles<T> tiles(false);
  T* const weights = tiles.rest + warp * kWarp * kEach;
  const T temperature = T(temperature_of(p));
  const std::int64_t blocks = (p.m + kVectors - 1) / kVectors;
  for (std::int64_t unit = blockIdx.x; unit < blocks * p.splits; unit += gridDim.x) {
    const auto [first_vector, split, begin, end] = Part(p, unit % blocks, unit / blocks);
    double* const means = p.means + split * p.m * p.d;
    WeightedSums<Storage, kKeptIn, false> sums;
    T largest[kEach];
    double mass[kEach] = {};
#pragma unroll
    for (int j = 0; j < kEach; ++j) largest[j] = -T(INFINITY);
    for (std::int64_t first = begin; first < end; first += kRows) {
      const Pairs<T> pairs = pairs_of<Storage>(p, nullptr, first, end, first_vector, tiles);
      const bool exists = first + lane < end;
      const T z = exists ? read(static_cast<const T*>(p.log_normaliser) + first + lane) : T(0);
      T weight[kEach];
      double factor[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const T log_weight = exists ? -(pairs.distance[j] / temperature) - z : -T(INFINITY);
        const T of_tile = largest_of_warp(log_weight);
        const T larger = of_tile > largest[j] ? of_tile : largest[j];
        const T bound = finite_or_zero(larger);
        weight[j] = exists ? exp_of(log_weight - bound) : T(0);
        factor[j] = double(exp_of(largest[j] - bound));
        mass[j] = mass[j] * factor[j] + double(weight[j]);
        largest[j] = larger;
      }
      sums.scale(factor);
      sums.add(p, tiles, weight, first, end, first_vector, weights, means, factor, first == begin);
    }
    sums.store(p, first_vector, means);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const std::int64_t vector = first_vector + warp * kEach + j;
      const double whole = sum_of_group<kWarp>(mass[j], nullptr);
      if (lane == 0 && vector < p.m) {
        write(p.bounds + split * p.m + vector, double(largest[j]));
        write(p.masses + split * p.m + vector, whole);
      }
    }
  }
}

// Joins the splits, in their order: a thread has one dimension of a vector.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    join_kernel(const __grid_constant__ ForwardOnDevice p) {
  const std::int64_t columns = p.d > 0 ? p.d : 1, step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t k = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; k < p.m * columns;
       k += step) {
    const std::int64_t vector = k / columns, column = k % columns;
    double largest = -INFINITY;
    for (std::int64_t split = 0; split < p.splits; ++split) {
      const double bound = read(p.bounds + split * p.m + vector);
      largest = bound > largest ? bound : largest;
    }
    const double shift = finite_or_zero(largest);
    double mass = 0, mean = 0;
    for (std::int64_t split = 0; split < p.splits; ++split) {
      const std::int64_t of = split * p.m + vector;
      const double scale = exp(read(p.bounds + of) - shift);
      mass += read(p.masses + of) * scale;
      if (p.d > 0) mean += read(p.means + of * p.d + column) * scale;
    }
    if (p.d > 0) write(const_cast<T*>(at<T>(p.mapped, vector, column)), T(mean / mass));
    if (column == 0) write(static_cast<T*>(p.log_mass) + vector, T(shift + log(mass)));
  }
}

// Weights of a thread's pairs: w and p, and e, the gradient that comes through the map. Without a
// gradient e is zero, even where w is NaN.
template <class T>
struct Weights {
  T w[kEach], p[kEach], e[kEach];
};

template <class Storage, class T = ComputeOf<Storage>>
__device__ __forceinline__ Weights<T> weights_of(const BackwardOnDevice& p, const Pairs<T>& pairs,
                                                 T temperature, T normaliser, bool row_exists,
                                                 std::int64_t first_vector) {
  Weights<T> weights{};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const std::int64_t vector = first_vector + threadIdx.x / kWarp * kEach + j;
    if (!row_exists || vector >= p.m) continue;
    const T log_weight = -(pairs.distance[j] / temperature) - normaliser;
    weights.w[j] = exp_of(log_weight - read(static_cast<const T*>(p.log_mass) + vector));
    weights.p[j] = exp_of(log_weight + prior_of<Storage>(p, vector));
    if (p.grad_mapped.data != nullptr) weights.e[j] = weights.w[j] * pairs.product[j];
  }
  return weights;
}

__device__ __forceinline__ const Matrix* gradient_of(const BackwardOnDevice& p) {
  return p.grad_mapped.data == nullptr ? nullptr : &p.grad_mapped;
}

// What a row's vectors share, t_i, and the gradient to x.
template <class Storage>
__global__ void __launch_bounds__(kThreads, 1)
    rows_backward_kernel(const __grid_constant__ BackwardOnDevice p) {
  using T = ComputeOf<Storage>;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const Matrix* const grad = gradient_of(p);
  const Tiles<T> tiles(grad != nullptr);
  T* const shares = tiles.rest;  // [warp, row, kRun]
  const T temperature = T(temperature_of(p));
  for (std::int64_t first_row = std::int64_t(blockIdx.x) * kRows; first_row < p.n;
       first_row += std::int64_t(gridDim.x) * kRows) {
    const std::int64_t row = first_row + lane;
    const bool exists = row < p.n;
    const T normaliser = exists ? read(static_cast<const T*>(p.log_normaliser) + row) : T(0);
    T through_map = 0, whole = 0;
    for (std::int64_t first = 0; first < p.m; first += kVectors) {
      const Pairs<T> pairs = pairs_of<Storage>(p, grad, first_row, p.n, first, tiles);
      const Weights<T> weights =
          weights_of<Storage>(p, pairs, temperature, normaliser, exists, first);
      T e = 0, all = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        e += weights.e[j];
        all += weights.p[j];
      }
      through_map += e;
      whole += all;
    }
    shares[threadIdx.x] = through_map;
    shares[kThreads + threadIdx.x] = whole;
    __syncthreads();
    through_map = whole = 0;
    for (int k = 0; k < kWarps; ++k) {
      through_map += shares[k * kWarp + lane];
      whole += shares[kThreads + k * kWarp + lane];
    }
    T t = -through_map;
    if (exists && p.grad_log_normaliser.data != nullptr)
      t += read(static_cast<const T*>(p.grad_log_normaliser.data) +
                row * p.grad_log_normaliser.step);
    // The normaliser is rounded: the p of a row add up to one only nearly.
    if (whole > 0) t /= whole;
    if (warp == 0 && exists) write(static_cast<T*>(p.rest) + row, t);
    __syncthreads();
    if (p.grad_x.data == nullptr) continue;

    for (std::int64_t first = 0; first < p.m; first += kVectors) {
      const Pairs<T> pairs = pairs_of<Storage>(p, grad, first_row, p.n, first, tiles);
      const Weights<T> weights =
          weights_of<Storage>(p, pairs, temperature, normaliser, exists, first);
      T q[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) q[j] = T(2) * (weights.e[j] + t * weights.p[j]) / temperature;
      for (std::int64_t from = 0; from < p.d; from += kRun) {
        const int columns = p.d - from < kRun ? int(p.d - from) : kRun;
        load_tile<Storage>(p.x, first_row, p.n, from, columns, kRows, tiles.rows, kRowStep, 1);
        load_tile<Storage>(p.psi, first, p.m, from, columns, kVectors, tiles.vectors, 1,
                           kVectorStep);
        if (grad != nullptr)
          load_tile<T>(*grad, first, p.m, from, columns, kVectors, tiles.grads, 1, kVectorStep);
        __syncthreads();
        for (int k = 0; k < columns; ++k) {
          const T x = tiles.rows[lane * kRowStep + k];
          const int own = k * kVectorStep + warp * kEach;
          T share = 0;
#pragma unroll
          for (int j = 0; j < kEach; ++j) {
            if (first + warp * kEach + j >= p.m) break;
            T term = -q[j] * (x - tiles.vectors[own + j]);
            if (grad != nullptr) term += weights.w[j] * tiles.grads[own + j];
            share += term;
          }
          shares[threadIdx.x * kRun + k] = share;
        }
        __syncthreads();
        for (int k = threadIdx.x; k < kRows * columns; k += kThreads) {
          const int of_row = k / columns, column = k % columns;
          if (first_row + of_row >= p.n) continue;
          T sum = 0;
          for (int other = 0; other < kWarps; ++other)
            sum += shares[(other * kWarp + of_row) * kRun + column];
          if (p.sums != nullptr) {
            T* const kept = static_cast<T*>(p.sums) + (first_row + of_row) * p.d + from + column;
            if (first > 0) sum += read(kept);
            write(kept, sum);
          }
          if (first + kVectors >= p.m)
            write(const_cast<Storage*>(at<Storage>(p.grad_x, first_row + of_row, from + column)),
                  Narrow<Storage>::from(sum));
        }
        __syncthreads();
      }
    }
  }
}

template <class Storage, Kept kKeptIn>
__global__ void __launch_bounds__(kThreads, 1)
    vectors_backward_kernel(const __grid_constant__ BackwardOnDevice p) {
  using T = ComputeOf<Storage>;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const Matrix* const grad = gradient_of(p);
  const Tiles<T> tiles(grad != nullptr);
  T* const room = tiles.rest + warp * kWarp * kEach;
  const T temperature = T(temperature_of(p));
  const std::int64_t blocks = (p.m + kVectors - 1) / kVectors;
  const double ones[kEach] = {1, 1, 1, 1, 1, 1, 1, 1};
  for (std::int64_t unit = blockIdx.x; unit < blocks * p.splits; unit += gridDim.x) {
    const auto [first_vector, split, begin, end] = Part(p, unit % blocks, unit / blocks);
    double* const psi_sums = p.psi_sums == nullptr ? nullptr : p.psi_sums + split * p.m * p.d;
    WeightedSums<Storage, kKeptIn, true> sums;
    double to_prior[kEach] = {}, to_beta = 0;
    for (std::int64_t first = begin; first < end; first += kRows) {
      const Pairs<T> pairs = pairs_of<Storage>(p, grad, first, end, first_vector, tiles);
      const std::int64_t row = first + lane;
      const bool exists = row < end;
      const T normaliser = exists ? read(static_cast<const T*>(p.log_normaliser) + row) : T(0);
      const T t = exists ? read(static_cast<const T*>(p.rest) + row) : T(0);
      const Weights<T> weights =
          weights_of<Storage>(p, pairs, temperature, normaliser, exists, first_vector);
      T q[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        q[j] = 0;
        if (!exists || first_vector + warp * kEach + j >= p.m) continue;
        const T tp = t * weights.p[j];
        to_prior[j] += double(tp);
        q[j] = weights.e[j] + tp;
        to_beta += double(q[j] * pairs.distance[j]);
      }
      if (psi_sums != nullptr)
        sums.add(p, tiles, q, first, end, first_vector, room, psi_sums, ones, first == begin);
    }
    if (psi_sums != nullptr) sums.store(p, first_vector, psi_sums);
    if (p.prior_sums != nullptr) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const std::int64_t vector = first_vector + warp * kEach + j;
        const double sum = sum_of_group<kWarp>(to_prior[j], nullptr);
        if (lane == 0 && vector < p.m) write(p.prior_sums + split * p.m + vector, sum);
      }
    }
    if (p.beta_sums != nullptr) {
      __syncthreads();
      const double sum = sum_of_group<kThreads>(to_beta, shared_memory<double>());
      if (threadIdx.x == 0) write(p.beta_sums + unit, sum);
    }
  }
}

// Joins the splits, in their order.
template <class Storage>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    join_backward_kernel(const __grid_constant__ BackwardOnDevice p) {
  using T = ComputeOf<Storage>;
  const double temperature = temperature_of(p);
  const std::int64_t columns = p.d > 0 ? p.d : 1, step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t k = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; k < p.m * columns;
       k += step) {
    const std::int64_t vector = k / columns, column = k % columns;
    if (p.psi_sums != nullptr && p.d > 0) {
      double sum = 0;
      for (std::int64_t split = 0; split < p.splits; ++split)
        sum += read(p.psi_sums + (split * p.m + vector) * p.d + column);
      write(const_cast<Storage*>(at<Storage>(p.grad_psi, vector, column)),
            Narrow<Storage>::from(T(sum * 2 / temperature)));
    }
    if (p.prior_sums != nullptr && column == 0) {
      double sum = 0;
      for (std::int64_t split = 0; split < p.splits; ++split)
        sum += read(p.prior_sums + split * p.m + vector);
      write(static_cast<Storage*>(p.grad_log_prior.data) + vector * p.grad_log_prior.step,
            Narrow<Storage>::from(T(sum)));
    }
  }
  if (p.beta_sums == nullptr || blockIdx.x != 0) return;
  const std::int64_t parts = p.splits * ((p.m + kVectors - 1) / kVectors);
  double sum = 0;
  for (std::int64_t k = threadIdx.x; k < parts; k += kThreads) sum += read(p.beta_sums + k);
  sum = sum_of_group<kThreads>(sum, shared_memory<double>());
  if (threadIdx.x != 0) return;
  sum /= temperature * temperature;
  switch (p.beta_dtype) {
    case DType::kFloat64:
      return write(static_cast<double*>(p.grad_beta), sum);
    case DType::kBFloat16:
      return write(static_cast<BFloat16*>(p.grad_beta), Narrow<BFloat16>::from(float(sum)));
    case DType::kFloat16:
      return write(static_cast<Float16*>(p.grad_beta), Narrow<Float16>::from(float(sum)));
    default:
      return write(static_cast<float*>(p.grad_beta), float(sum));
  }
}

template <Kept kKeptIn>
struct Of {};

template <class Visitor>
void visit_kept(std::int64_t d, Visitor visitor) {
  if (d <= kFew) return visitor(Of<Kept::kFew>{});
  if (d <= kColumns) return visitor(Of<Kept::kFits>{});
  visitor(Of<Kept::kBeyond>{});
}

}  // namespace
}  // namespace cuda

void equilibrium_map_forward_cuda(const equilibrium_map::ForwardOnDevice& params,
                                  cudaStream_t stream) {
  using namespace cuda;
  const std::int64_t units = params.splits * ((params.m + kVectors - 1) / kVectors);
  const std::int64_t joined = params.m * (params.d > 0 ? params.d : 1);
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    using T = ComputeOf<Storage>;
    launch(normaliser_kernel<Storage>, blocks_for(params.n, kRows), kThreads,
           Tiles<T>::bytes(false, 2 * kThreads), stream, params);
    visit_kept(params.d, [&]<Kept kKeptIn>(Of<kKeptIn>) {
      launch(sums_kernel<Storage, kKeptIn>, blocks_for(units, 1), kThreads,
             Tiles<T>::bytes(false, room_of(kKeptIn)), stream, params);
    });
    launch(join_kernel<T>, blocks_for(joined, kThreads), kThreads, 0, stream, params);
  });
}

void equilibrium_map_backward_cuda(const equilibrium_map::BackwardOnDevice& params,
                                   cudaStream_t stream) {
  using namespace cuda;
  const bool has_grad = params.grad_mapped.data != nullptr;
  const std::int64_t units = params.splits * ((params.m + kVectors - 1) / kVectors);
  const std::int64_t joined = params.m * (params.d > 0 ? params.d : 1);
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    using T = ComputeOf<Storage>;
    launch(rows_backward_kernel<Storage>, blocks_for(params.n, kRows), kThreads,
           Tiles<T>::bytes(has_grad, kThreads * kRun), stream, params);
    if (params.psi_sums == nullptr && params.prior_sums == nullptr && params.beta_sums == nullptr)
      return;
    visit_kept(params.d, [&]<Kept kKeptIn>(Of<kKeptIn>) {
      launch(vectors_backward_kernel<Storage, kKeptIn>, blocks_for(units, 1), kThreads,
             Tiles<T>::bytes(has_grad, room_of(kKeptIn)), stream, params);
    });
    launch(join_backward_kernel<Storage>, blocks_for(joined, kThreads), kThreads,
           kWarps * sizeof(double), stream, params);
  });
}

}  // namespace geco
