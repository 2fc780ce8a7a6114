// Normalised cross-correlation of patches, forward and backward; the formulas are in
// include/pncc.h. A block has a tile of 32 x 32 patches (x 4 in volumes, of 8 rows then): a thread
// has kOwn of them. It goes through the pixels they span by kRows rows at a time. Those are staged
// in shared memory, each thread adds the pixels of a row under one patch, and then those sums over
// the rows of its own patches: windows are separable, and a patch of k x k costs 2 k additions of
// five sums. Nothing is subtracted from a running sum, so what isn't finite stays in its patches.
// Backward has two launches: the first also writes a patch's coefficients, float64, the second adds
// them over the patches that hold a pixel, in the same way. As on the CPU, values are shifted by a
// pivot, which a launch before finds, and summed in twice their precision.
// What has to move is x and y once, and the scores. The pivot takes one more reading of the images;
// more is read where tiles overlap, by (1 + (k - 1) / 32)^2, and the coefficients move twice.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"
#include "include/pncc.h"

namespace geco {
namespace cuda {
namespace {

using pncc::kDims;
using pncc::OnDevice;
using pncc::Problem;

constexpr int kOwn = pncc::kOwn;
constexpr int kRows = kThreads / kWarp;  // staged at a time: one for each warp
static_assert(pncc::kTile == kWarp && pncc::kTileRows == kRows);

// A sum in twice the precision of T.
template <class T>
struct Wide {
  double value = 0;

  __device__ __forceinline__ void add(double x) { value += x; }
  __device__ __forceinline__ void add(const Wide& other) { value += other.value; }
  __device__ __forceinline__ double narrow() const { return value; }
  static __device__ __forceinline__ Wide difference(double x, double y) { return {x - y}; }
  static __device__ __forceinline__ Wide product(Wide x, Wide y) { return {x.value * y.value}; }
  __device__ __forceinline__ Wide operator-() const { return {-value}; }
};

// "double-double": hi + lo (Knuth, Dekker).
template <>
struct Wide<double> {
  double hi = 0, lo = 0;

