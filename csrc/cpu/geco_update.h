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

// As many float64 lanes as a vector of T has.
template <class T>
struct DoublesOf {
  using type = VecF64;
};
template <>
struct DoublesOf<float> {
  using type = double __attribute__((vector_size(2 * kVectorBytes)));
};

// Adds up rows of any length, in pieces that are whole vectors but for the last.
template <class Storage>
struct BatchSum {
  using T = typename Compute<Storage>::type;
  using Wide = typename DoublesOf<T>::type;
  Wide partial{};

  void add(const Storage* values, std::int64_t count) {
    std::int64_t j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>)
      partial += __builtin_convertvector(load(values + j), Wide);
    if (j < count) partial += __builtin_convertvector(load(values + j, int(count - j)), Wide);
  }
  double total() const {
    double sum = 0;
    for (int k = 0; k < kLanes<T>; ++k) sum += partial[k];
    return sum;
  }
};

template <class Storage>
double sum_of_row(const Storage* row, std::int64_t count, std::int64_t stride) {
  BatchSum<Storage> sum;
  if (stride == 1) {
    sum.add(row, count);
    return sum.total();
  }
  constexpr std::int64_t kPiece = 256;
  Storage piece[kPiece];
  for (std::int64_t begin = 0; begin < count; begin += kPiece) {
    const std::int64_t left = count - begin;
    const std::int64_t size = left < kPiece ? left : kPiece;
    for (std::int64_t j = 0; j < size; ++j) piece[j] = row[(begin + j) * stride];
    sum.add(piece, size);
  }
  return sum.total();
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
  double penalty = 0;
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
      penalty += lambda * c;
      continue;
    }
    const double ema = step == 0 ? c : p.alpha * get(p.ema, l) + (1 - p.alpha) * c;
    penalty += lambda * ema;
    set(p.ema, l, ema);
    if (due) set(p.log_lambda, l, moved(p, log_lambda, ema));
  }
  set(p.penalty, 0, penalty);
  if (p.update) *p.step = step + 1;
}

}  // namespace
}  // namespace geco::cpu
