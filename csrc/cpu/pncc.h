// pNCC and its squared, padded form LNCC on the CPU. A tile streams through row by row: the sums of
// x, y, x^2, y^2 and xy along the row, over the last rows, over the last planes, then the score;
// backward goes on with the coefficients of the patches, along the row, over rows and planes, to
// the gradients. An image is read once for its pivot and once for its sums, and backward once more
// for its gradient; but for the first time it is hot. Results are written once.
// What isn't obvious: values are shifted by a pivot and summed in twice their precision, which
// replaces centring every patch, and no sum is ever made by subtraction (see `Slide`), so the work
// doesn't grow with the patch and what isn't finite stays in its patches.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

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

// Divisions by one, the usual stride, would take longer than what they decide.
inline std::int64_t remainder(std::int64_t x, std::int64_t by) { return by == 1 ? 0 : x % by; }
inline std::int64_t quotient(std::int64_t x, std::int64_t by) { return by == 1 ? x : x / by; }

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
    box.high[d] = smaller(p.count[d], (pixels.high[d] - 1 + p.pad[d]) / p.stride[d] + 1);
    box.high[d] = larger(box.low[d], box.high[d]);
  }
  return box;
}

inline Box tile_box(const Problem& p, std::int64_t tile, const std::int64_t (&total)[kDims]) {
  Box box;
  for (int d = kDims - 1; d >= 0; --d) {
    box.low[d] = tile % p.tiles[d] * p.tile[d];
    box.high[d] = smaller(box.low[d] + p.tile[d], total[d]);
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
    const int n = int(smaller(kWidth, count - j));
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
    const int n = int(smaller(kWidth, count - j));
    store(buffer, load(from + j, n));
    for (int i = 0; i < n; ++i) to[(j + i) * stride] = buffer[i];
  }
}

// A row's sums are read up to this many doubles past what its own length and the patch's ask for.
constexpr std::int64_t kReadAhead = 3 * kLane;

// The vector that begins `kBy` lanes into `low` and goes on in `high`.
template <int kBy>
inline VecF64 shifted(VecF64 low, VecF64 high) {
  if constexpr (kBy == 0) return low;
#if defined(__AVX512F__)
  // What GCC makes of a shuffle would overwrite a register that is needed again.
  return bit_cast<VecF64>(
      _mm512_maskz_alignr_epi64(0xff, bit_cast<__m512i>(high), bit_cast<__m512i>(low), kBy));
#elif defined(__AVX2__)
  return __builtin_shufflevector(low, high, kBy, kBy + 1, kBy + 2, kBy + 3);
#else
  return __builtin_shufflevector(low, high, kBy, kBy + 1);
#endif
}

// Two vectors of sums of 1, 2 and 4 neighbours, each from lane to lane of its own.
struct Doublings {
  VecF64 one, one_next, two, two_next, four;
};

// Sums of kCount < kLane neighbours.
template <int kCount>
inline VecF64 few_of(const Doublings& d) {
  constexpr int kAfterFour = kCount & 4, kAfterTwo = kCount & 6;
  VecF64 sum{};
  if constexpr (kCount & 4) sum = d.four;
  if constexpr (kCount & 2) {
    const VecF64 part = shifted<kAfterFour>(d.two, d.two_next);
    sum = kAfterFour ? sum + part : part;
  }
  if constexpr (kCount & 1) {
    const VecF64 part = shifted<kAfterTwo>(d.one, d.one_next);
    sum = kAfterTwo ? sum + part : part;
  }
  return sum;
}

// Calls sink(v, few, whole) for every vector v of a row: the sums of kFew neighbours, of vector
// v + 1 if kWhole and of v if not, and those of kLane neighbours of v. Each costs one shuffle and
// one addition for every doubling of the neighbours.
template <int kFew, bool kWhole, class Sink>
inline void sum_lanes(const double* in, std::int64_t vectors, Sink sink) {
  VecF64 one[3] = {load(in), load(in + kLane), load(in + 2 * kLane)};
  const auto two_of = [](VecF64 a, VecF64 b) { return a + shifted<1 % kLane>(a, b); };
  const auto four_of = [](VecF64 a, VecF64 b) { return a + shifted<2 % kLane>(a, b); };
  VecF64 two[2] = {two_of(one[0], one[1]), two_of(one[1], one[2])};
  VecF64 four = four_of(two[0], two[1]);
  for (std::int64_t v = 0; v < vectors; ++v) {
    const VecF64 one_new = load(in + (v + 3) * kLane);
    const VecF64 two_new = two_of(one[2], one_new);
    const VecF64 four_new = four_of(two[1], two_new);
    VecF64 whole;
    if constexpr (kLane == 8)
      whole = four + shifted<4 % kLane>(four, four_new);
    else if constexpr (kLane == 4)
      whole = four;
    else
      whole = two[0];
    const Doublings here{one[0], one[1], two[0], two[1], four};
    const Doublings next{one[1], one[2], two[1], two_new, four_new};
    sink(v, few_of<kFew>(kWhole ? next : here), whole);
    one[0] = one[1];
    one[1] = one[2];
    one[2] = one_new;
    two[0] = two[1];
    two[1] = two_new;
    four = four_new;
  }
}

