// A chain of linear layers with an activation between each two, the conditioner of a coupling
// layer. With y_0 = x:
//   u_1 = W_1 y_0 + b_1 + context_projection,  y_l = activation(u_l),  u_l+1 = W_l+1 y_l + b_l+1
// and the result is the last u. With D_L the gradient to it:
//   D_l = (D_l+1 W_l+1) * activation'(u_l)
//   grad_W_l = D_l^T y_l-1   grad_b_l = sum of D_l over the batch
//   grad_x = D_1 W_1         grad_context_projection = D_1
//
// In a coupling layer the first layer sees a context, too, u_1 = W_1 y_0 + W_c context + b_1: both
// lie side by side, y_0 padded to whole panels. And the result holds log_scale and shift of another
// part of the features, which are changed by the map of include/affine_coupling.h as soon as a
// row's are known.
//
// The batch is cut into blocks of rows. A layer's values lie in panels of 32 columns, the panels of
// one block after those of another: [blocks][width / 32][rows][32].
#pragma once

#include <cstdint>

#include "include/affine_coupling.h"
#include "include/numeric.h"
#include "include/strided.h"

namespace geco::coupling_mlp {

constexpr std::int64_t kPanel = 32;

enum class Activation : std::int32_t { kRelu, kLeakyRelu, kTanh, kElu, kSilu };

// Whether backward is given what the activation was applied to, from which both it and its
// derivative come: 1 - tanh^2 would cancel. The others' derivative is told by the activation.
__attribute__((always_inline)) inline bool keeps_input(Activation activation) {
  return activation != Activation::kRelu && activation != Activation::kLeakyRelu;
}

__attribute__((always_inline)) inline std::int64_t panels(std::int64_t width) {
  return (width + kPanel - 1) / kPanel;
}
__attribute__((always_inline)) inline std::int64_t padded(std::int64_t width) {
  return panels(width) * kPanel;
}

// Equal blocks of at most 128 rows: a block's values stay in the second-level cache. From 33 rows
// on there are several, for as many threads. How many depends on the batch alone, and so do the
// sums.
struct Batch {
  static constexpr std::int64_t kFewestRows = 32, kMostRows = 128;
  std::int64_t size;

  __attribute__((always_inline)) std::int64_t blocks() const {
    const std::int64_t quarter = (size + 3) / 4;
    const std::int64_t most = quarter < kFewestRows ? kFewestRows
                              : quarter > kMostRows ? kMostRows
                                                    : quarter;
    return (size + most - 1) / most;
  }
  __attribute__((always_inline)) std::int64_t first(std::int64_t block) const {
    return size * block / blocks();
  }
};

struct Layer {
  // Columns of what comes in, and of them those that aren't context, with which they end.
  std::int64_t in, own, out;
  Matrix weight;          // [out, own]
  Matrix context_weight;  // [out, in - padded(own)]
  Matrix bias;            // [1, out], or null
  // For forward [out / 32][in + 1][32], the weight transposed and the bias; for backward
  // [in / 32][out][32], null where no D before this layer is wanted.
  void* packed;
  // Of a hidden layer, in blocks: y, or u if the activation keeps that. Null where it isn't kept.
  void* hidden;
  // For backward, in blocks: what comes into the layer, null where it has no use, and D.
  void* input;
  void* grad;
  Matrix grad_weight, grad_context_weight, grad_bias;  // null where they aren't wanted
};

struct Chain {
  DType dtype;  // float32 or float64
  Activation activation;
  std::int64_t count;
  const Layer* layers;
  Batch batch;
  Matrix x;        // [B, own of the first layer]
  Matrix context;  // [B, what else comes into it]

  __attribute__((always_inline)) const Layer& last() const { return layers[count - 1]; }
};

// The affine map of a coupling layer. Rows of all matrices are dense.
struct Affine {
  affine_coupling::ScaleMap map;
  bool inverse;
  double clamp;
  std::int64_t count;  // of changed features; 0 where there is no map
  Matrix x;            // [B, count]
};
struct AffineForward : Affine {
  Matrix kept;  // the other features of y, a copy of what comes into the first layer
  Matrix y;     // [B, count]
  void* log_det;
};
// Null where it is absent or isn't wanted. The gradient of the kept features of y is added to what
// comes back through the layers.
struct AffineBackward : Affine {
  Matrix raw;  // log_scale and shift, [B, 2 count]
  Matrix grad_kept, grad_y, grad_x;
  RowScalars grad_log_det;
};

// Packing has a task for each panel of all layers' outputs, and the rest one for each block of
// rows.
struct Forward : Chain {
  Matrix projection;  // [B, out of the first layer], or null
  Matrix result;
  AffineForward affine;

  __attribute__((always_inline)) std::int64_t widest() const {
    std::int64_t widest = kPanel;
    for (std::int64_t l = 0; l < count; ++l)
      if (padded(layers[l].in) > widest) widest = padded(layers[l].in);
    return widest;
  }
  // Elements of a thread's scratch memory: the layers' inputs, in turn, and a panel.
  __attribute__((always_inline)) std::int64_t scratch() const {
    return Batch::kMostRows * (2 * widest() + kPanel);
  }
};

// Packing has a task for each panel of all layers' inputs. D down to that of `lowest`, with a task
// for each block of rows; then the weights' gradients, with one for each of their tiles of 32 x 32,
// and the biases', with one for each panel of all layers' outputs.
struct Backward : Chain {
  static constexpr std::int64_t kTile = kPanel * kPanel;
  static constexpr std::int64_t kTilesAtOnce = 32;
  std::int64_t lowest;
  Matrix grad, grad_x, grad_context, grad_projection;  // null where they aren't wanted
  AffineBackward affine;                               // its gradient stands for `grad`

  __attribute__((always_inline)) std::int64_t tiles(const Layer& layer) const {
    const bool wanted =
        layer.grad_weight.data != nullptr || layer.grad_context_weight.data != nullptr;
    return wanted ? panels(layer.out) * panels(layer.in) : 0;
  }
  // Elements of a thread's scratch memory: tiles of the weights' gradients, or for D a panel, and
  // before that the gradient to log_scale and shift.
  __attribute__((always_inline)) std::int64_t scratch() const {
    const std::int64_t raw = Batch::kMostRows * 2 * affine.count;
    return raw > kTilesAtOnce * kTile ? raw : kTilesAtOnce * kTile;
  }
};

}  // namespace geco::coupling_mlp