  static __device__ __forceinline__ Wide of_sum(double x, double y) {
    const double sum = x + y, part = sum - x;
    return {sum, (x - (sum - part)) + (y - part)};
  }
  static __device__ __forceinline__ Wide of_product(double x, double y) {
    const double product = x * y;
    return {product, fma(x, y, -product)};
  }
  static __device__ __forceinline__ Wide ordered(double x, double y) {
    const double sum = x + y;
    return {sum, y - (sum - x)};
  }
  static __device__ __forceinline__ Wide product(Wide x, Wide y) {
    const Wide p = of_product(x.hi, y.hi);
    return ordered(p.hi, p.lo + (x.hi * y.lo + x.lo * y.hi));
  }
  __device__ __forceinline__ Wide operator-() const { return {-hi, -lo}; }
  __device__ __forceinline__ void add(double x) { add(Wide{x, 0}); }
  __device__ __forceinline__ void add(const Wide& other) {
    const Wide sum = of_sum(hi, other.hi);
    *this = ordered(sum.hi, sum.lo + (lo + other.lo));
  }
  __device__ __forceinline__ double narrow() const { return hi + lo; }
  static __device__ __forceinline__ Wide difference(double x, double y) { return of_sum(x, -y); }
};

// a b - c d
template <class T>
__device__ __forceinline__ Wide<T> difference_of_products(Wide<T> a, Wide<T> b, Wide<T> c,
                                                          Wide<T> d) {
  Wide<T> result = Wide<T>::product(a, b);
  result.add(-Wide<T>::product(c, d));
  return result;
}

template <class Storage>
__device__ __forceinline__ const Storage* pixel_at(const Problem& p, int image, std::int64_t b,
                                                   std::int64_t c, std::int64_t z, std::int64_t y,
                                                   std::int64_t x) {
  const std::int64_t* const stride = p.image_stride[image];
  return static_cast<const Storage*>(p.image[image]) + b * stride[0] + c * stride[1] +
         z * stride[2] + y * stride[3] + x * stride[4];
}

// The value nearer to zero; of two as near the positive one. What isn't finite never is.
__device__ __forceinline__ double nearer(double x, double y) {
  return fabs(x) < fabs(y) || (fabs(x) == fabs(y) && x > y) ? x : y;
}

// Values nearest to zero of the parts of an image's group of channels.
template <class Storage>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    pivots_kernel(const __grid_constant__ OnDevice p) {
  const std::int64_t pixels = p.channels * p.size[0] * p.size[1] * p.size[2];
  const std::int64_t units = 2 * p.batch * p.groups * p.parts;
  double* const scratch = shared_memory<double>();
  for (std::int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const std::int64_t part = unit % p.parts, plane = unit / p.parts;
    const std::int64_t g = plane % p.groups, b = plane / p.groups % p.batch;
    const int image = int(plane / p.groups / p.batch);
    const std::int64_t each = (pixels + p.parts - 1) / p.parts;
    const std::int64_t end = (part + 1) * each < pixels ? (part + 1) * each : pixels;
    double nearest = INFINITY;
    for (std::int64_t k = part * each + threadIdx.x; k < end; k += kThreads) {
      std::int64_t at[kDims], rest = k;
#pragma unroll
      for (int d = kDims - 1; d >= 0; --d) {
        at[d] = rest % p.size[d];
        rest /= p.size[d];
      }
      const std::int64_t c = g * p.channels + rest;
      nearest = nearer(double(widen(read(pixel_at<Storage>(p, image, b, c, at[0], at[1], at[2])))),
                       nearest);
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      nearest = nearer(__shfl_xor_sync(kAllLanes, nearest, distance), nearest);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = nearest;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int k = 1; k < kThreads / kWarp; ++k) nearest = nearer(scratch[k], nearest);
      write(p.pivots + unit, nearest);
    }
    __syncthreads();
  }
}

// What is subtracted from an image's values before they are summed: the one nearest to zero, so
// that no value x is farther from it than 2 |x|; zero where zeros surround the image.
__device__ __forceinline__ double pivot_of(const OnDevice& p, int image, std::int64_t b,
                                           std::int64_t g) {
  if (p.pivots == nullptr) return 0;
  const double* const of = p.pivots + ((image * p.batch + b) * p.groups + g) * p.parts;
  double nearest = INFINITY;
  for (std::int64_t part = 0; part < p.parts; ++part) nearest = nearer(read(of + part), nearest);
  return nearest - nearest == 0 ? nearest : 0;
}

// Where windows get what they add up: pixels under patches, as the five sums of x, y, x^2, y^2, x
// y.
template <class Storage>
struct Pixels {
  using T = ComputeOf<Storage>;
  static constexpr int kFields = 5, kStaged = 2, kColumns = 128;
  using Stage = T;
  enum { kX, kY, kXX, kYY, kXY };

  const Problem& p;
  std::int64_t b, g;
  double pivots[2];

  // The window of a patch in dimension d; pixels outside the image are zeros.
  __device__ __forceinline__ std::int64_t low(int d, std::int64_t patch) const {
    return patch * p.stride[d] - p.pad[d];
  }
  __device__ __forceinline__ std::int64_t high(int d, std::int64_t patch) const {
    return low(d, patch) + p.patch[d];
  }
  __device__ __forceinline__ std::int64_t layers() const { return p.channels; }
  __device__ __forceinline__ T load(int image, std::int64_t layer, std::int64_t z, std::int64_t y,
                                    std::int64_t x) const {
    const bool inside =
        z >= 0 && z < p.size[0] && y >= 0 && y < p.size[1] && x >= 0 && x < p.size[2];
    return inside ? widen(read(pixel_at<Storage>(p, image, b, g * p.channels + layer, z, y, x)))
                  : T(0);
  }
  __device__ __forceinline__ void add(Wide<T> (&sums)[kFields], const T (&values)[kStaged]) const {
    const Wide<T> x = Wide<T>::difference(double(values[0]), pivots[0]);
    const Wide<T> y = Wide<T>::difference(double(values[1]), pivots[1]);
    sums[kX].add(x);
    sums[kY].add(y);
    sums[kXX].add(Wide<T>::product(x, x));
    sums[kYY].add(Wide<T>::product(y, y));
    sums[kXY].add(Wide<T>::product(x, y));
  }
};

__device__ __forceinline__ double* coefficient_at(const OnDevice& p, int field, std::int64_t b,
                                                  std::int64_t g, std::int64_t z, std::int64_t y,
                                                  std::int64_t x) {
  const std::int64_t plane = (field * p.batch + b) * p.groups + g;
  return p.coefficients + ((plane * p.count[0] + z) * p.count[1] + y) * p.count[2] + x;
}

// Coefficients that are stored, of `count` that are added up: in float64 the differences in two
// parts.
template <class T>
constexpr int stored_fields(int count) {
  return sizeof(T) == sizeof(double) ? count + count / 2 : count;
}

// Coefficients of the patches that hold a pixel.
template <class Storage, int kCount>
struct Coefficients {
  using T = ComputeOf<Storage>;
  // In float64 the differences' rest follows.
  static constexpr int kColumns = 64;
  static constexpr int kFields = kCount, kStaged = stored_fields<T>(kCount);
  using Stage = double;

