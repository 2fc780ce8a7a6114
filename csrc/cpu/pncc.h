// pNCC and LNCC on the CPU.
#pragma once

#include <algorithm>

#include "cpu/wide.h"
#include "include/pncc.h"

namespace geco::cpu {
namespace {

using pncc::kDims;
using pncc::Problem;

constexpr std::int64_t kLane = kLanes<double>;

inline std::int64_t whole_vectors(std::int64_t n) { return (n + kLane - 1) / kLane * kLane; }

// Hands out a thread's scratch memory; without memory it only measures.
struct Arena {
  double* base;
  std::int64_t used = 0;
  double* take(std::int64_t doubles) {
    double* taken = base == nullptr ? nullptr : base + used;
    used += (doubles + 7) / 8 * 8;
    return taken;
  }
  template <class T>
  T* take_as(std::int64_t count) {
    return reinterpret_cast<T*>(take((count * std::int64_t(sizeof(T)) + 7) / 8));
  }
};

struct Box {
  std::int64_t low[kDims], high[kDims];
  std::int64_t extent(int d) const { return high[d] - low[d]; }
};

// The patches that hold pixels of a box.
inline Box patches_over(const Problem& p, const Box& pixels) {
  Box box;
  for (int d = 0; d < kDims; ++d) {
    const std::int64_t first = pixels.low[d] + p.pad[d] - p.patch[d] + 1;
    box.low[d] = first <= 0 ? 0 : (first + p.stride[d] - 1) / p.stride[d];
    box.high[d] = std::min(p.count[d], (pixels.high[d] - 1 + p.pad[d]) / p.stride[d] + 1);
    box.high[d] = std::max(box.low[d], box.high[d]);
  }
  return box;
}

inline Box tile_box(const Problem& p, std::int64_t tile, const std::int64_t (&total)[kDims]) {
  Box box;
  for (int d = kDims - 1; d >= 0; --d) {
    box.low[d] = tile % p.tiles[d] * p.tile[d];
    box.high[d] = std::min(box.low[d] + p.tile[d], total[d]);
    tile /= p.tiles[d];
  }
  return box;
}

// Copies between rows of any stride and storage type and dense rows of the arithmetic's type.
template <class T, class Storage>
inline void gather(const Storage* from, std::int64_t stride, std::int64_t count, T* to) {
  constexpr std::int64_t kWidth = kLanes<T>;
  if (stride == 1) {
    std::int64_t j = 0;
    for (; j + kWidth <= count; j += kWidth) store(to + j, load(from + j));
    if (j < count) store(to + j, load(from + j, int(count - j)), int(count - j));
    return;
  }
  Storage buffer[kWidth] = {};
  for (std::int64_t j = 0; j < count; j += kWidth) {
    const int n = int(std::min(kWidth, count - j));
    for (int i = 0; i < n; ++i) buffer[i] = from[(j + i) * stride];
    store(to + j, load(buffer), n);
  }
}
template <class T, class Storage>
inline void scatter(const T* from, std::int64_t count, Storage* to, std::int64_t stride) {
  constexpr std::int64_t kWidth = kLanes<T>;
  if (stride == 1) {
    std::int64_t j = 0;
    for (; j + kWidth <= count; j += kWidth) store(to + j, load(from + j));
    if (j < count) store(to + j, load(from + j, int(count - j)), int(count - j));
    return;
  }
  Storage buffer[kWidth];
  for (std::int64_t j = 0; j < count; j += kWidth) {
    const int n = int(std::min(kWidth, count - j));
    store(buffer, load(from + j, n));
    for (int i = 0; i < n; ++i) to[(j + i) * stride] = buffer[i];
  }
}

// Sums of `k` neighbours along rows: out[i] = in[i] + ... + in[i + k - 1] for i < count, a multiple
// of the vector; `in` is overwritten by its own doublings, and read up to count + k.
template <class W>
inline void sum_along_row(double* in, std::int64_t in_plane, std::int64_t k, std::int64_t count,
                          double* out, std::int64_t out_plane) {
  std::int64_t done = 0;
  for (std::int64_t width = 1; width <= k; width *= 2) {
    if (k & width) {
      for (std::int64_t i = 0; i < count; i += kLane) {
        W sum = load_wide<W>(in + i + done, in_plane);
        if (done > 0) sum = load_wide<W>(out + i, out_plane) + sum;
        store_wide(out + i, out_plane, sum);
      }
      done += width;
    }
    if (2 * width <= k) {
      const std::int64_t needed = count + k - 2 * width + 1;
      for (std::int64_t i = 0; i < needed; i += kLane)
        store_wide(in + i, in_plane,
                   load_wide<W>(in + i, in_plane) + load_wide<W>(in + i + width, in_plane));
    }
  }
}

// Sums of `k` successive rows at every `stride`-th row, with van Herk's blocks: rows are cut into
// blocks of k, and a window is the end of one block and the beginning of the next. Nothing is
// subtracted, so what isn't finite leaves with its row, and a row costs three additions whatever k.
template <class W>
struct Slide {
  double* ends;    // [k][row]: sums from a row to its block's end; until the block is full, rows
  double* prefix;  // [row]
  std::int64_t k, stride, width;  // width: doubles in one plane of a row

