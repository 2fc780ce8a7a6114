// Images [B, C, H, W] brought from one memory format to the other: each is a matrix that changes
// its rows and columns, [C, H W] to [H W, C] or the other way round.
#pragma once

#include <cstdint>

namespace geco::layout {

// to[c][r] = from[r][c] of each image. One task is a block of columns of one image.
struct Transpose {
  static constexpr std::int64_t kColumns = 64;
  const float* from;
  float* to;
  std::int64_t batch, rows, columns;
  std::int64_t from_step, to_step;  // from one image to the next

  __attribute__((always_inline)) std::int64_t blocks() const {
    return (columns + kColumns - 1) / kColumns;
  }
  __attribute__((always_inline)) std::int64_t tasks() const { return batch * blocks(); }
};

}  // namespace geco::layout