// Rows of float64 in several fields, `in_step` and `out_step` apart; see `sum_along_rows`.
template <int kFew, int kWhole>
inline void sum_fields(double* in, std::int64_t in_step, std::int64_t k, std::int64_t count,
                       double* out, std::int64_t out_step, int fields) {
  const std::int64_t vectors = count / kLane, m = k / kLane;
  for (int f = 0; f < fields; ++f, in += in_step, out += out_step) {
    if constexpr (kWhole < 2) {
      sum_lanes<kFew, kWhole == 1>(in, vectors, [&](std::int64_t v, VecF64 few, VecF64 whole) {
        VecF64 sum = kWhole == 1 ? whole : few;
        if constexpr (kWhole == 1 && kFew > 0) sum = whole + few;
        store(out + v * kLane, sum);
      });
    } else {
      sum_lanes<kFew, true>(in, vectors + m - 1, [&](std::int64_t v, VecF64 few, VecF64 whole) {
        store(in + v * kLane, whole);
        if (v + 1 >= m) store(out + (v + 1 - m) * kLane, few);
      });
      // Van Herk's blocks of m vectors, see `Slide`.
      for (std::int64_t block = 0; block < vectors; block += m) {
        VecF64 sum = load(in + (block + m - 1) * kLane);
        for (std::int64_t v = block + m - 2; v >= block; --v) {
          sum = load(in + v * kLane) + sum;
          store(in + v * kLane, sum);
        }
        VecF64 prefix{};
        const std::int64_t end = smaller(block + m, vectors);
        for (std::int64_t v = block; v < end; ++v) {
          if (v > block) prefix = prefix + load(in + (v + m - 1) * kLane);
          store(out + v * kLane, load(out + v * kLane) + (load(in + v * kLane) + prefix));
        }
      }
    }
  }
}

template <int kFew = 0>
inline void sum_fields_of(double* in, std::int64_t in_step, std::int64_t k, std::int64_t count,
                          double* out, std::int64_t out_step, int fields) {
  if constexpr (kFew < kLane) {
    if (k % kLane != kFew)
      return sum_fields_of<kFew + 1>(in, in_step, k, count, out, out_step, fields);
    if (k < kLane) return sum_fields<kFew, 0>(in, in_step, k, count, out, out_step, fields);
    if (k < 2 * kLane) return sum_fields<kFew, 1>(in, in_step, k, count, out, out_step, fields);
    return sum_fields<kFew, 2>(in, in_step, k, count, out, out_step, fields);
  }
}

// The same for pairs, by doublings in memory.
inline void sum_fields_of_pairs(double* in, std::int64_t in_step, std::int64_t k,
                                std::int64_t count, double* out, std::int64_t out_step,
                                int fields) {
  const std::int64_t in_plane = fields * in_step, out_plane = fields * out_step;
  for (int f = 0; f < fields; ++f, in += in_step, out += out_step) {
    std::int64_t done = 0;
    for (std::int64_t width = 1; width <= k; width *= 2) {
      if (k & width) {
        for (std::int64_t i = 0; i < count; i += kLane) {
          Pair sum = load_wide<Pair>(in + i + done, in_plane);
          if (done > 0) sum = load_wide<Pair>(out + i, out_plane) + sum;
          store_wide(out + i, out_plane, sum);
        }
        done += width;
      }
      if (2 * width > k) break;
      const std::int64_t needed = count + k - 2 * width + 1;
      for (std::int64_t i = 0; i < needed; i += kLane)
        store_wide(in + i, in_plane,
                   load_wide<Pair>(in + i, in_plane) + load_wide<Pair>(in + i + width, in_plane));
    }
  }
}

// Sums of `k` neighbours along the rows of `fields` fields: out[i] = in[i] + ... + in[i + k - 1]
// for i < count, a multiple of the vector; `in` is overwritten and read up to count + k +
// kReadAhead.
template <class W>
inline void sum_along_rows(double* in, std::int64_t in_step, std::int64_t k, std::int64_t count,
                           double* out, std::int64_t out_step, int fields) {
  if constexpr (kPlanes<W> == 1)
    sum_fields_of(in, in_step, k, count, out, out_step, fields);
  else
    sum_fields_of_pairs(in, in_step, k, count, out, out_step, fields);
}

// Sums of `k` successive rows at every `stride`-th row, with van Herk's blocks: rows are cut into
// blocks of k, and a window is the end of one block and the beginning of the next. Nothing is
// subtracted, so what isn't finite leaves with its row, and a row costs three additions whatever k.
// The rows of kFields fields are handled together.
template <class W, int kFields>
struct Slide {
  double* ends;           // [k][row]: sums from a row to its block's end; until that is full, rows
  double *prefix, *none;  // [row]; `none` is zeros, the end of a block before a whole one
  std::int64_t k, stride, width;  // width: of one field

  std::int64_t plane() const { return kFields * width; }
  std::int64_t row() const { return plane() * kPlanes<W>; }
  static std::int64_t size(std::int64_t k, std::int64_t width) {
    return (k + 2) * kFields * width * kPlanes<W>;
  }
  void place(double* memory, std::int64_t k_, std::int64_t stride_, std::int64_t width_) {
    k = k_;
    stride = stride_;
    width = width_;
    move(memory);
  }
  void move(double* memory) {
    ends = memory;
    prefix = memory + k * row();
    none = prefix + row();
  }

