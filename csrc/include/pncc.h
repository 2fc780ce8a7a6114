// Normalised cross-correlation of every patch of two images [B, C, *S]. With sums over the N values
// of a patch and their means xm, ym:
//   cov = sum (x - xm)(y - ym)     vx = sum (x - xm)^2     vy = sum (y - ym)^2
//   plain:   score = cov / sqrt((vx + eps)(vy + eps)), brought back to [-1, 1]
//   squared: score = (cov^2 + smooth) / (max(vx, eps) max(vy, eps))
// Images of one or two dimensions have leading dimensions of size 1.
#pragma once

#include <cstdint>

#include "include/numeric.h"

namespace geco::pncc {

constexpr int kDims = 3;

struct Problem {
  DType dtype;
  bool squared;
  bool reduced;  // scores are summed over the patches of a batch element
  double scale;  // on that sum: 1, or for means 1 / number of patches
  double eps, smooth;
  // A patch spans the `channels` channels of a group.
  std::int64_t batch, groups, channels;
  std::int64_t size[kDims], patch[kDims], stride[kDims];
  std::int64_t pad[kDims];    // zeros on either side, which are data
  std::int64_t count[kDims];  // patches
  // A task is one tile of one group of one batch element: of scores forward, of pixels backward.
  std::int64_t tile[kDims], tiles[kDims];
  const void* image[2];                     // x, y
  std::int64_t image_stride[2][2 + kDims];  // batch, channel, space
  std::int64_t score_stride[3 + kDims];     // batch, group, space; of scores or their gradient
  // What `finish` adds up, the sum of each task's scores [tasks], and where to, [batch].
  double* partial;
  void* sums;

  __attribute__((always_inline)) std::int64_t tiles_per_group() const {
    return tiles[0] * tiles[1] * tiles[2];
  }
  std::int64_t tasks() const { return batch * groups * tiles_per_group(); }
};

// Scores, or their sums if `reduced`.
struct Forward : Problem {
  void* scores;
};

// From a patch's statistics, with g the gradient of its score:
//   plain:    A = g / (nx ny)            Bx = g score / nx^2    By = g score / ny^2
//   squared:  A = 2 g cov / (vx vy)      Bx = 2 g score / vx    By = 2 g score / vy, where vx > eps
//   grad_x = sum A (y - ym) - Bx (x - xm)     grad_y = sum A (x - xm) - By (y - ym)
// over the patches that hold a pixel. The gradient to y is always wanted, that to x if there is a
// place for it; x and y may change places. Without `grad` the gradients are those of
// the sums, which are made on the way if there is a place for `partial`: one pass does for both.
struct Backward : Problem {
  const void* grad;
  DType grad_dtype;  // of the images' gradients
  void* grad_image[2];
  std::int64_t grad_image_stride[2][2 + kDims];
};

// On a GPU a tile has kTile columns and kTileRows rows, and up to kOwn times as many planes in a
// volume, rows elsewhere.
constexpr int kTile = 32, kTileRows = 8, kOwn = 4;

// The same on a GPU: the tiles above are of patches, and those of pixels have their own. Scores and
// coefficients [fields, batch, groups, *count], float64, have a place if they are to be made.
struct OnDevice : Backward {
  void* scores;
  double* coefficients;
  // Values nearest to zero of parts of the images, [2, batch, groups, parts]; null stands for
  // zeros.
  double* pivots;
  std::int64_t parts;
  std::int64_t pixel_tile[kDims], pixel_tiles[kDims];
  std::int64_t tiles_of_group, tasks_on_device, pixel_tiles_of_group, pixel_tasks;

  // The gradient to x needs two more. In float64 differences have two parts.
  int coefficient_fields() const { return grad_image[0] == nullptr ? 3 : 5; }
  int stored_fields() const {
    return coefficient_fields() + (dtype == DType::kFloat64 ? coefficient_fields() / 2 : 0);
  }
};

}  // namespace geco::pncc
