// Images from one memory format to the other on the CPU. As many rows as a vector has lanes are
// transposed in registers, so that memory is read and written by whole vectors, and once.
#pragma once

#include "cpu/panels.h"
#include "include/layout.h"

namespace geco::cpu {
namespace {

void transpose_images(const layout::Transpose& p, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kSide = kLanes<float>;
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t image = task / p.blocks(), first = task % p.blocks() * p.kColumns;
    const std::int64_t last = smaller(first + p.kColumns, p.columns);
    const float* from = p.from + image * p.from_step;
    float* to = p.to + image * p.to_step;
    for (std::int64_t r = 0; r < p.rows; r += kSide) {
      const int rows = int(smaller(kSide, p.rows - r));
      for (std::int64_t c = first; c < last; c += kSide) {
        const int columns = int(smaller(kSide, last - c));
        VecF32 lines[kSide];
        for (int k = 0; k < kSide; ++k) {
          const float* line = from + (r + k) * p.columns + c;
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
    }
  }
}

}  // namespace
}  // namespace geco::cpu