  const OnDevice& p;
  std::int64_t b, g;

  __device__ __forceinline__ std::int64_t low(int d, std::int64_t pixel) const {
    const std::int64_t first = pixel + p.pad[d] - p.patch[d] + 1;
    return first <= 0 ? 0 : (first + p.stride[d] - 1) / p.stride[d];
  }
  __device__ __forceinline__ std::int64_t high(int d, std::int64_t pixel) const {
    const std::int64_t end = (pixel + p.pad[d]) / p.stride[d] + 1;
    return end < p.count[d] ? end : p.count[d];
  }
  __device__ __forceinline__ std::int64_t layers() const { return 1; }
  __device__ __forceinline__ double load(int field, std::int64_t, std::int64_t z, std::int64_t y,
                                         std::int64_t x) const {
    return read(coefficient_at(p, field, b, g, z, y, x));
  }
  __device__ __forceinline__ void add(Wide<T> (&sums)[kFields],
                                      const double (&values)[kStaged]) const {
#pragma unroll
    for (int f = 0; f < kFields; ++f) sums[f].add(values[f]);
    if constexpr (kStaged > kFields) {
      sums[2].add(values[kFields]);
      if constexpr (kFields == 5) sums[4].add(values[kFields + 1]);
    }
  }
};

// A block's tile of windows, and a thread's own ones: in volumes in different planes, else in rows.
struct Tile {
  std::int64_t first[kDims], end[kDims];
  bool is_deep;

