// Several operands over one index space, each with strides of its own.
#pragma once

#include <cstdint>

namespace geco {

constexpr int kMaxDims = 8;

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

// Null where it is absent.
struct Matrix {
  void* data;
  std::int64_t row, column;  // from one to the next
};

// Operands whose batch elements, or rows, are worked on apart. Each row is cut into blocks of
// kBlock elements; row and block together number the units of work, so what is summed in which
// order doesn't depend on how they are shared out.
constexpr std::int64_t kBlock = 8192;

template <int Inputs, int Outputs>
struct Rows {
  static constexpr int kInputs = Inputs;
  static constexpr int kOperands = Inputs + Outputs;

  Strided<Inputs, Outputs> first;  // the first row
  std::int64_t count;
  std::int64_t step[kOperands];  // from one row to the next
  std::int64_t length;           // elements of one row

  // One at least: a row without elements has a sum, too.
  __attribute__((always_inline)) std::int64_t blocks() const {
    return length > kBlock ? (length + kBlock - 1) / kBlock : 1;
  }
};

// Where the sum of each row goes, in the type of the arithmetic. With several blocks in a row
// their sums go to `partial`, [rows, blocks], and are added afterwards.
struct RowSums {
  void* total;
  double* partial;
  double divisor;
};

// One number for each row, in the type of the arithmetic; null stands for zeros.
struct RowScalars {
  const void* data;
  std::int64_t stride;
};

}  // namespace geco
