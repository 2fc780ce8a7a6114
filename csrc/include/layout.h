// Images [B, C, H, W] brought from one memory format to the other: each is a matrix that changes
// its rows and columns, [C, H W] to [H W, C] or the other way round.
#pragma once

#include <cstdint>

namespace geco::layout {

// to[c][r] = from[r][c] of each image. One task is a block of one image's longer side.
struct Transpose {
  static constexpr std::int64_t kBlock = 256;
  const float* from;
  float* to;
  std::int64_t batch, rows, columns;
  std::int64_t from_step, to_step;  // from one image to the next

  __attribute__((always_inline)) std::int64_t blocks() const {
    const std::int64_t longer = rows > columns ? rows : columns;
    return (longer + kBlock - 1) / kBlock;
  }
  __attribute__((always_inline)) std::int64_t tasks() const { return batch * blocks(); }
};

}  // namespace geco::layout
