// Several operands over one index space, each with strides of its own.
#pragma once

#include <cstdint>

namespace geco {

constexpr int kMaxDims = 5;

// The last dimension is the innermost; strides count elements. The first `Inputs` operands are
// read, the others are written. A null pointer marks an operand that is absent.
template <int Inputs, int Outputs>
struct Strided {
  static constexpr int kInputs = Inputs;
  static constexpr int kOperands = Inputs + Outputs;

  int dims;
  std::int64_t size[kMaxDims];
  std::int64_t stride[kOperands][kMaxDims];
  void* data[kOperands];

  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= size[d];
    return n;
  }
};

}  // namespace geco