  // Members are copied first: for all the compiler knows, a store of a vector changes them.
  template <bool kDue, class Sink>
  void add(const double* in, double* slot, const double* end, Sink sink) {
    const std::int64_t at = plane(), step = width;
    double* const running = prefix;
    for (std::int64_t i = 0; i < step; i += kLane) {
      W sums[kFields];
      for (int f = 0; f < kFields; ++f) {
        const std::int64_t j = f * step + i;
        const W x = load_wide<W>(in + j, at);
        sums[f] = load_wide<W>(running + j, at) + x;
        store_wide(running + j, at, sums[f]);
        store_wide(slot + j, at, x);
        if constexpr (kDue) sums[f] = sums[f] + load_wide<W>(end + j, at);
      }
      if constexpr (kDue) sink(i, sums);
    }
  }

  // Turns the rows of a full block into the sums from each to the block's end.
  void end_block() {
    const std::int64_t at = plane(), step = row();
    double* const last = ends + (k - 1) * step;
    double* const first = ends + step;
    for (std::int64_t i = 0; i < at; i += kLane) {
      W sum = load_wide<W>(last + i, at);
      for (double* to = last - step + i; to >= first; to -= step) {
        sum = load_wide<W>(to, at) + sum;
        store_wide(to, at, sum);
      }
    }
  }

  // Takes row r, counted from the first window's first; calls sink(i, sums) for every vector i of
  // the window that ends there, if one does.
  template <class Sink>
  bool push(std::int64_t r, const double* in, Sink sink) {
    // Without overlap a block begins with each window.
    const std::int64_t block = larger(k, stride);
    const std::int64_t j = remainder(r, block), start = r - k + 1;
    if (j >= k) return false;
    if (j == 0) fill(prefix, row() + (r == 0 ? row() : 0), 0.0);
    const bool due = start >= 0 && remainder(start, stride) == 0;
    double* const slot = ends + j * row();
    if (due)
      add<true>(in, slot, j == k - 1 ? none : slot + row(), sink);
    else
      add<false>(in, slot, none, sink);
    if (j == k - 1 && stride < k) end_block();
    return due;
  }
};

// Slides over rows, then over planes of them.
template <class W, int kFields>
struct Slide2d {
  Slide<W, kFields> rows;
  Slide<W, kFields> planes;  // its memory is one row's; those of others follow
  double* memory;
  double* between;
  std::int64_t step;

  void place(Arena* arena, const std::int64_t (&patch)[kDims], const std::int64_t (&stride)[kDims],
             std::int64_t height, std::int64_t width) {
    using One = Slide<W, kFields>;
    rows.place(arena->take(One::size(patch[1], width)), patch[1], stride[1], width);
    step = patch[0] > 1 ? One::size(patch[0], width) : 0;
    memory = arena->take(step * height);
    planes.place(memory, patch[0], stride[0], width);
    between = arena->take(patch[0] > 1 ? rows.row() : 0);
  }

  // Whether the window that row r of plane z would end exists; both are counted from the first
  // window's.
  bool due(std::int64_t z, std::int64_t r) const {
    const std::int64_t a = z - planes.k + 1, b = r - rows.k + 1;
    return a >= 0 && b >= 0 && remainder(a, planes.stride) == 0 && remainder(b, rows.stride) == 0;
  }

  template <class Sink>
  void push(std::int64_t z, std::int64_t r, const double* in, Sink sink) {
    if (planes.k == 1) {
      rows.push(r, in, sink);
      return;
    }
    const std::int64_t width = rows.width, at = rows.plane();
    const auto hold = [&](std::int64_t i, const W* sums) {
      for (int f = 0; f < kFields; ++f) store_wide(between + f * width + i, at, sums[f]);
    };
    if (!rows.push(r, in, hold)) return;
    const std::int64_t y = quotient(r - rows.k + 1, rows.stride);
    planes.move(memory + y * step);
    planes.push(z, between, sink);
  }
};

// Rows in storage of the problem's type and any stride, from and to dense rows of T.
template <class T>
inline void read_row(DType dtype, const void* base, std::int64_t offset, std::int64_t stride,
                     std::int64_t count, T* to) {
  visit_storage(dtype, [&]<class Storage>(Storage*) {
    if constexpr (std::is_same_v<typename Compute<Storage>::type, T>)
      gather(static_cast<const Storage*>(base) + offset, stride, count, to);
  });
}
template <class T>
inline void write_row(DType dtype, const T* from, std::int64_t count, void* base,
                      std::int64_t offset, std::int64_t stride) {
  visit_storage(dtype, [&]<class Storage>(Storage*) {
    if constexpr (std::is_same_v<typename Compute<Storage>::type, T>)
      scatter(from, count, static_cast<Storage*>(base) + offset, stride);
  });
}

// Both images of one group of channels.
template <class T>
struct Images {
  const Problem& p;
  std::int64_t base[2];
  T pivots[2];

  Images(const Problem& problem, std::int64_t b, std::int64_t g, const Box& patches) : p(problem) {
    for (int k = 0; k < 2; ++k) {
      base[k] = b * p.image_stride[k][0] + g * p.channels * p.image_stride[k][1];
      pivots[k] = pivot(k, patches);
    }
  }