  std::int64_t row() const { return width * kPlanes<W>; }
  static std::int64_t size(std::int64_t k, std::int64_t width) {
    return (k + 1) * width * kPlanes<W>;
  }
  void place(double* memory, std::int64_t k_, std::int64_t stride_, std::int64_t width_) {
    ends = memory;
    k = k_;
    stride = stride_;
    width = width_;
    prefix = memory + k * row();
  }

  enum Result { kNone, kPrefix, kBoth };

  template <bool kFirst, Result kResult, bool kKeep>
  void add(const double* in, double* slot, const double* end, double* out) {
    for (std::int64_t i = 0; i < width; i += kLane) {
      const W x = load_wide<W>(in + i, width);
      W sum = x;
      if constexpr (!kFirst) sum = load_wide<W>(prefix + i, width) + x;
      store_wide(prefix + i, width, sum);
      if constexpr (kKeep) store_wide(slot + i, width, x);
      if constexpr (kResult == kPrefix) store_wide(out + i, width, sum);
      if constexpr (kResult == kBoth)
        store_wide(out + i, width, sum + load_wide<W>(end + i, width));
    }
  }

  // Takes row r, counted from the first window's first; true if `out` holds the window that ends
  // there.
  bool push(std::int64_t r, const double* in, double* out) {
    if (stride >= k) {  // windows without overlap
      const std::int64_t j = r % stride;
      if (j >= k) return false;
      if (j == 0 && k > 1)
        add<true, kNone, false>(in, nullptr, nullptr, out);
      else if (j == 0)
        add<true, kPrefix, false>(in, nullptr, nullptr, out);
      else if (j < k - 1)
        add<false, kNone, false>(in, nullptr, nullptr, out);
      else
        add<false, kPrefix, false>(in, nullptr, nullptr, out);
      return j == k - 1;
    }
    const std::int64_t j = r % k;
    const std::int64_t start = r - k + 1;
    const bool due = start >= 0 && start % stride == 0;
    double* const slot = ends + j * row();
    if (j == k - 1) {
      if (due)
        add<false, kPrefix, true>(in, slot, nullptr, out);
      else
        add<false, kNone, true>(in, slot, nullptr, out);
      for (std::int64_t i = 0; i < width; i += kLane) {
        W sum = load_wide<W>(slot + i, width);
        for (std::int64_t q = k - 2; q > 0; --q) {
          double* const at = ends + q * row() + i;
          sum = load_wide<W>(at, width) + sum;
          store_wide(at, width, sum);
        }
      }
    } else if (j == 0) {
      if (due)
        add<true, kBoth, true>(in, slot, slot + row(), out);
      else
        add<true, kNone, true>(in, slot, nullptr, out);
    } else if (due) {
      add<false, kBoth, true>(in, slot, slot + row(), out);
    } else {
      add<false, kNone, true>(in, slot, nullptr, out);
    }
    return due;
  }
};

// Slides over rows, then over planes of them.
template <class W>
struct Slide2d {
  Slide<W> rows;
  Slide<W> planes;  // its memory is one row's; those of others follow
  double* memory;
  double* between;
  std::int64_t step;