  __device__ __forceinline__ Tile(std::int64_t tile, const std::int64_t (&size)[kDims],
                                  const std::int64_t (&tiles)[kDims],
                                  const std::int64_t (&total)[kDims])
      : is_deep(size[0] > 1) {
#pragma unroll
    for (int d = kDims - 1; d >= 0; --d) {
      first[d] = tile % tiles[d] * size[d];
      end[d] = first[d] + size[d] < total[d] ? first[d] + size[d] : total[d];
      tile /= tiles[d];
    }
  }
  __device__ __forceinline__ std::int64_t z(int own) const {
    return first[0] + (is_deep ? own : 0);
  }
  __device__ __forceinline__ std::int64_t y(int own) const {
    return first[1] + threadIdx.x / kWarp + (is_deep ? 0 : own * kRows);
  }
  __device__ __forceinline__ std::int64_t x() const { return first[2] + threadIdx.x % kWarp; }
  __device__ __forceinline__ bool has(int own) const {
    return z(own) < end[0] && y(own) < end[1] && x() < end[2];
  }
};

// Numbers of shared memory, in bytes, that `add_windows` needs.
template <class Source>
constexpr std::size_t shared_bytes() {
  return sizeof(Wide<typename Source::T>) * Source::kFields * kThreads +
         sizeof(typename Source::Stage) * Source::kStaged * kRows * Source::kColumns;
}

// Adds up what is under a thread's own windows.
template <class Source, class T = typename Source::T>
__device__ __forceinline__ void add_windows(const Source& source, const Tile& tile,
                                            Wide<T> (&sums)[kOwn][Source::kFields]) {
  using Stage = typename Source::Stage;
  constexpr int kFields = Source::kFields, kStaged = Source::kStaged, kColumns = Source::kColumns;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  Wide<T>* const along = shared_memory<Wide<T>>();  // [field, row, window]
  Stage* const staged = reinterpret_cast<Stage*>(along + kFields * kThreads);
  const std::int64_t first_x = source.low(2, tile.first[2]),
                     end_x = source.high(2, tile.end[2] - 1);
  const std::int64_t first_y = source.low(1, tile.first[1]),
                     end_y = source.high(1, tile.end[1] - 1);
  const std::int64_t first_z = source.low(0, tile.first[0]),
                     end_z = source.high(0, tile.end[0] - 1);
  const bool has_window = tile.x() < tile.end[2];
  const std::int64_t low = has_window ? source.low(2, tile.x()) : 0;
  const std::int64_t high = has_window ? source.high(2, tile.x()) : 0;
  for (std::int64_t layer = 0; layer < source.layers(); ++layer)
    for (std::int64_t z = first_z; z < end_z; ++z)
      for (std::int64_t y = first_y; y < end_y; y += kRows) {
        const int rows = end_y - y < kRows ? int(end_y - y) : kRows;
        Wide<T> own[kFields];
        for (std::int64_t x = first_x; x < end_x; x += kColumns) {
          const int columns = end_x - x < kColumns ? int(end_x - x) : kColumns;
          __syncthreads();
          for (int k = threadIdx.x; k < rows * columns; k += kThreads) {
            const int row = k / columns, column = k % columns;
#pragma unroll
            for (int s = 0; s < kStaged; ++s)
              staged[(s * kRows + row) * kColumns + column] =
                  source.load(s, layer, z, y + row, x + column);
          }
          __syncthreads();
          if (warp >= rows) continue;
          const int begin = int((low > x ? low : x) - x);
          const int end = high < x + columns ? int(high - x) : columns;
          for (int column = begin; column < end; ++column) {
            Stage values[kStaged];
#pragma unroll
            for (int s = 0; s < kStaged; ++s)
              values[s] = staged[(s * kRows + warp) * kColumns + column];
            source.add(own, values);
          }
        }
#pragma unroll
        for (int f = 0; f < kFields; ++f) along[f * kThreads + threadIdx.x] = own[f];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (!tile.has(i) || z < source.low(0, tile.z(i)) || z >= source.high(0, tile.z(i)))
            continue;
          const std::int64_t from = source.low(1, tile.y(i)) - y,
                             to = source.high(1, tile.y(i)) - y;
          const int begin = from > 0 ? int(from < rows ? from : rows) : 0;
          const int end = to < rows ? int(to) : rows;
          for (int row = begin; row < end; ++row)
#pragma unroll
            for (int f = 0; f < kFields; ++f)
              sums[i][f].add(along[f * kThreads + row * kWarp + lane]);
        }
      }
}

// From the sums of a patch to its score and A, Bx and By, each over the number of its values: as on
// the CPU variances and covariance are kept that many times as large.
struct Patch {
  double score, a, b_x, b_y;
};

// The larger of x and a bound; NaN stays.
__device__ __forceinline__ double at_least(double x, double bound) { return x < bound ? bound : x; }

template <class Storage, bool kSquared>
__device__ __forceinline__ Patch patch_of(const Problem& p,
                                          const Wide<ComputeOf<Storage>> (&sums)[5], double grad) {
  using Source = Pixels<Storage>;
  using W = Wide<ComputeOf<Storage>>;
  const double count = double(p.channels * p.patch[0] * p.patch[1] * p.patch[2]);
  const double eps = count * p.eps;
  const W x = sums[Source::kX], y = sums[Source::kY];
  const auto spread = [&](int square, W a, W b) {
    return difference_of_products(sums[square], W{count}, a, b).narrow();
  };
  const double c = spread(Source::kXY, x, y);
  const double spread_x = spread(Source::kXX, x, x), spread_y = spread(Source::kYY, y, y);
  // A patch of one value has no gradient, to the last bit.
  if (count == 1) grad *= 0;
  if constexpr (kSquared) {
    const double v_x = 1 / at_least(spread_x, eps), v_y = 1 / at_least(spread_y, eps);
    const double top = c * c + count * count * p.smooth;
    const double twice = 2 * grad * (v_x * v_y), b = twice * top;
    return {top * (v_x * v_y), twice * c, spread_x < eps ? 0 : b * v_x,
            spread_y < eps ? 0 : b * v_y};
  } else {
    const double n_x = 1 / sqrt(at_least(spread_x, 0) + eps);
    const double n_y = 1 / sqrt(at_least(spread_y, 0) + eps);
    const double score = c * (n_x * n_y), b = grad * score;
    return {score > 1    ? 1
            : score < -1 ? -1
                         : score,
            grad * (n_x * n_y), b * (n_x * n_x), b * (n_y * n_y)};
  }
}

// The gradient of a patch's score.
template <class Storage>
__device__ __forceinline__ double gradient_of(const OnDevice& p, std::int64_t b, std::int64_t g,
                                              std::int64_t z, std::int64_t y, std::int64_t x) {
  using T = ComputeOf<Storage>;
  if (p.grad == nullptr) return double(T(p.scale));
  const std::int64_t* const stride = p.score_stride;
  // A sum's gradient has the type of the arithmetic, a score's that of the images.
  if (p.reduced)
    return double(T(double(read(static_cast<const T*>(p.grad) + b * stride[0])) * p.scale));
  return double(widen(read(static_cast<const Storage*>(p.grad) + b * stride[0] + g * stride[1] +
                           z * stride[2] + y * stride[3] + x * stride[4])));
}

// Scores or their sums, and coefficients: with kCount of 3 those of the gradient to y, A, By and
// A sum x - By sum y, with 5 those to x, too.
template <class Storage, bool kSquared, int kCount>
__global__ void __launch_bounds__(kThreads, 1) scores_kernel(const __grid_constant__ OnDevice p) {
  using T = ComputeOf<Storage>;
  using Source = Pixels<Storage>;
  for (std::int64_t task = blockIdx.x; task < p.tasks_on_device; task += gridDim.x) {
    const std::int64_t plane = task / p.tiles_of_group, b = plane / p.groups, g = plane % p.groups;
    const Tile tile(task % p.tiles_of_group, p.tile, p.tiles, p.count);
    const Source source{p, b, g, {pivot_of(p, 0, b, g), pivot_of(p, 1, b, g)}};
    Wide<T> sums[kOwn][Source::kFields];
    add_windows(source, tile, sums);
    double total = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!tile.has(i)) continue;
      const std::int64_t z = tile.z(i), y = tile.y(i), x = tile.x();
      const double grad = kCount > 0 ? gradient_of<Storage>(p, b, g, z, y, x) : 0;
      const Patch patch = patch_of<Storage, kSquared>(p, sums[i], grad);
      if (p.scores != nullptr)
        write(static_cast<Storage*>(p.scores) + b * p.score_stride[0] + g * p.score_stride[1] +
                  z * p.score_stride[2] + y * p.score_stride[3] + x * p.score_stride[4],
              Narrow<Storage>::from(T(patch.score)));
      total += double(T(patch.score));
      if constexpr (kCount > 0) {
        const Wide<T> sum_x = sums[i][Source::kX], sum_y = sums[i][Source::kY], a{patch.a};
        const auto put = [&](int field, double value) {
          write(coefficient_at(p, field, b, g, z, y, x), value);
        };
        const auto put_wide = [&](int field, int rest, Wide<T> value) {
          if constexpr (sizeof(T) == sizeof(double)) {
            put(field, value.hi);
            put(rest, value.lo);
          } else {
            put(field, value.value);
          }
        };
        put(0, patch.a);
        put(1, patch.b_y);
        put_wide(2, kCount, difference_of_products(a, sum_x, Wide<T>{patch.b_y}, sum_y));
        if constexpr (kCount == 5) {
          put(3, patch.b_x);
          put_wide(4, kCount + 1, difference_of_products(a, sum_y, Wide<T>{patch.b_x}, sum_x));
        }
      }
    }
    if (p.partial == nullptr) continue;
    __syncthreads();
    total = sum_of_group<kThreads>(total, shared_memory<double>());
    if (threadIdx.x == 0) write(p.partial + task, total);
  }
}

