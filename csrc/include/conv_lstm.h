// A convolution of stride 1 with "same" zero padding and, after it, the gates of a ConvLSTM, in the
// domain of Winograd's minimal filtering (Lavin and Gray 2016): with n = m + r - 1 points, a tile
// of m x m outputs of an r x r kernel takes n^2 products for each pair of channels instead of m^2
// r^2:
//   Y = A^T [ sum over input channels of (G w G^T) * (B^T d B) ] A
//   U = G w G^T    V = B^T d B, d the n x n pixels that a tile sees    M = sum of U V
// Its adjoint gives the gradients:
//   dM = A dY A^T    dV = sum over output channels of U dM    dU = sum over tiles of V dM
//   dd = B dV B^T, added up where tiles overlap               dw = G^T dU G
//
// Channels lie in groups of 16, two groups to a panel of 32: V [n^2, panels, tiles, 32], M and dM
// likewise with output channels, U [n^2, output panels, input slots, 32], and U once more with
// input and output changing places. A slot is a channel or, at the end of a source's last group,
// nothing. From one point to the next there is some room, 32 elements for U: it keeps the points of
// one tile or filter out of each other's cache lines.
#pragma once

#include <cstdint>

namespace geco::conv_lstm {

constexpr std::int64_t kGroup = 16;

// Channels of an image or a weight, cut into groups. There are `blocks` parts of `channels` each,
// and a group of each part in turn: so the four gates of the same channels are neighbours.
struct Channels {
  std::int64_t channels;
  std::int64_t blocks;

  __attribute__((always_inline)) std::int64_t groups() const {
    return (channels + kGroup - 1) / kGroup * blocks;
  }
  __attribute__((always_inline)) std::int64_t first(std::int64_t group) const {
    return group % blocks * channels + group / blocks * kGroup;
  }
  // How many channels a group has, 16 but for a part's last.
  __attribute__((always_inline)) int count(std::int64_t group) const {
    const std::int64_t left = channels - group / blocks * kGroup;
    return int(left < kGroup ? left : kGroup);
  }
};

// [B, channels, H, W] with channels next to each other; `step` is from one image, row and pixel to
// the next. Null where it is absent.
struct Image {
  float* data;
  std::int64_t channels;
  std::int64_t step[3];
};

struct Geometry {
  std::int64_t batch, height, width;
  int kernel;   // r
  int outputs;  // m
  std::int64_t tiles_y, tiles_x;
  Channels in[2];  // of the first and the second source
  Channels out;

  __attribute__((always_inline)) int points() const { return outputs + kernel - 1; }
  __attribute__((always_inline)) std::int64_t tiles_per_image() const { return tiles_y * tiles_x; }
  __attribute__((always_inline)) std::int64_t in_groups() const {
    return in[0].groups() + in[1].groups();
  }
  // Slots up to the last channel, and panels.
  __attribute__((always_inline)) std::int64_t in_slots() const {
    const Channels& last = in[1].channels > 0 ? in[1] : in[0];
    return (in_groups() - 1) * kGroup + last.count(last.groups() - 1);
  }
  __attribute__((always_inline)) std::int64_t out_slots() const {
    return (out.groups() - 1) * kGroup + out.count(out.groups() - 1);
  }
  __attribute__((always_inline)) std::int64_t in_panels() const { return (in_groups() + 1) / 2; }
  __attribute__((always_inline)) std::int64_t out_panels() const { return (out.groups() + 1) / 2; }
  // Elements from one point to the next of U and of its transposed form.
  __attribute__((always_inline)) std::int64_t weight_step() const {
    return (out_panels() * in_slots() + 1) * 2 * kGroup;
  }
  __attribute__((always_inline)) std::int64_t transposed_step() const {
    return (in_panels() * out_slots() + 1) * 2 * kGroup;
  }
};

// Values of some tiles at the points: `panel_step` elements from one panel to the next,
// `plane_step` from one point to the next.
struct Planes {
  float* data;
  std::int64_t panel_step, plane_step;
};

// U, or its form for the gradients to the inputs, or the other way round, the gradient to the
// weight. One task is a group of output channels, or for the transposed form of input channels.
struct Weight {
  Geometry geometry;
  float* weight;  // [out, in, r, r], contiguous
  float* transformed;
};

// V of the tiles from `first` on, or dM from the gradient to the result. One task is a tile.
struct Tiles {
  Geometry geometry;
  Image image[2];
  const float* zeros;  // as many as the largest source has channels, and a group more
  std::int64_t first;
  Planes planes;
};

// Products and what follows. One task is a block of tiles of one set of 64 slots.
struct Forward {
  Geometry geometry;
  std::int64_t first, count, block;  // tiles: of this call, and of one task
  Planes inputs;
  const float* transformed;
  const float* bias;                           // [out] or null
  Image result;                                // of a convolution
  Image projection, c, h_next, c_next, gates;  // of a ConvLSTM; `projection`, `gates` may be absent
  double forget_bias;
  // Set where a value of a tile is not finite, for then its neighbours may be wrong: at the points,
  // infinity and NaN enter all of a tile.
  std::int32_t* not_finite;

  __attribute__((always_inline)) std::int64_t blocks() const { return (count + block - 1) / block; }
  __attribute__((always_inline)) std::int64_t tasks() const {
    return blocks() * ((geometry.out.groups() + 3) / 4);
  }
};

// Adds the gradients to the inputs. One task is `share` tiles, whole images or all there are, of
// one input panel: tiles overlap.
struct BackwardInput {
  Geometry geometry;
  std::int64_t first, count, share, block;
  Planes grad;  // dM
  const float* transposed;
  Image grad_image[2];
  std::int32_t* not_finite;

  __attribute__((always_inline)) std::int64_t shares() const { return (count + share - 1) / share; }
  __attribute__((always_inline)) std::int64_t tasks() const {
    return shares() * geometry.in_panels();
  }
};

// dU, and the bias' gradient. One task is a point and an output panel.
struct BackwardWeight {
  Geometry geometry;
  std::int64_t count;
  Planes inputs, grad;
  std::int64_t run;             // so many tiles are summed before they are added
  bool adds_weight, adds_bias;  // to what is there already
  float* grad_transformed;      // null where it isn't wanted
  float* grad_bias;             // [out] or null
};

}  // namespace geco::conv_lstm