  void place(Arena* arena, const std::int64_t (&patch)[kDims], const std::int64_t (&stride)[kDims],
             std::int64_t height, std::int64_t width) {
    rows.place(arena->take(Slide<W>::size(patch[1], width)), patch[1], stride[1], width);
    step = patch[0] > 1 ? Slide<W>::size(patch[0], width) : 0;
    memory = arena->take(step * height);
    planes.place(memory, patch[0], stride[0], width);
    between = arena->take(rows.row());
  }

  // Takes row r of plane z, both counted from the first window's; `out` may then hold a window.
  bool push(std::int64_t z, std::int64_t r, const double* in, double* out) {
    if (planes.k == 1) return z % planes.stride == 0 && rows.push(r, in, out);
    if (!rows.push(r, in, between)) return false;
    const std::int64_t y = (r - rows.k + 1) / rows.stride;
    planes.ends = memory + y * step;
    planes.prefix = planes.ends + planes.k * planes.row();
    return planes.push(z, between, out);
  }
};

// What is subtracted from an image before anything else: the median of a few finite values, so
// that neither an offset nor a stray value costs the sums their digits.
template <class T, class Storage>
inline T pivot(const Problem& p, const Storage* image, const std::int64_t* stride) {
  constexpr int kSamples = 9;
  const std::int64_t n = p.channels * p.size[0] * p.size[1] * p.size[2];
  T found[kSamples];
  int count = 0;
  for (int k = 0; k < kSamples; ++k) {
    std::int64_t rest = n / kSamples * k + n % kSamples * k / kSamples;
    std::int64_t offset = 0;
    for (int d = kDims - 1; d >= 0; --d) {
      offset += rest % p.size[d] * stride[2 + d];
      rest /= p.size[d];
    }
    T value;
    gather(image + offset + rest * stride[1], 1, 1, &value);
    if (value - value == 0) found[count++] = value;
  }
  if (count == 0) return 0;
  std::nth_element(found, found + count / 2, found + count);
  return found[count / 2];
}

// The sums of x, y, x^2, y^2 and x y over patches, from shifted values.
enum Sum { kX, kY, kXX, kYY, kXY, kSums };

template <class Storage>
struct Images {
  using T = typename Compute<Storage>::type;
  const Problem& p;
  const Storage* data[2];
  T pivots[2];

  Images(const Problem& problem, std::int64_t b, std::int64_t g) : p(problem) {
    for (int k = 0; k < 2; ++k) {
      data[k] = static_cast<const Storage*>(p.image[k]) + b * p.image_stride[k][0] +
                g * p.channels * p.image_stride[k][1];
      pivots[k] = pivot<T>(p, data[k], p.image_stride[k]);
    }
  }

  // `count` values of a row from padded column `column` on, `length` with the zeros that follow.
  void row(int k, std::int64_t c, std::int64_t z, std::int64_t r, std::int64_t column,
           std::int64_t count, std::int64_t length, T* to) const {
    const bool inside = z >= 0 && z < p.size[0] && r >= 0 && r < p.size[1];
    const std::int64_t first = std::max<std::int64_t>(column - p.pad[2], 0);
    const std::int64_t last = inside ? std::min(column - p.pad[2] + count, p.size[2]) : first;
    if (last <= first) {
      std::fill(to, to + length, T(0));
      return;
    }
    T* const from = to + (first - (column - p.pad[2]));
    T* const end = from + (last - first);
    std::fill(to, from, T(0));
    const std::int64_t* const stride = p.image_stride[k];
    gather(data[k] + c * stride[1] + z * stride[2] + r * stride[3] + first * stride[4], stride[4],
           last - first, from);
    std::fill(end, to + length, T(0));
  }
};

// Computes the sums of a box of patches, row by row.
template <class Storage>
struct Windows {
  using T = typename Compute<Storage>::type;
  using W = typename WideOf<T>::type;
  static constexpr int kChannels = 4;  // staged together

