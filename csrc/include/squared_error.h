// Squared error of each batch element, over [B, ...]:
//   out_b = sum_j (x_bj - y_bj)^2 / divisor
#pragma once

#include "include/numeric.h"
#include "include/strided.h"

namespace geco::squared_error {

enum Operand { kX, kY };

struct Forward {
  DType dtype;
  Rows<2, 0> rows;
  RowSums sums;
};

// Either gradient may be absent, then it isn't computed.
struct Backward {
  enum { kGradX = 2, kGradY };
  DType dtype;
  Rows<2, 2> rows;
  RowScalars grad;
  double divisor;
};

}  // namespace geco::squared_error