template <class Storage, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    gradients_kernel(const __grid_constant__ OnDevice p) {
  using T = ComputeOf<Storage>;
  using Source = Coefficients<Storage, kCount>;
  const double count = double(p.channels * p.patch[0] * p.patch[1] * p.patch[2]);
  for (std::int64_t task = blockIdx.x; task < p.pixel_tasks; task += gridDim.x) {
    const std::int64_t plane = task / p.pixel_tiles_of_group;
    const std::int64_t b = plane / p.groups, g = plane % p.groups;
    const Tile tile(task % p.pixel_tiles_of_group, p.pixel_tile, p.pixel_tiles, p.size);
    const double pivot_x = pivot_of(p, 0, b, g), pivot_y = pivot_of(p, 1, b, g);
    Wide<T> sums[kOwn][kCount];
    add_windows(Source{p, b, g}, tile, sums);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!tile.has(i)) continue;
      const std::int64_t pixel[] = {tile.z(i), tile.y(i), tile.x()};
      const Wide<T>(&s)[kCount] = sums[i];
      for (std::int64_t c = g * p.channels; c < (g + 1) * p.channels; ++c) {
        const auto value = [&](int image, double pivot) {
          const Storage* const from =
              pixel_at<Storage>(p, image, b, c, pixel[0], pixel[1], pixel[2]);
          return Wide<T>::difference(double(widen(read(from))), pivot);
        };
        const Wide<T> x = value(0, pivot_x), y = value(1, pivot_y);
        const auto put = [&](int image, Wide<T> product, Wide<T> rest) {
          product = Wide<T>::product(product, Wide<T>{count});
          product.add(-rest);
          const double value = product.narrow();
          const std::int64_t* const stride = p.grad_image_stride[image];
          const std::int64_t to = b * stride[0] + c * stride[1] + pixel[0] * stride[2] +
                                  pixel[1] * stride[3] + pixel[2] * stride[4];
          if (p.grad_dtype == p.dtype)
            write(static_cast<Storage*>(p.grad_image[image]) + to, Narrow<Storage>::from(T(value)));
          else
            write(static_cast<T*>(p.grad_image[image]) + to, T(value));
        };
        put(1, difference_of_products(x, s[0], y, s[1]), s[2]);
        if constexpr (kCount == 5) put(0, difference_of_products(y, s[0], x, s[3]), s[4]);
      }
    }
  }
}

}  // namespace
}  // namespace cuda