  const Problem& p;
  std::int64_t width;   // patches in a row, rounded up
  std::int64_t dense;   // windows in a row at stride 1, rounded up
  std::int64_t length;  // values that they span and vectors may touch
  T* staged[2];
  double *fields, *along, *picked, *out;
  Slide2d<W> slide;

  Windows(const Problem& problem, const Box& box, Arena* arena) : p(problem) {
    width = whole_vectors(box.extent(2));
    dense = p.stride[2] == 1 ? width : whole_vectors((box.extent(2) - 1) * p.stride[2] + 1);
    length = dense + whole_vectors(p.patch[2]) + kLane;
    for (T*& rows : staged) rows = arena->take_as<T>(kChannels * length);
    fields = arena->take(kSums * length * kPlanes<W>);
    along = arena->take(kSums * dense * kPlanes<W>);
    picked = p.stride[2] == 1 ? along : arena->take(kSums * width * kPlanes<W>);
    out = arena->take(kSums * width * kPlanes<W>);
    slide.place(arena, p.patch, p.stride, box.extent(1), kSums * width);
  }

  void sum_row(const Images<Storage>& images, std::int64_t z, std::int64_t r, const Box& box) {
    const std::int64_t column = box.low[2] * p.stride[2];
    const std::int64_t count = (box.extent(2) - 1) * p.stride[2] + p.patch[2];
    const std::int64_t plane = kSums * length;
    const VecF64 x_pivot = broadcast<double>(images.pivots[0]);
    const VecF64 y_pivot = broadcast<double>(images.pivots[1]);
    for (std::int64_t c = 0; c < p.channels; c += kChannels) {
      const int n = int(std::min<std::int64_t>(kChannels, p.channels - c));
      for (int k = 0; k < 2; ++k)
        for (int i = 0; i < n; ++i)
          images.row(k, c + i, z, r, column, count, length, staged[k] + i * length);
      for (std::int64_t j = 0; j < length; j += kLane) {
        W sums[kSums];
        for (int s = 0; s < kSums; ++s)
          sums[s] = c == 0 ? W{} : load_wide<W>(fields + s * length + j, plane);
        for (int i = 0; i < n; ++i) {
          const W x = difference<W>(load_as_double(staged[0] + i * length + j), x_pivot);
          const W y = difference<W>(load_as_double(staged[1] + i * length + j), y_pivot);
          sums[kX] = sums[kX] + x;
          sums[kY] = sums[kY] + y;
          sums[kXX] = sums[kXX] + x * x;
          sums[kYY] = sums[kYY] + y * y;
          sums[kXY] = sums[kXY] + x * y;
        }
        for (int s = 0; s < kSums; ++s) store_wide(fields + s * length + j, plane, sums[s]);
      }
    }
    for (int s = 0; s < kSums; ++s)
      sum_along_row<W>(fields + s * length, plane, p.patch[2], dense, along + s * dense,
                       kSums * dense);
    if (p.stride[2] > 1)
      for (int s = 0; s < kSums * kPlanes<W>; ++s)
        for (std::int64_t i = 0; i < box.extent(2); ++i)
          picked[s * width + i] = along[s * dense + i * p.stride[2]];
  }

