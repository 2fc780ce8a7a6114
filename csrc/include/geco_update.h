// One step of GECO's constraint average and multipliers, over c_hat [L, B]:
//   c          = mean of c_hat over the batch
//   ema        = c at step 0, else alpha ema + (1 - alpha) c
//   penalty    = sum lambda ema                                  with the old lambda
//   log_lambda = clip(log_lambda + clip(step_size ema, down, up), low, high)
//   step       = step + 1
// and slope [L] = lambda / B, the gradient of the penalty to c_hat.
#pragma once

#include "include/numeric.h"

namespace geco::geco_update {

// A vector [L] of the state, float32 or float64.
struct State {
  void* data;
  std::int64_t stride;
  DType dtype;
};

struct Params {
  std::int64_t constraints, batch;
  DType dtype;  // of c_hat
  const void* c_hat;
  std::int64_t constraint_stride, batch_stride;
  State ema, log_lambda, slope, penalty;  // the penalty is one element
  std::int64_t* step;

  bool update;  // else the penalty is that of the batch alone, and the state stays
  double alpha, step_size, low, high, down, up;
  double speedup;  // factor of the step while the average is at most zero
  std::int64_t warmup_steps, update_every;
  bool softplus2;  // ascend on w of lambda = softplus(w)^2
};

}  // namespace geco::geco_update
