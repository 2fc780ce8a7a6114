// Winograd's transforms in one dimension, of vectors. The points are 0, +-1, +-2, +-1/2 and
// infinity (without +-1/2: six points instead of eight). With f(x) = x prod (x^2 - b^2) and
// q = f / (x^2 - a^2), the rows of B^T for +-a are the coefficients of x q +- a q: even and odd
// coefficients, so both come from two sums. A^T holds the points' powers, and G their powers over
// f'(a): a filter is transformed as outputs are backwards.
#pragma once

#include "cpu/simd.h"

namespace geco::cpu {
namespace {

constexpr double kPoints[] = {1, 2, 0.5};

// The coefficient of x^(2k + 1) in x times the product of (x^2 - b^2) over all pairs but `without`.
template <int kPairs>
constexpr double numerator(int k, int without) {
  double c[kPairs + 2] = {1};
  int degree = 0;
  for (int i = 0; i < kPairs; ++i) {
    if (i == without) continue;
    const double square = kPoints[i] * kPoints[i];
    ++degree;
    for (int j = degree; j >= 0; --j) c[j] = (j > 0 ? c[j - 1] : 0) - square * c[j];
  }
  return k <= degree ? c[k] : 0;
}

template <int kPairs>
struct Numerators {
  float pair[kPairs][kPairs], all[kPairs + 1];
  constexpr Numerators() : pair{}, all{} {
    for (int i = 0; i < kPairs; ++i)
      for (int k = 0; k < kPairs; ++k) pair[i][k] = float(numerator<kPairs>(k, i));
    for (int k = 0; k <= kPairs; ++k) all[k] = float(numerator<kPairs>(k, -1));
  }
};

constexpr double power(double x, int k) {
  double result = 1;
  for (int j = 0; j < k; ++j) result *= x;
  return result;
}

// f'(a) of the pair `i`; -1 stands for the point 0.
template <int kPairs>
constexpr double denominator(int i) {
  const double square = i < 0 ? 0 : kPoints[i] * kPoints[i];
  double result = i < 0 ? 1 : 2 * square;
  for (int j = 0; j < kPairs; ++j)
    if (j != i) result *= square - kPoints[j] * kPoints[j];
  return result;
}

// Points are numbered 0, then +a and -a of each pair, then infinity.
template <int kPairs>
constexpr int kPointCount = 2 * kPairs + 2;

// B^T d.
template <int kPairs, class V>
inline __attribute__((always_inline)) void to_points(const V* d, V* v) {
  constexpr Numerators<kPairs> kN;
  V zero = d[0] * kN.all[0], infinity = d[1] * kN.all[0];
#pragma GCC unroll 4
  for (int k = 1; k <= kPairs; ++k) {
    zero += d[2 * k] * kN.all[k];
    infinity += d[2 * k + 1] * kN.all[k];
  }
  v[0] = zero;
  v[2 * kPairs + 1] = infinity;
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    V even = d[2] * kN.pair[i][0], odd = d[1] * kN.pair[i][0];
#pragma GCC unroll 4
    for (int k = 1; k < kPairs; ++k) {
      even += d[2 * k + 2] * kN.pair[i][k];
      odd += d[2 * k + 1] * kN.pair[i][k];
    }
    v[2 * i + 1] = even + odd * float(kPoints[i]);
    v[2 * i + 2] = even - odd * float(kPoints[i]);
  }
}

// B v, the adjoint.
template <int kPairs, class V>
inline __attribute__((always_inline)) void from_points(const V* v, V* d) {
  constexpr Numerators<kPairs> kN;
  V sum[kPairs], difference[kPairs];
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    sum[i] = v[2 * i + 1] + v[2 * i + 2];
    difference[i] = (v[2 * i + 1] - v[2 * i + 2]) * float(kPoints[i]);
  }
  d[0] = v[0] * kN.all[0];
  d[2 * kPairs + 1] = v[2 * kPairs + 1] * kN.all[kPairs];
#pragma GCC unroll 4
  for (int k = 0; k < kPairs; ++k) {
    V odd = v[2 * kPairs + 1] * kN.all[k], even = v[0] * kN.all[k + 1];
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      odd += difference[i] * kN.pair[i][k];
      even += sum[i] * kN.pair[i][k];
    }
    d[2 * k + 1] = odd;
    d[2 * k + 2] = even;
  }
}

// A^T v, kOutputs values.
template <int kPairs, int kOutputs, class V>
inline __attribute__((always_inline)) void to_outputs(const V* v, V* y) {
  V sum[kPairs], difference[kPairs];
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    sum[i] = v[2 * i + 1] + v[2 * i + 2];
    difference[i] = v[2 * i + 1] - v[2 * i + 2];
  }
#pragma GCC unroll 8
  for (int k = 0; k < kOutputs; ++k) {
    const V* part = k % 2 ? difference : sum;
    V value = part[0];
    if (k == 0) value += v[0];
    if (k == kOutputs - 1) value += v[2 * kPairs + 1];
#pragma GCC unroll 4
    for (int i = 1; i < kPairs; ++i) value += part[i] * float(power(kPoints[i], k));
    y[k] = value;
  }
}

// A y, the adjoint.
template <int kPairs, int kOutputs, class V>
inline __attribute__((always_inline)) void from_outputs(const V* y, V* v) {
  v[0] = y[0];
  v[2 * kPairs + 1] = y[kOutputs - 1];
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    V even = y[0], odd = y[1] * float(kPoints[i]);
#pragma GCC unroll 8
    for (int k = 2; k < kOutputs; ++k) (k % 2 ? odd : even) += y[k] * float(power(kPoints[i], k));
    v[2 * i + 1] = even + odd;
    v[2 * i + 2] = even - odd;
  }
}

// G = diag(scales) A for as many outputs as the kernel has taps.
template <int kPairs>
struct Scales {
  float at[kPointCount<kPairs>];
  constexpr Scales() : at{} {
    at[0] = float(1 / denominator<kPairs>(-1));
    at[2 * kPairs + 1] = 1;
    for (int i = 0; i < kPairs; ++i)
      at[2 * i + 1] = at[2 * i + 2] = float(1 / denominator<kPairs>(i));
  }
};

}  // namespace
}  // namespace geco::cpu
