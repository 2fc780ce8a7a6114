// A chain of linear layers with an activation between each two, the conditioner of a coupling
// layer. With y_0 = x:
//   u_1 = W_1 y_0 + b_1 + context_projection,  y_l = activation(u_l),  u_l+1 = W_l+1 y_l + b_l+1
// and the result is the last u. With D_L the gradient to it:
//   D_l = (D_l+1 W_l+1) * activation'(u_l)
//   grad_W_l = D_l^T y_l-1   grad_b_l = sum of D_l over the batch
//   grad_x = D_1 W_1         grad_context_projection = D_1
//
// The batch is cut into blocks of rows. A layer's values lie in panels of 32 columns, the panels of
// one block after those of another: [blocks][width / 32][rows][32].
#pragma once

#include <cstdint>

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
  std::int64_t in, out;
  Matrix weight;  // [out, in]
  Matrix bias;    // [1, out], or null
  // For forward [out / 32][in + 1][32], the weight transposed and the bias; for backward
  // [in / 32][out][32], null where no D before this layer is wanted.
  void* packed;
  // Of a hidden layer, in blocks: y, or u if the activation keeps that. Null where it isn't kept.
  void* hidden;
  // For backward, in blocks: what comes into the layer, null where it has no use, and D.
  void* input;
  void* grad;
  Matrix grad_weight, grad_bias;  // null where they aren't wanted
};

struct Chain {
  DType dtype;  // float32 or float64
  Activation activation;
  std::int64_t count;
  const Layer* layers;
  Batch batch;
  Matrix x;  // [B, in of the first layer]

  __attribute__((always_inline)) const Layer& last() const { return layers[count - 1]; }
};

// Packing has a task for each panel of all layers' outputs, and the rest one for each block of
// rows.
struct Forward : Chain {
  Matrix projection;  // [B, out of the first layer], or null
  Matrix result;

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
  Matrix grad, grad_x, grad_projection;  // null where they aren't wanted

  __attribute__((always_inline)) std::int64_t tiles(const Layer& layer) const {
    return layer.grad_weight.data == nullptr ? 0 : panels(layer.out) * panels(layer.in);
  }
  // Elements of a thread's scratch memory for the weights' gradients; for D it takes no more.
  __attribute__((always_inline)) static constexpr std::int64_t scratch() {
    return kTilesAtOnce * kTile;
  }
};

}  // namespace geco::coupling_mlp
