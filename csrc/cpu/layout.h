// Images from one memory format to the other on the CPU. As many rows as a vector has lanes are
// transposed in registers, so that memory is read and written by whole vectors, and once. The
// longer side is walked along, and the rows to come are asked for: they are too far apart for the
// processor to see them coming.
#pragma once

#include "cpu/panels.h"
#include "include/layout.h"

namespace geco::cpu {
namespace {

// to[c + k][r + j] = from[r + j][c + k] of one square, less what lies beyond the matrix.
inline void transpose_square(const layout::Transpose& p, const float* from, float* to,
                             std::int64_t r, std::int64_t c, std::int64_t ahead) {
  constexpr int kSide = kLanes<float>;
  const int rows = int(smaller<std::int64_t>(kSide, p.rows - r));
  const int columns = int(smaller<std::int64_t>(kSide, p.columns - c));
  VecF32 lines[kSide];
  for (int k = 0; k < kSide; ++k) {
    const float* line = from + (r + k) * p.columns + c;
    __builtin_prefetch(line + ahead);
    lines[k] = k >= rows ? VecF32{} : columns == kSide ? load(line) : load(line, columns);
  }
  transpose<float>(lines);
  for (int k = 0; k < columns; ++k) {
    float* line = to + (c + k) * p.rows + r;
    if (rows == kSide)
      store(line, lines[k]);
    else
      store(line, lines[k], rows);
  }
}

void transpose_images(const layout::Transpose& p, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kSide = kLanes<float>;
  const std::int64_t ahead = kSide * p.columns;
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t image = task / p.blocks(), first = task % p.blocks() * p.kBlock;
    const float* from = p.from + image * p.from_step;
    float* to = p.to + image * p.to_step;
    if (p.rows > p.columns) {
      const std::int64_t last = smaller(first + p.kBlock, p.rows);
      for (std::int64_t c = 0; c < p.columns; c += kSide)
        for (std::int64_t r = first; r < last; r += kSide)
          transpose_square(p, from, to, r, c, ahead);
    } else {
      const std::int64_t last = smaller(first + p.kBlock, p.columns);
      for (std::int64_t r = 0; r < p.rows; r += kSide)
        for (std::int64_t c = first; c < last; c += kSide)
          transpose_square(p, from, to, r, c, ahead);
    }
  }
}

}  // namespace
}  // namespace geco::cpu
