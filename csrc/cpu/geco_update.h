// A step of GECO on the CPU: L B values are read once, and what is left is a few scalars for each
// constraint. All arithmetic is in float64, which costs nothing at these sizes: the sum of a batch
// has a fixed order for an instruction set, whatever the layout, and results are rounded once.
// One thread does it all: a batch is too short to pay for waking another.
#pragma once

#include <cmath>

#include "cpu/simd.h"
#include "include/geco_update.h"

namespace geco::cpu {
namespace {

inline void accumulate(VecF64 x, RunningSum<double>* sum) { sum->add(x); }
inline void accumulate(VecF32 x, RunningSum<double>* sum) {
  Lanes<float, kVectorBytes / 2>::type half[2];
  std::memcpy(half, &x, sizeof(x));
  for (const auto& each : half) sum->add(__builtin_convertvector(each, VecF64));
}

template <class Storage>
double sum_of_row(const Storage* row, std::int64_t count, std::int64_t stride) {
  constexpr std::int64_t kWidth = kLanes<typename Compute<Storage>::type>;
  RunningSum<double> sum;
  Storage gathered[kWidth] = {};
  for (std::int64_t j = 0; j < count; j += kWidth) {
    const std::int64_t left = count - j < kWidth ? count - j : kWidth;
    const Storage* from = row + j;
    if (stride != 1) {
      for (std::int64_t k = 0; k < left; ++k) gathered[k] = row[(j + k) * stride];
      from = gathered;
    }
    accumulate(left == kWidth ? load(from) : load(from, int(left)), &sum);
  }
  return sum.value();
}

inline double get(const geco_update::State& state, std::int64_t l) {
  if (state.dtype == DType::kFloat64) return static_cast<double*>(state.data)[l * state.stride];
  return double(static_cast<float*>(state.data)[l * state.stride]);
}
inline void set(const geco_update::State& state, std::int64_t l, double value) {
  if (state.dtype == DType::kFloat64)
    static_cast<double*>(state.data)[l * state.stride] = value;
  else
    static_cast<float*>(state.data)[l * state.stride] = float(value);
}

// NaN passes.
inline double within(double x, double low, double high) {
  return x < low ? low : x > high ? high : x;
}

inline double moved(const geco_update::Params& p, double log_lambda, double ema) {
  double ascent = p.step_size * ema;
  if (ema <= 0) ascent *= p.speedup;
  if (p.softplus2) {
    const double root = std::exp(0.5 * log_lambda);  // softplus(w)
    const double slope = -std::expm1(-root);         // sigmoid(w)
    const double w = root + std::log(slope) + ascent * 2 * root * slope;
    const double softplus = (w > 0 ? w : 0.0) + std::log1p(std::exp(-std::fabs(w)));
    ascent = 2 * std::log(softplus) - log_lambda;
  }
  return within(log_lambda + within(ascent, p.down, p.up), p.low, p.high);
}

void geco_update_step(const geco_update::Params& p) {
  const std::int64_t step = *p.step;
  const bool due = step >= p.warmup_steps && step % p.update_every == 0;
  CompensatedSum penalty;
  for (std::int64_t l = 0; l < p.constraints; ++l) {
    double sum = 0;
    visit_storage(p.dtype, [&]<class Storage>(Storage*) {
      const Storage* row = static_cast<const Storage*>(p.c_hat) + l * p.constraint_stride;
      sum = sum_of_row(row, p.batch, p.batch_stride);
    });
    const double c = sum / double(p.batch);
    const double log_lambda = get(p.log_lambda, l);
    const double lambda = std::exp(log_lambda);
    if (p.batch > 0) set(p.slope, l, lambda / double(p.batch));
    if (!p.update) {
      penalty.add(lambda * c);
      continue;
    }
    const double ema = step == 0 ? c : p.alpha * get(p.ema, l) + (1 - p.alpha) * c;
    penalty.add(lambda * ema);
    set(p.ema, l, ema);
    if (due) set(p.log_lambda, l, moved(p, log_lambda, ema));
  }
  set(p.penalty, 0, penalty.value());
  if (p.update) *p.step = step + 1;
}

}  // namespace
}  // namespace geco::cpu