  // Calls emit(e, w) for every row of patches, with the row's sums in `out`.
  template <class Emit>
  void run(const Images<Storage>& images, const Box& box, Emit emit) {
    const std::int64_t depth = (box.extent(0) - 1) * p.stride[0] + p.patch[0];
    const std::int64_t height = (box.extent(1) - 1) * p.stride[1] + p.patch[1];
    for (std::int64_t z = 0; z < depth; ++z) {
      if (z % p.stride[0] >= p.patch[0]) continue;
      for (std::int64_t r = 0; r < height; ++r) {
        if (r % p.stride[1] >= p.patch[1]) continue;
        sum_row(images, z + box.low[0] * p.stride[0] - p.pad[0],
                r + box.low[1] * p.stride[1] - p.pad[1], box);
        if (slide.push(z, r, picked, out))
          emit(box.low[0] + (z - p.patch[0] + 1) / p.stride[0],
               box.low[1] + (r - p.patch[1] + 1) / p.stride[1]);
      }
    }
  }
};

// A patch's score, and what its gradient needs. The sums are those of N values; every quantity is
// kept N times as large, for which nothing need be divided: `inverse` is that of N nx or N vx.
template <class T>
struct Scored {
  VecF64 score, covariance, inverse_x, inverse_y, open_x, open_y;
};

template <class T, class W>
inline Scored<T> score_of(const Problem& p, const W* s) {
  const double n = double(p.channels * p.patch[0] * p.patch[1] * p.patch[2]);
  const VecF64 count = broadcast<double>(n);
  Scored<T> r;
  r.covariance = narrow(s[kXY] * count - s[kX] * s[kY]);
  const VecF64 x = narrow(s[kXX] * count - s[kX] * s[kX]);
  const VecF64 y = narrow(s[kYY] * count - s[kY] * s[kY]);
  if (p.squared) {
    r.inverse_x = inverse<T>(at_least(x, n * p.eps));
    r.inverse_y = inverse<T>(at_least(y, n * p.eps));
    r.open_x = x < n * p.eps ? VecF64{} : r.inverse_x;
    r.open_y = y < n * p.eps ? VecF64{} : r.inverse_y;
    r.score = (r.covariance * r.covariance + n * n * p.smooth) * r.inverse_x * r.inverse_y;
  } else {
    r.inverse_x = inverse_sqrt<T>(at_least(x, 0) + n * p.eps);
    r.inverse_y = inverse_sqrt<T>(at_least(y, 0) + n * p.eps);
    r.score = r.covariance * r.inverse_x * r.inverse_y;
  }
  return r;
}

template <class Storage>
struct ForwardTile {
  using T = typename Compute<Storage>::type;
  using W = typename WideOf<T>::type;

  const pncc::Forward& p;
  Windows<Storage> windows;
  T* row;
  double* sums;

  ForwardTile(const pncc::Forward& params, const Box& box, Arena* arena)
      : p(params), windows(params, box, arena) {
    row = arena->take_as<T>(windows.width + kLanes<T>);
  }

  void run(std::int64_t task) {
    const std::int64_t plane = task / p.tiles_per_group();
    const std::int64_t b = plane / p.groups, g = plane % p.groups;
    const Box box = tile_box(p, task % p.tiles_per_group(), p.count);
    const Images<Storage> images(p, b, g);
    const std::int64_t width = windows.width, n = box.extent(2);
    W total{};
    windows.run(images, box, [&](std::int64_t e, std::int64_t w) {
      for (std::int64_t i = 0; i < width; i += kLane) {
        W s[kSums];
        for (int k = 0; k < kSums; ++k)
          s[k] = load_wide<W>(windows.out + k * width + i, kSums * width);
        VecF64 score = score_of<T>(p, s).score;
        if (!p.squared) score = clamp(score, -1.0, 1.0);
        store_double(row + i, score);
      }
      if (p.reduced) {
        std::fill(row + n, row + width, T(0));
        for (std::int64_t i = 0; i < width; i += kLane)
          total = total + difference<W>(load_as_double(row + i), VecF64{});
      } else {
        scatter(row, n,
                static_cast<Storage*>(p.scores) + b * p.score_stride[0] + g * p.score_stride[1] +
                    e * p.score_stride[2] + w * p.score_stride[3] + box.low[2] * p.score_stride[4],
                p.score_stride[4]);
      }
    });
    if (p.reduced) {
      double sum = 0;
      const VecF64 lanes = narrow(total);
      for (int i = 0; i < kLane; ++i) sum += lanes[i];
      p.partial[task] = sum;
    }
  }
};

template <class Storage>
struct BackwardTile {
  using T = typename Compute<Storage>::type;
  using W = typename WideOf<T>::type;
  // Coefficients of the patches: A, then B and C of either gradient.
  static constexpr int kMost = 5;

