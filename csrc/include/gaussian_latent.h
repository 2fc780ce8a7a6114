// Reparametrised sample of a diagonal Gaussian and its divergence from another, over [B, ...]:
//   z    = q_mean + exp(q_log_std) noise
//   kl_b = sum_j (expm1(2 r) + d^2) / 2 - r
// with r = q_log_std - p_log_std and d = (q_mean - p_mean) exp(-p_log_std).
#pragma once

#include "include/numeric.h"
#include "include/strided.h"

namespace geco::gaussian_latent {

enum Operand { kQMean, kQLogStd, kPMean, kPLogStd, kNoise };

struct Forward {
  enum { kZ = 5 };
  DType dtype;
  Rows<5, 1> rows;
  RowSums kl;
};

// Either incoming gradient may be absent, which stands for zeros, and any of the others, then it
// isn't computed.
struct Backward {
  enum { kGradZ = 5, kGradQMean, kGradQLogStd, kGradPMean, kGradPLogStd, kGradNoise };
  DType dtype;
  Rows<6, 5> rows;
  RowScalars grad_kl;
};

}  // namespace geco::gaussian_latent