  // What is subtracted from an image before anything else: the finite value of the least magnitude.
  // No value x is farther from it than 2 |x|, so that bright parts of an image cost the dark ones
  // no digits, and none is far from it where an offset is all they have in common.
  T pivot(int k, const Box& patches) const {
    if (p.pad[0] + p.pad[1] + p.pad[2] > 0) return 0;  // the zeros around the image
    constexpr std::int64_t kRun = 256;
    const T infinity = kInfinity<T>;
    std::int64_t low[kDims], high[kDims];
    for (int d = 0; d < kDims; ++d) {
      low[d] = patches.low[d] * p.stride[d];
      high[d] = patches.extent(d) > 0 ? (patches.high[d] - 1) * p.stride[d] + p.patch[d] : low[d];
    }
    const std::int64_t* const stride = p.image_stride[k];
    Vec<T> above = broadcast<T>(infinity), below = above;
    T values[kRun];
    for (std::int64_t c = 0; c < p.channels; ++c)
      for (std::int64_t z = low[0]; z < high[0]; ++z)
        for (std::int64_t r = low[1]; r < high[1]; ++r)
          for (std::int64_t j = low[2]; j < high[2]; j += kRun) {
            const std::int64_t n = smaller(kRun, high[2] - j);
            read_row(p.dtype, p.image[k],
                     base[k] + c * stride[1] + z * stride[2] + r * stride[3] + j * stride[4],
                     stride[4], n, values);
            for (std::int64_t i = n; i % kLanes<T> != 0; ++i) values[i] = infinity;
            for (std::int64_t i = 0; i < n; i += kLanes<T>) {
              const Vec<T> x = load(values + i);
              const Vec<T> up = x < 0 ? broadcast<T>(infinity) : x;
              const Vec<T> down = x < 0 ? -x : broadcast<T>(infinity);
              above = up < above ? up : above;
              below = down < below ? down : below;
            }
          }
    T least_above = infinity, least_below = infinity;
    for (int i = 0; i < kLanes<T>; ++i) {
      least_above = smaller(least_above, T(above[i]));
      least_below = smaller(least_below, T(below[i]));
    }
    const T least = least_above <= least_below ? least_above : -least_below;
    return least - least == 0 ? least : T(0);
  }

  // `count` values of a row from padded column `column` on. Columns outside the image are left as
  // they are, a row outside becomes zeros.
  void row(int k, std::int64_t c, std::int64_t z, std::int64_t r, std::int64_t column,
           std::int64_t count, T* to) const {
    const std::int64_t first = larger<std::int64_t>(column - p.pad[2], 0);
    const std::int64_t n = smaller(column - p.pad[2] + count, p.size[2]) - first;
    if (n <= 0) return;
    to += first - (column - p.pad[2]);
    if (z < 0 || z >= p.size[0] || r < 0 || r >= p.size[1]) {
      fill(to, n, T(0));
      return;
    }
    const std::int64_t* const stride = p.image_stride[k];
    read_row(p.dtype, p.image[k],
             base[k] + c * stride[1] + z * stride[2] + r * stride[3] + first * stride[4], stride[4],
             n, to);
  }
};

// The sums of x, y, x^2, y^2 and x y over patches, from shifted values.
enum PatchSum { kX, kY, kXX, kYY, kXY, kSums };

// Computes the sums of a box of patches, row by row.
template <class T>
struct Windows {
  using W = typename WideOf<T>::type;
  static constexpr int kChannels = 4;  // staged together

  const Problem& p;
  std::int64_t width;   // patches in a row, rounded up
  std::int64_t dense;   // windows in a row at stride 1, rounded up
  std::int64_t used;    // values that they span, rounded up
  std::int64_t length;  // and those that vectors may touch
  T* staged[2];
  double *fields, *along, *picked;
  Slide2d<W, kSums> slide;

  Windows(const Problem& problem, const Box& box, Arena* arena) : p(problem) {
    width = whole_vectors(box.extent(2));
    dense = p.stride[2] == 1 ? width : whole_vectors((box.extent(2) - 1) * p.stride[2] + 1);
    used = whole_vectors(dense + p.patch[2] - 1);
    length = dense + whole_vectors(p.patch[2]) + kReadAhead;
    for (T*& rows : staged) rows = arena->take_as<T>(kChannels * length);
    fields = arena->take(kSums * length * kPlanes<W>);
    along = arena->take(kSums * dense * kPlanes<W>);
    picked = p.stride[2] == 1 ? along : arena->take(kSums * width * kPlanes<W>);
    slide.place(arena, p.patch, p.stride, box.extent(1), width);
  }

  template <bool kFirst>
  void add_products(const Images<T>& images, int channels) {
    const std::int64_t step = length, plane = kSums * step, needed = used;
    const T *const xs = staged[0], *const ys = staged[1];
    double* const to = fields;
    const VecF64 x_pivot = broadcast<double>(images.pivots[0]);
    const VecF64 y_pivot = broadcast<double>(images.pivots[1]);
    for (std::int64_t j = 0; j < needed; j += kLane) {
      W x = difference<W>(load_as_double(xs + j), x_pivot);
      W y = difference<W>(load_as_double(ys + j), y_pivot);
      W sums[kSums] = {x, y, x * x, y * y, x * y};
      if constexpr (!kFirst)
        for (int s = 0; s < kSums; ++s) sums[s] = load_wide<W>(to + s * step + j, plane) + sums[s];
      for (int i = 1; i < channels; ++i) {
        x = difference<W>(load_as_double(xs + i * step + j), x_pivot);
        y = difference<W>(load_as_double(ys + i * step + j), y_pivot);
        const W values[kSums] = {x, y, x * x, y * y, x * y};
        for (int s = 0; s < kSums; ++s) sums[s] = sums[s] + values[s];
      }
      for (int s = 0; s < kSums; ++s) store_wide(to + s * step + j, plane, sums[s]);
    }
  }

