// Affine map of a coupling layer, over [B, ...], with s = map(log_scale):
//   forward  y = x exp(s) + shift       log_det_b =  sum_j s_bj
//   inverse  y = (x - shift) exp(-s)    log_det_b = -sum_j s_bj
#pragma once

#include "include/numeric.h"
#include "include/strided.h"

namespace geco::affine_coupling {

enum class ScaleMap { kExp, kTanh, kAtan, kSigmoid };
enum Operand { kX, kLogScale, kShift };

struct Forward {
  enum { kY = 3 };
  DType dtype;
  ScaleMap map;
  bool inverse;
  double clamp;
  Rows<3, 1> rows;
  RowSums log_det;
};

// s is computed again from log_scale. The shift and its gradient take part in the inverse alone:
// forward the gradient of y is that of the shift. The gradient of y may be absent, which stands for
// zeros, and any of the others, then it isn't computed.
struct Backward {
  enum { kGradY = 3, kGradX, kGradLogScale, kGradShift };
  DType dtype;
  ScaleMap map;
  bool inverse;
  double clamp;
  Rows<4, 3> rows;
  RowScalars grad_log_det;
};

}  // namespace geco::affine_coupling