  const pncc::Backward& p;
  Windows<Storage> windows;
  int fields;
  std::int64_t span;   // columns from the first patch that may hold a pixel to the last
  std::int64_t width;  // pixels in a row, rounded up
  T *grad, *staged[2], *result;
  double *coefficients, *spread, *along, *zeros, *out;
  Slide2d<W> slide;

  BackwardTile(const pncc::Backward& params, const Box& patches, const Box& pixels, Arena* arena)
      : p(params), windows(params, patches, arena) {
    fields = p.grad_image[1 - p.target] == nullptr ? 3 : 5;
    width = whole_vectors(pixels.extent(2));
    span = width + whole_vectors(p.patch[2]) + kLane;
    grad = arena->take_as<T>(windows.width + kLanes<T>);
    for (T*& row : staged) row = arena->take_as<T>(width + kLanes<T>);
    result = arena->take_as<T>(width + kLanes<T>);
    coefficients = arena->take(fields * windows.width * kPlanes<W>);
    spread = arena->take(fields * span * kPlanes<W>);
    along = arena->take(fields * width * kPlanes<W>);
    zeros = arena->take(fields * width * kPlanes<W>);
    out = arena->take(fields * width * kPlanes<W>);
    constexpr std::int64_t kOnes[kDims] = {1, 1, 1};
    slide.place(arena, p.patch, kOnes, pixels.extent(1), fields * width);
  }

  void coefficients_of_row(const Box& patches, std::int64_t b, std::int64_t g, std::int64_t e,
                           std::int64_t w) {
    const std::int64_t n = patches.extent(2), m = windows.width, plane = fields * m;
    const Storage* const from = static_cast<const Storage*>(p.grad) + b * p.score_stride[0];
    if (p.reduced) {
      // A sum's gradient has the type of the arithmetic, a score's that of the images.
      const T sum_grad = static_cast<const T*>(p.grad)[b * p.score_stride[0]];
      std::fill(grad, grad + m, T(double(sum_grad) * p.scale));
    } else {
      gather(from + g * p.score_stride[1] + e * p.score_stride[2] + w * p.score_stride[3] +
                 patches.low[2] * p.score_stride[4],
             p.score_stride[4], n, grad);
      std::fill(grad + n, grad + m, T(0));
    }
    // A patch of one value has no gradient, to the last bit.
    if (p.channels * p.patch[0] * p.patch[1] * p.patch[2] == 1)
      for (std::int64_t i = 0; i < m; ++i) grad[i] *= 0;
    const int t = p.target;
    for (std::int64_t i = 0; i < m; i += kLane) {
      W s[kSums];
      for (int k = 0; k < kSums; ++k) s[k] = load_wide<W>(windows.out + k * m + i, kSums * m);
      const Scored<T> r = score_of<T>(p, s);
      const VecF64 upstream = load_as_double(grad + i);
      VecF64 a, b_x, b_y;
      if (p.squared) {
        const VecF64 twice = upstream + upstream;
        a = twice * r.covariance * r.inverse_x * r.inverse_y;
        b_x = twice * r.score * r.open_x;
        b_y = twice * r.score * r.open_y;
      } else {
        a = upstream * r.inverse_x * r.inverse_y;
        b_x = upstream * r.score * r.inverse_x * r.inverse_x;
        b_y = upstream * r.score * r.inverse_y * r.inverse_y;
      }
      const auto put = [&](int f, W value) { store_wide(coefficients + f * m + i, plane, value); };
      // With `own` the image that the gradient is for and `other` the other one.
      const auto pair = [&](int f, VecF64 b_own, W own, W other) {
        put(f, difference<W>(b_own, VecF64{}));
        put(f + 1, own * b_own - other * a);
      };
      put(0, difference<W>(a, VecF64{}));
      pair(1, t == 0 ? b_x : b_y, s[t == 0 ? kX : kY], s[t == 0 ? kY : kX]);
      if (fields == 5) pair(3, t == 0 ? b_y : b_x, s[t == 0 ? kY : kX], s[t == 0 ? kX : kY]);
    }
  }