  void sum_row(const Images<T>& images, std::int64_t z, std::int64_t r, const Box& box) {
    const std::int64_t column = box.low[2] * p.stride[2];
    const std::int64_t count = (box.extent(2) - 1) * p.stride[2] + p.patch[2];
    for (std::int64_t c = 0; c < p.channels; c += kChannels) {
      const int n = int(smaller<std::int64_t>(kChannels, p.channels - c));
      for (int k = 0; k < 2; ++k)
        for (int i = 0; i < n; ++i)
          images.row(k, c + i, z, r, column, count, staged[k] + i * length);
      if (c == 0 && n == 1)
        add_products<true>(images, 1);
      else if (c == 0)
        add_products<true>(images, n);
      else
        add_products<false>(images, n);
    }
    sum_along_rows<W>(fields, length, p.patch[2], dense, along, dense, kSums);
    if (p.stride[2] > 1)
      for (int s = 0; s < kSums * kPlanes<W>; ++s)
        for (std::int64_t i = 0; i < box.extent(2); ++i)
          picked[s * width + i] = along[s * dense + i * p.stride[2]];
  }

  // For every row of patches (e, w): begin(e, w), then sink(i, sums) for every vector i of patches,
  // then end(e, w).
  template <class Begin, class Sink, class End>
  void run(const Images<T>& images, const Box& box, Begin begin, Sink sink, End end) {
    const std::int64_t depth = (box.extent(0) - 1) * p.stride[0] + p.patch[0];
    const std::int64_t height = (box.extent(1) - 1) * p.stride[1] + p.patch[1];
    for (T* rows : staged) fill(rows, kChannels * length, T(0));
    for (std::int64_t z = 0; z < depth; ++z) {
      if (remainder(z, p.stride[0]) >= p.patch[0]) continue;
      for (std::int64_t r = 0; r < height; ++r) {
        if (remainder(r, p.stride[1]) >= p.patch[1]) continue;
        sum_row(images, z + box.low[0] * p.stride[0] - p.pad[0],
                r + box.low[1] * p.stride[1] - p.pad[1], box);
        const bool due = slide.due(z, r);
        const std::int64_t e = box.low[0] + quotient(z - p.patch[0] + 1, p.stride[0]);
        const std::int64_t w = box.low[1] + quotient(r - p.patch[1] + 1, p.stride[1]);
        if (due) begin(e, w);
        slide.push(z, r, picked, sink);
        if (due) end(e, w);
      }
    }
  }
};

inline double values_in(const Problem& p) {
  return double(p.channels * p.patch[0] * p.patch[1] * p.patch[2]);
}

// From the sums of a patch of N values to its score. Variances and covariance are kept N times as
// large, N sum x^2 - (sum x)^2: nothing need be divided, and of integers the difference is exact.
template <class T, bool kSquared>
struct Scorer {
  using W = typename WideOf<T>::type;
  VecF64 count;
  double eps, smooth;

  explicit Scorer(const Problem& p)
      : count(broadcast<double>(values_in(p))),
        eps(values_in(p) * p.eps),
        smooth(values_in(p) * values_in(p) * p.smooth) {}

  VecF64 spread(W sum, W square) const { return narrow(square * count - sum * sum); }
  VecF64 covariance(const W* s) const { return narrow(s[kXY] * count - s[kX] * s[kY]); }
  VecF64 bounded(VecF64 spread) const {
    return kSquared ? at_least(spread, eps) : at_least(spread, 0) + eps;
  }

  VecF64 score(const W* s) const {
    const VecF64 c = covariance(s);
    const VecF64 x = bounded(spread(s[kX], s[kXX])), y = bounded(spread(s[kY], s[kYY]));
    if constexpr (kSquared)
      return (c * c + smooth) *
             (sizeof(T) == 4 ? inverse<T>(x * y) : inverse<T>(x) * inverse<T>(y));
    else
      return clamp(
          c * (sizeof(T) == 4 ? inverse_sqrt<T>(x * y) : inverse_sqrt<T>(x) * inverse_sqrt<T>(y)),
          -1.0, 1.0);
  }

  // A, Bx and By of a patch, each over N, whose score has the gradient `grad`; and that score.
  struct Weights {
    VecF64 a, b_x, b_y, score;
  };
  Weights weights(const W* s, VecF64 grad) const {
    const VecF64 c = covariance(s);
    const VecF64 spread_x = spread(s[kX], s[kXX]), spread_y = spread(s[kY], s[kYY]);
    if constexpr (kSquared) {
      const VecF64 x = inverse<T>(bounded(spread_x)), y = inverse<T>(bounded(spread_y));
      const VecF64 twice = (grad + grad) * (x * y), top = c * c + smooth;
      const VecF64 b = twice * top;
      return {twice * c, spread_x < eps ? VecF64{} : b * x, spread_y < eps ? VecF64{} : b * y,
              top * (x * y)};
    } else {
      const VecF64 x = inverse_sqrt<T>(bounded(spread_x)), y = inverse_sqrt<T>(bounded(spread_y));
      const VecF64 a = grad * (x * y);
      const VecF64 b = grad * (c * (x * y));
      return {a, b * (x * x), b * (y * y), clamp(c * (x * y), -1.0, 1.0)};
    }
  }
};