void pncc_pivots_cuda(const pncc::OnDevice& params, cudaStream_t stream) {
  using namespace cuda;
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    launch(pivots_kernel<Storage>, blocks_for(2 * params.batch * params.groups * params.parts, 1),
           kThreads, kThreads / kWarp * sizeof(double), stream, params);
  });
}

void pncc_scores_cuda(const pncc::OnDevice& params, cudaStream_t stream) {
  using namespace cuda;
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    const auto run = [&](auto kernel) {
      launch(kernel, blocks_for(params.tasks_on_device, 1), kThreads,
             shared_bytes<Pixels<Storage>>(), stream, params);
    };
    const int count = params.coefficients == nullptr ? 0 : params.coefficient_fields();
    if (params.squared)
      count == 0   ? run(scores_kernel<Storage, true, 0>)
      : count == 3 ? run(scores_kernel<Storage, true, 3>)
                   : run(scores_kernel<Storage, true, 5>);
    else
      count == 0   ? run(scores_kernel<Storage, false, 0>)
      : count == 3 ? run(scores_kernel<Storage, false, 3>)
                   : run(scores_kernel<Storage, false, 5>);
  });
}

void pncc_gradients_cuda(const pncc::OnDevice& params, cudaStream_t stream) {
  using namespace cuda;
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    const auto run = [&]<int kCount>(Constant<kCount>) {
      launch(gradients_kernel<Storage, kCount>, blocks_for(params.pixel_tasks, 1), kThreads,
             shared_bytes<Coefficients<Storage, kCount>>(), stream, params);
    };
    params.coefficient_fields() == 3 ? run(Constant<3>{}) : run(Constant<5>{});
  });
}

}  // namespace geco