  // Sums over the patches that hold a pixel: windows of the coefficients, each at its patch's first
  // column and zeros between.
  void spread_row(const Box& patches, const Box& pixels) {
    const std::int64_t origin = pixels.low[2] + p.pad[2] - p.patch[2] + 1;
    const std::int64_t plane = fields * span, m = windows.width;
    for (int f = 0; f < fields * kPlanes<W>; ++f) {
      double* const to = spread + f * span;
      std::fill(to, to + span, 0.0);
      double* const at = to + (patches.low[2] * p.stride[2] - origin);
      for (std::int64_t i = 0; i < patches.extent(2); ++i)
        at[i * p.stride[2]] = coefficients[f * m + i];
    }
    for (int f = 0; f < fields; ++f)
      sum_along_row<W>(spread + f * span, plane, p.patch[2], width, along + f * width,
                       fields * width);
  }

  void pixel_row(const Images<Storage>& images, const Box& pixels, std::int64_t b, std::int64_t g,
                 std::int64_t z, std::int64_t r) {
    const double n = double(p.channels * p.patch[0] * p.patch[1] * p.patch[2]);
    const std::int64_t count = pixels.extent(2), plane = fields * width;
    for (std::int64_t c = 0; c < p.channels; ++c) {
      for (int k = 0; k < 2; ++k)
        images.row(k, c, z, r, pixels.low[2] + p.pad[2], count, width, staged[k]);
      for (int k = 0; k < 2; ++k) {
        const int own = k == 0 ? p.target : 1 - p.target;
        if (p.grad_image[own] == nullptr) continue;
        const int f = 1 + 2 * k;
        for (std::int64_t i = 0; i < width; i += kLane) {
          const auto sum = [&](int field) { return load_wide<W>(out + field * width + i, plane); };
          const auto value = [&](int image) {
            return difference<W>(load_as_double(staged[image] + i),
                                 broadcast<double>(images.pivots[image]));
          };
          const W a = sum(0), b_own = sum(f);
          const W direct = in_patch(value(1 - own), a) * a - in_patch(value(own), b_own) * b_own;
          store_double(result + i, narrow(direct * broadcast<double>(n) + sum(f + 1)));
        }
        const std::int64_t* const stride = p.grad_image_stride[own];
        scatter(result, count,
                static_cast<Storage*>(p.grad_image[own]) + b * stride[0] +
                    (g * p.channels + c) * stride[1] + z * stride[2] + r * stride[3] +
                    pixels.low[2] * stride[4],
                stride[4]);
      }
    }
  }

  // A pixel in no patch has no gradient, even if its value isn't finite.
  static W in_patch(W value, W coefficient) {
    if constexpr (kPlanes<W> == 1)
      return coefficient == 0.0 ? VecF64{} : value;
    else
      return {coefficient.hi == 0.0 ? VecF64{} : value.hi,
              coefficient.hi == 0.0 ? VecF64{} : value.lo};
  }