// Adds `n` scores, the first of them at `row`, to the sums; what follows them is overwritten.
template <class W, class T>
inline void add_scores(T* row, std::int64_t n, W* total) {
  const std::int64_t m = whole_vectors(n);
  fill(row + n, m - n, T(0));
  for (std::int64_t i = 0; i < m; i += kLane)
    *total = *total + difference<W>(load_as_double(row + i), VecF64{});
}
template <class W>
inline double sum_of_wide(W total) {
  double sum = 0;
  const VecF64 lanes = narrow(total);
  for (int i = 0; i < kLane; ++i) sum += lanes[i];
  return sum;
}

template <class T, bool kSquared>
struct ForwardTile {
  using W = typename WideOf<T>::type;

  const pncc::Forward& p;
  Windows<T> windows;
  T* row;

  ForwardTile(const pncc::Forward& params, const Box& box, Arena* arena)
      : p(params), windows(params, box, arena) {
    row = arena->take_as<T>(windows.width + kLanes<T>);
  }

  void run(std::int64_t task) {
    const std::int64_t plane = task / p.tiles_per_group();
    const std::int64_t b = plane / p.groups, g = plane % p.groups;
    const Box box = tile_box(p, task % p.tiles_per_group(), p.count);
    const Images<T> images(p, b, g, box);
    const Scorer<T, kSquared> scorer(p);
    const std::int64_t n = box.extent(2);
    W total{};
    const auto begin = [](std::int64_t, std::int64_t) {};
    const auto score =
        [scorer, to = row](std::int64_t i, const W* sums)
            __attribute__((always_inline)) { store_double(to + i, scorer.score(sums)); };
    windows.run(images, box, begin, score, [&](std::int64_t e, std::int64_t w) {
      if (p.reduced) {
        add_scores(row, n, &total);
      } else {
        write_row(p.dtype, row, n, p.scores,
                  b * p.score_stride[0] + g * p.score_stride[1] + e * p.score_stride[2] +
                      w * p.score_stride[3] + box.low[2] * p.score_stride[4],
                  p.score_stride[4]);
      }
    });
    if (p.reduced) p.partial[task] = sum_of_wide(total);
  }
};

// kFields: A, then B and C of the gradient to y, and with five those of the gradient to x.
template <class T, bool kSquared, int kFields>
struct BackwardTile {
  using W = typename WideOf<T>::type;

  const pncc::Backward& p;
  Windows<T> windows;
  std::int64_t span;   // columns from the first patch that may hold a pixel to the last pixel,
                       // and those that vectors may touch
  std::int64_t width;  // pixels in a row, moved by less than a vector and rounded up
  std::int64_t moved;  // by so much, for coefficients to be stored at whole vectors
  T *grad, *staged[2], *result[2];
  double *coefficients, *spread, *along, *zeros, *scores;
  Slide2d<W, kFields> slide;

  BackwardTile(const pncc::Backward& params, const Box& patches, const Box& pixels, Arena* arena)
      : p(params), windows(params, patches, arena) {
    width = whole_vectors(pixels.extent(2) + (p.patch[2] > 1 ? kLane - 1 : 0));
    span = width + 2 * whole_vectors(p.patch[2]) + kReadAhead;
    grad = arena->take_as<T>(windows.width + kLanes<T>);
    for (T*& row : staged) row = arena->take_as<T>(width + kLanes<T>);
    for (T*& row : result) row = arena->take_as<T>(width + kLanes<T>);
    spread = arena->take(kFields * span * kPlanes<W>);
    coefficients = p.stride[2] == 1 ? nullptr : arena->take(kFields * windows.width * kPlanes<W>);
    along = arena->take(kFields * width * kPlanes<W>);
    zeros = arena->take(kFields * width * kPlanes<W>);
    scores = p.partial == nullptr ? nullptr : arena->take(windows.width + kLane);
    constexpr std::int64_t kOnes[kDims] = {1, 1, 1};
    slide.place(arena, p.patch, kOnes, pixels.extent(1), width);
  }

  void read_gradient(const Box& patches, std::int64_t b, std::int64_t g, std::int64_t e,
                     std::int64_t w) {
    const std::int64_t n = patches.extent(2), m = whole_vectors(n);
    if (p.grad == nullptr) {
      fill(grad, n, T(p.scale));
    } else if (p.reduced) {
      // A sum's gradient has the type of the arithmetic, a score's that of the images.
      fill(grad, n, T(double(static_cast<const T*>(p.grad)[b * p.score_stride[0]]) * p.scale));
    } else {
      read_row(p.dtype, p.grad,
               b * p.score_stride[0] + g * p.score_stride[1] + e * p.score_stride[2] +
                   w * p.score_stride[3] + patches.low[2] * p.score_stride[4],
               p.score_stride[4], n, grad);
    }
    // A patch of one value has no gradient, to the last bit.
    if (values_in(p) == 1)
      for (std::int64_t i = 0; i < n; ++i) grad[i] *= 0;
    fill(grad + n, m - n, T(0));
  }

