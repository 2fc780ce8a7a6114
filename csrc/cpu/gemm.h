// Matrix products on panels. A panel is 32 columns of a matrix, row after row: [rows][32]. Both
// factors and the product lie in panels, so every stride in the innermost loop is a constant, no
// vector crosses a cache line, and one product's result is the next one's factor as it is.
//
// A block of the product, kBlockRows by two vectors, stays in registers while the whole depth goes
// by: each step loads two vectors of B and broadcasts kBlockRows elements of A. B has one layout
// for all instruction sets, of which narrower vectors take columns two vectors at a time. The trick
// that isn't obvious: a product asks for the factors of the one that comes after it, a line at each
// step, for they are too many and too scattered for the processor to see them coming.
#pragma once

#include "cpu/simd.h"

namespace geco::cpu {
namespace {

constexpr int kPanel = 32;

#if defined(__AVX512F__)
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif

// Where the left factor lies: in panels of its columns, [depth / 32][rows][32], `step` elements
// from one panel to the next; or transposed, [depth][32] of which the rows of A are columns.
enum class Left { kRows, kColumns };

// Factors of the next product, of the same form, or anything else that can be read early.
template <class T>
struct Next {
  const T* a;
  const T* b;
};

// c[r][0 ... kVectors) (+)= sum over k of A(r, k) b[k][...], which is summed before it is added.
template <class T, Left kLeft, bool kAdd, int kRows, int kVectors>
__attribute__((noinline)) void gemm_block(const T* a, std::int64_t step, const T* b, T* c,
                                          std::int64_t depth, Next<T> next) {
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>{};
  const auto multiply = [&](const T* column, const T* row) __attribute__((always_inline)) {
    Vec<T> factor[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) factor[v] = load(row + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const T each = column[kLeft == Left::kRows ? r * kPanel : r];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += each * factor[v];
    }
  };
  if constexpr (kAdd)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + r * kPanel + v * kLanes<T>, 1);
  constexpr int kNext = kLeft == Left::kRows ? 1 : kPanel;
  constexpr int kLine = 64 / int(sizeof(T));
  std::int64_t k = 0;
  for (; k + kPanel <= depth; k += kPanel) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanel; ++j) {
      __builtin_prefetch(next.a + j * kLine);
      __builtin_prefetch(next.b + j * kLine);
      multiply(a + j * kNext, b + j * kPanel);
    }
    a += kLeft == Left::kRows ? step : kPanel * kPanel;
    b += kPanel * kPanel;
    next.a += kLeft == Left::kRows ? step : kPanel * kLine;
    next.b += kPanel * kLine;
  }
  for (int j = 0; k + j < depth; ++j) multiply(a + j * kNext, b + j * kPanel);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* const to = c + r * kPanel + v * kLanes<T>;
      store(to, kAdd ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <class T>
using GemmBlock = void (*)(const T*, std::int64_t, const T*, T*, std::int64_t, Next<T>);

template <class T, Left kLeft, bool kAdd, int kVectors, int... kMinusOne>
inline GemmBlock<T> gemm_block_of(int rows, std::integer_sequence<int, kMinusOne...>) {
  static constexpr GemmBlock<T> kBlocks[] = {
      gemm_block<T, kLeft, kAdd, kMinusOne + 1, kVectors>...};
  return kBlocks[rows - 1];
}

// A longer sum is made of parts of about one length, for the rounding of a sum grows with it.
constexpr std::int64_t kLongestSum = 512;

// Of one panel: c[r][j] (+)= sum over k < depth of A(r, k) b[k][j], r < rows, j < columns rounded
// up to whole vectors. An element's sum runs over k in order, part by part if it is long, whatever
// block it is in.
template <class T, Left kLeft, bool kAdd>
void gemm(const T* a, std::int64_t step, const T* b, T* c, std::int64_t rows, std::int64_t depth,
          int columns, Next<T> next) {
  if (rows <= 0) return;
  if (depth > kLongestSum) {
    const std::int64_t parts = (depth + kLongestSum - 1) / kLongestSum;
    const std::int64_t panels = (depth + parts * kPanel - 1) / (parts * kPanel);
    const std::int64_t part = panels * kPanel;
    const T* const rest_a = a + panels * (kLeft == Left::kRows ? step : kPanel * kPanel);
    const T* const rest_b = b + part * kPanel;
    gemm<T, kLeft, kAdd>(a, step, b, c, rows, part, columns, {rest_a, rest_b});
    return gemm<T, kLeft, true>(rest_a, step, rest_b, c, rows, depth - part, columns, next);
  }
  constexpr auto kSizes = std::make_integer_sequence<int, kBlockRows>{};
  constexpr int kWidth = 2 * kLanes<T>, kLinesPerRow = kPanel * int(sizeof(T)) / 64;
  const std::int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (std::int64_t j = 0; j < columns; j += kWidth) {
    const bool narrow = columns - j <= kLanes<T>;
    std::int64_t first = 0;
    for (std::int64_t block = 0; block < blocks; ++block) {
      // Blocks of the same size or one row more, so that none is small.
      const std::int64_t end = rows * (block + 1) / blocks;
      const int count = int(end - first);
      const auto run = narrow ? gemm_block_of<T, kLeft, kAdd, 1>(count, kSizes)
                              : gemm_block_of<T, kLeft, kAdd, 2>(count, kSizes);
      // Each block asks for its share: some of the lines of a row, and the rows of A in its place.
      const std::int64_t lines = block % kLinesPerRow * depth * (kPanel / kLinesPerRow);
      const std::int64_t rows_before = first * kPanel;
      if (kLeft == Left::kRows)
        run(a + rows_before, step, b + j, c + rows_before + j, depth,
            {next.a + rows_before, next.b + lines});
      else
        run(a + first, step, b + j, c + rows_before + j, depth, {next.a + lines, next.b + lines});
      first = end;
    }
  }
}

}  // namespace
}  // namespace geco::cpu