  void run(std::int64_t task) {
    const std::int64_t group = task / p.tiles_per_group();
    const std::int64_t b = group / p.groups, g = group % p.groups;
    const Box pixels = tile_box(p, task % p.tiles_per_group(), p.size);
    const Box patches = patches_over(p, pixels);
    const Images<Storage> images(p, b, g);
    std::fill(zeros, zeros + fields * width * kPlanes<W>, 0.0);

    // Rows and planes are counted from the first that may hold a patch's first pixel.
    const std::int64_t origin_z = pixels.low[0] + p.pad[0] - p.patch[0] + 1;
    const std::int64_t origin_r = pixels.low[1] + p.pad[1] - p.patch[1] + 1;
    const std::int64_t depth = pixels.extent(0) + p.patch[0] - 1;
    const std::int64_t height = pixels.extent(1) + p.patch[1] - 1;
    std::int64_t next_z = 0, next_r = 0;
    const auto push = [&](const double* row) {
      if (slide.push(next_z, next_r, row, out))
        pixel_row(images, pixels, b, g, pixels.low[0] + next_z - p.patch[0] + 1,
                  pixels.low[1] + next_r - p.patch[1] + 1);
      if (++next_r == height) {
        next_r = 0;
        ++next_z;
      }
    };
    if (patches.extent(0) > 0 && patches.extent(1) > 0 && patches.extent(2) > 0)
      windows.run(images, patches, [&](std::int64_t e, std::int64_t w) {
        const std::int64_t z = e * p.stride[0] - origin_z, r = w * p.stride[1] - origin_r;
        while (next_z < z || next_r < r) push(zeros);
        coefficients_of_row(patches, b, g, e, w);
        spread_row(patches, pixels);
        push(along);
      });
    while (next_z < depth) push(zeros);
  }
};

// The largest tile, to measure the scratch memory that a thread needs.
inline Box whole_tile(const Problem& p, const std::int64_t (&total)[kDims]) {
  Box box;
  for (int d = 0; d < kDims; ++d) {
    box.low[d] = 0;
    box.high[d] = std::min(p.tile[d], total[d]);
  }
  return box;
}
inline Box most_patches(const Problem& p, const Box& pixels) {
  Box box;
  for (int d = 0; d < kDims; ++d) {
    box.low[d] = 0;
    box.high[d] = std::min(p.count[d], (pixels.extent(d) + p.patch[d] - 2) / p.stride[d] + 1);
  }
  return box;
}

std::int64_t pncc_forward_scratch(const pncc::Forward& params) {
  Arena arena{nullptr};
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    ForwardTile<Storage>(params, whole_tile(params, params.count), &arena);
  });
  return arena.used;
}

std::int64_t pncc_backward_scratch(const pncc::Backward& params) {
  Arena arena{nullptr};
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    const Box pixels = whole_tile(params, params.size);
    BackwardTile<Storage>(params, most_patches(params, pixels), pixels, &arena);
  });
  return arena.used;
}

void pncc_forward(const pncc::Forward& params, std::int64_t begin, std::int64_t end,
                  double* scratch) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    Arena arena{scratch};
    ForwardTile<Storage> tile(params, whole_tile(params, params.count), &arena);
    for (std::int64_t task = begin; task < end; ++task) tile.run(task);
  });
}

void pncc_backward(const pncc::Backward& params, std::int64_t begin, std::int64_t end,
                   double* scratch) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    Arena arena{scratch};
    const Box pixels = whole_tile(params, params.size);
    BackwardTile<Storage> tile(params, most_patches(params, pixels), pixels, &arena);
    for (std::int64_t task = begin; task < end; ++task) tile.run(task);
  });
}

// Adds up the tasks of every batch element, with the rounding of each addition carried along.
void pncc_finish(const pncc::Forward& params) {
  const std::int64_t parts = params.groups * params.tiles_per_group();
  for (std::int64_t b = 0; b < params.batch; ++b) {
    double sum = 0, rest = 0;
    for (std::int64_t k = 0; k < parts; ++k) {
      const double part = params.partial[b * parts + k];
      const double next = sum + part;
      const double share = next - sum;
      rest += (sum - (next - share)) + (part - share);
      sum = next;
    }
    const double total = (rest - rest == 0 ? sum + rest : sum) * params.scale;
    if (params.dtype == DType::kFloat64)
      static_cast<double*>(params.sums)[b] = total;
    else
      static_cast<float*>(params.sums)[b] = float(total);
  }
}

}  // namespace
}  // namespace geco::cpu