  // Moves the coefficients of strided patches to their first columns; clears all other columns.
  void clear_between(std::int64_t lead, std::int64_t n) {
    const std::int64_t used = width + p.patch[2] - 1;
    for (int f = 0; f < kFields * kPlanes<W>; ++f) {
      double* const to = spread + f * span;
      if (p.stride[2] == 1) {
        fill(to, lead, 0.0);
        fill(to + lead + n, used - lead - n, 0.0);
      } else {
        fill(to, used, 0.0);
        const double* const from = coefficients + f * windows.width;
        for (std::int64_t i = 0; i < n; ++i) to[lead + i * p.stride[2]] = from[i];
      }
    }
  }

  // The gradients of one row of pixels of the group; sums(i, s) loads those of vector i.
  void pixel_row(const Images<T>& images, const Box& pixels, std::int64_t b, std::int64_t g,
                 std::int64_t z, std::int64_t r, const double* held) {
    const VecF64 count = broadcast<double>(values_in(p));
    const std::int64_t n = pixels.extent(2), m = whole_vectors(n + moved);
    const std::int64_t step = width, plane = kFields * step;
    for (std::int64_t c = 0; c < p.channels; ++c) {
      for (int k = 0; k < 2; ++k)
        images.row(k, c, z, r, pixels.low[2] + p.pad[2], n, staged[k] + moved);
      const T *const from_x = staged[0], *const from_y = staged[1];
      T *const to_x = result[0], *const to_y = result[1];
      const VecF64 x_pivot = broadcast<double>(images.pivots[0]);
      const VecF64 y_pivot = broadcast<double>(images.pivots[1]);
      for (std::int64_t i = 0; i < m; i += kLane) {
        W s[kFields];
        for (int f = 0; f < kFields; ++f) s[f] = load_wide<W>(held + f * step + i, plane);
        const W x = difference<W>(load_as_double(from_x + i), x_pivot);
        const W y = difference<W>(load_as_double(from_y + i), y_pivot);
        const W by_y = in_patch(x, s[0]) * s[0] - in_patch(y, s[1]) * s[1];
        store_double(to_y + i, narrow(by_y * count + s[2]));
        if constexpr (kFields == 5) {
          const W by_x = in_patch(y, s[0]) * s[0] - in_patch(x, s[3]) * s[3];
          store_double(to_x + i, narrow(by_x * count + s[4]));
        }
      }
      for (int k = 0; k < 2; ++k) {
        if (p.grad_image[k] == nullptr) continue;
        const std::int64_t* const stride = p.grad_image_stride[k];
        write_row(p.grad_dtype, result[k] + moved, n, p.grad_image[k],
                  b * stride[0] + (g * p.channels + c) * stride[1] + z * stride[2] + r * stride[3] +
                      pixels.low[2] * stride[4],
                  stride[4]);
      }
    }
  }

  // The patches whose first pixel in the image is one of a tile's: their scores are its to add.
  Box own(const Box& pixels) const {
    Box box;
    const auto first = [&](int d, std::int64_t pixel) {
      const std::int64_t patch = (pixel + p.pad[d] + p.stride[d] - 1) / p.stride[d];
      return smaller(pixel == 0 ? 0 : patch, p.count[d]);
    };
    for (int d = 0; d < kDims; ++d) {
      box.low[d] = first(d, pixels.low[d]);
      box.high[d] = pixels.high[d] == p.size[d] ? p.count[d] : first(d, pixels.high[d]);
    }
    return box;
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
    const Images<T> images(p, b, g, patches);
    const Scorer<T, kSquared> scorer(p);
    fill(zeros, kFields * width * kPlanes<W>, 0.0);

    // Columns, rows and planes are counted from the first that may hold a patch's first pixel.
    std::int64_t origin[kDims];
    for (int d = 0; d < kDims; ++d) origin[d] = pixels.low[d] + p.pad[d] - p.patch[d] + 1;
    const std::int64_t first = patches.low[2] * p.stride[2] - origin[2];
    const std::int64_t lead = whole_vectors(first);
    moved = lead - first;
    const std::int64_t depth = pixels.extent(0) + p.patch[0] - 1;
    const std::int64_t height = pixels.extent(1) + p.patch[1] - 1;
    std::int64_t next_z = 0, next_r = 0;
    double* const held = along;  // a row of sums takes the place of what it was made from
    const auto hold = [held, step = width](std::int64_t i, const W* sums)
                          __attribute__((always_inline)) {
                            for (int f = 0; f < kFields; ++f)
                              store_wide(held + f * step + i, kFields * step, sums[f]);
                          };
    const auto push = [&](const double* row) {
      const bool due = slide.due(next_z, next_r);
      slide.push(next_z, next_r, row, hold);
      if (due)
        pixel_row(images, pixels, b, g, pixels.low[0] + next_z - p.patch[0] + 1,
                  pixels.low[1] + next_r - p.patch[1] + 1, held);
      if (++next_r == height) {
        next_r = 0;
        ++next_z;
      }
    };

    const Box counted = own(pixels);
    const auto holds = [&](int d, std::int64_t patch) {
      return patch >= counted.low[d] && patch < counted.high[d];
    };
    bool counts = false;
    W total{};

    const std::int64_t n = patches.extent(2), vectors = whole_vectors(n);
    const bool dense = p.stride[2] == 1;
    double* const to = dense ? spread + lead : coefficients;
    const std::int64_t step = dense ? span : windows.width;
    const auto begin = [&](std::int64_t e, std::int64_t w) {
      const std::int64_t z = e * p.stride[0] - origin[0], r = w * p.stride[1] - origin[1];
      while (next_z < z || next_r < r) push(zeros);
      read_gradient(patches, b, g, e, w);
      counts = scores != nullptr && holds(0, e) && holds(1, w);
    };
    const auto weigh = [scorer, to, step, vectors, from = grad, score = scores](
                           std::int64_t i, const W* s) __attribute__((always_inline)) {
      if (i >= vectors) return;
      const auto weights = scorer.weights(s, load_as_double(from + i));
      if (score != nullptr) store(score + i, weights.score);
      const auto put = [&](int f, W value) __attribute__((always_inline)) {
        store_wide(to + f * step + i, kFields * step, value);
      };
      put(0, difference<W>(weights.a, VecF64{}));
      put(1, difference<W>(weights.b_y, VecF64{}));
      put(2, s[kY] * weights.b_y - s[kX] * weights.a);
      if constexpr (kFields == 5) {
        put(3, difference<W>(weights.b_x, VecF64{}));
        put(4, s[kX] * weights.b_x - s[kY] * weights.a);
      }
    };
    if (patches.extent(0) > 0 && patches.extent(1) > 0 && n > 0)
      windows.run(images, patches, begin, weigh, [&](std::int64_t, std::int64_t) {
        if (counts)
          add_scores(scores + (counted.low[2] - patches.low[2]), counted.extent(2), &total);
        clear_between(lead, n);
        sum_along_rows<W>(spread, span, p.patch[2], width, along, width, kFields);
        push(along);
      });
    while (next_z < depth) push(zeros);
    if (scores != nullptr) p.partial[task] = sum_of_wide(total);
  }
};

