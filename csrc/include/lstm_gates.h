// Pointwise half of an LSTM cell, over [B, C, *S]:
//   c_next = sigmoid(f + forget_bias) * c + sigmoid(i) * tanh(g)
//   h      = sigmoid(o) * tanh(c_next)
// i, f, g, o are the four channel blocks of one tensor [B, 4C, *S], so each is an operand that
// differs from its neighbour by an offset alone.
#pragma once

#include "include/numeric.h"
#include "include/strided.h"

namespace geco::lstm_gates {

enum Operand { kI, kF, kG, kO, kC };

struct Forward {
  enum { kH = 5, kCNext };
  DType dtype;
  double forget_bias;
  Strided<5, 2> operands;
};

// Nothing but the inputs is kept: the activations are computed again.
// Either incoming gradient may be absent, which stands for zeros.
struct Backward {
  enum { kGradH = 5, kGradCNext, kGradI, kGradF, kGradG, kGradO, kGradC };
  DType dtype;
  double forget_bias;
  Strided<7, 5> operands;
};

}  // namespace geco::lstm_gates