// The largest tile, to measure the scratch memory that a thread needs.
inline Box whole_tile(const Problem& p, const std::int64_t (&total)[kDims]) {
  Box box;
  for (int d = 0; d < kDims; ++d) {
    box.low[d] = 0;
    box.high[d] = smaller(p.tile[d], total[d]);
  }
  return box;
}
inline Box most_patches(const Problem& p, const Box& pixels) {
  Box box;
  for (int d = 0; d < kDims; ++d) {
    box.low[d] = 0;
    box.high[d] = smaller(p.count[d], (pixels.extent(d) + p.patch[d] - 2) / p.stride[d] + 1);
  }
  return box;
}

// Calls body(tile) with a thread's tile of the right kind, on its scratch memory.
template <class Body>
inline void visit_tile(const pncc::Forward& p, Arena* arena, Body body) {
  const Box box = whole_tile(p, p.count);
  const auto as = [&]<class T, bool kSquared>() {
    ForwardTile<T, kSquared> tile(p, box, arena);
    body(tile);
  };
  if (p.dtype == DType::kFloat64)
    p.squared ? as.template operator()<double, true>() : as.template operator()<double, false>();
  else
    p.squared ? as.template operator()<float, true>() : as.template operator()<float, false>();
}
template <class Body>
inline void visit_tile(const pncc::Backward& p, Arena* arena, Body body) {
  const Box pixels = whole_tile(p, p.size);
  const Box patches = most_patches(p, pixels);
  const auto as = [&]<class T, bool kSquared, int kFields>() {
    BackwardTile<T, kSquared, kFields> tile(p, patches, pixels, arena);
    body(tile);
  };
  const auto of = [&]<class T, bool kSquared>() {
    if (p.grad_image[0] == nullptr)
      as.template operator()<T, kSquared, 3>();
    else
      as.template operator()<T, kSquared, 5>();
  };
  if (p.dtype == DType::kFloat64)
    p.squared ? of.template operator()<double, true>() : of.template operator()<double, false>();
  else
    p.squared ? of.template operator()<float, true>() : of.template operator()<float, false>();
}

template <class Params>
std::int64_t pncc_scratch(const Params& params) {
  Arena arena{nullptr};
  visit_tile(params, &arena, [](auto&) {});
  return arena.used;
}

template <class Params>
void pncc_run(const Params& params, std::int64_t begin, std::int64_t end, double* scratch) {
  Arena arena{scratch};
  visit_tile(params, &arena, [&](auto& tile) {
    for (std::int64_t task = begin; task < end; ++task) tile.run(task);
  });
}

// Adds up the tasks of every batch element.
void pncc_finish(const pncc::Problem& params) {
  const std::int64_t parts = params.groups * params.tiles_per_group();
  for (std::int64_t b = 0; b < params.batch; ++b) {
    CompensatedSum sum;
    for (std::int64_t k = 0; k < parts; ++k) sum.add(params.partial[b * parts + k]);
    const double total = sum.value() * params.scale;
    if (params.dtype == DType::kFloat64)
      static_cast<double*>(params.sums)[b] = total;
    else
      static_cast<float*>(params.sums)[b] = float(total);
  }
}

}  // namespace
}  // namespace geco::cpu
