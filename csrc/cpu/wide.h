// Sums in twice the precision of the data: float64 for float32 and less, pairs of float64 (hi + lo,
// "double-double") for float64.
#pragma once

#include "cpu/simd.h"

namespace geco::cpu {
namespace {

struct Pair {
  VecF64 hi, lo;
};

template <class T>
struct WideOf {
  using type = VecF64;
};
template <>
struct WideOf<double> {
  using type = Pair;
};

// x + y = sum + error exactly (Knuth); of ordered magnitudes in fewer steps (Dekker).
inline Pair two_sum(VecF64 x, VecF64 y) {
  const VecF64 sum = x + y;
  const VecF64 part = sum - x;
  return {sum, (x - (sum - part)) + (y - part)};
}
inline Pair ordered_two_sum(VecF64 x, VecF64 y) {
  const VecF64 sum = x + y;
  return {sum, y - (sum - x)};
}

// x y = product + error exactly.
inline Pair two_product(VecF64 x, VecF64 y) {
  const VecF64 product = x * y;
#if defined(__AVX512F__)
  const __m512d error =
      _mm512_fmsub_pd(bit_cast<__m512d>(x), bit_cast<__m512d>(y), bit_cast<__m512d>(product));
  return {product, bit_cast<VecF64>(error)};
#elif defined(__AVX2__) && defined(__FMA__)
  const __m256d error =
      _mm256_fmsub_pd(bit_cast<__m256d>(x), bit_cast<__m256d>(y), bit_cast<__m256d>(product));
  return {product, bit_cast<VecF64>(error)};
#else
  VecF64 error;
  for (int i = 0; i < kLanes<double>; ++i) error[i] = __builtin_fma(x[i], y[i], -product[i]);
  return {product, error};
#endif
}

inline Pair operator+(Pair x, Pair y) {
  const Pair sum = two_sum(x.hi, y.hi);
  return ordered_two_sum(sum.hi, sum.lo + (x.lo + y.lo));
}
inline Pair operator-(Pair x) { return {-x.hi, -x.lo}; }
inline Pair operator-(Pair x, Pair y) { return x + -y; }
inline Pair operator*(Pair x, Pair y) {
  const Pair product = two_product(x.hi, y.hi);
  return ordered_two_sum(product.hi, product.lo + (x.hi * y.lo + x.lo * y.hi));
}
inline Pair operator*(Pair x, VecF64 y) {
  const Pair product = two_product(x.hi, y);
  return ordered_two_sum(product.hi, product.lo + x.lo * y);
}

inline VecF64 narrow(VecF64 x) { return x; }
inline VecF64 narrow(Pair x) { return x.hi + x.lo; }

// x - y for a value and a number of the data's type: exact in pairs.
template <class W>
inline W difference(VecF64 x, VecF64 y) {
  if constexpr (sizeof(W) == sizeof(VecF64))
    return x - y;
  else
    return two_sum(x, -y);
}

// A wide number's parts lie in two planes, `plane` doubles apart.
template <class W>
constexpr int kPlanes = int(sizeof(W) / sizeof(VecF64));

template <class W>
inline W load_wide(const double* from, std::int64_t plane) {
  if constexpr (kPlanes<W> == 1)
    return load(from);
  else
    return {load(from), load(from + plane)};
}
template <class W>
inline void store_wide(double* to, std::int64_t plane, W x) {
  if constexpr (kPlanes<W> == 1) {
    store(to, x);
  } else {
    store(to, x.hi);
    store(to + plane, x.lo);
  }
}

// kLanes<double> values of the data's type, as float64 and back.
using HalfF32 = float __attribute__((vector_size(kVectorBytes / 2)));
inline VecF64 load_as_double(const double* from) { return load(from); }
inline VecF64 load_as_double(const float* from) {
  HalfF32 x;
  std::memcpy(&x, from, sizeof(x));
#if defined(__AVX512F__)  // GCC 12 makes four instructions of a conversion, and six of the other
  return bit_cast<VecF64>(_mm512_maskz_cvtps_pd(0xff, bit_cast<__m256>(x)));
#else
  return __builtin_convertvector(x, VecF64);
#endif
}
inline void store_double(double* to, VecF64 x) { store(to, x); }
inline void store_double(float* to, VecF64 x) {
#if defined(__AVX512F__)
  const __m256 narrowed = _mm512_maskz_cvtpd_ps(0xff, bit_cast<__m512d>(x));
#else
  const HalfF32 narrowed = __builtin_convertvector(x, HalfF32);
#endif
  std::memcpy(to, &narrowed, sizeof(narrowed));
}

// The larger of x and a bound; NaN stays: the instruction returns its second operand for it.
inline VecF64 at_least(VecF64 x, double bound) {
#if defined(__AVX512F__)
  return bit_cast<VecF64>(_mm512_maskz_max_pd(0xff, _mm512_set1_pd(bound), bit_cast<__m512d>(x)));
#elif defined(__AVX2__)
  return bit_cast<VecF64>(_mm256_max_pd(_mm256_set1_pd(bound), bit_cast<__m256d>(x)));
#else
  return x < bound ? broadcast<double>(bound) : x;
#endif
}

// 1 / sqrt(x) and 1 / x for positive, normal x, to the precision of T: for float32 AVX-512's
// estimate of 14 bits and one Newton step give 27.
template <class T>
inline VecF64 inverse_sqrt(VecF64 x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const VecF64 y = bit_cast<VecF64>(_mm512_maskz_rsqrt14_pd(0xff, bit_cast<__m512d>(x)));
    return y + (0.5 * y) * (1.0 - (x * y) * y);
  }
  return 1.0 / bit_cast<VecF64>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(x)));
#elif defined(__AVX2__)
  return 1.0 / bit_cast<VecF64>(_mm256_sqrt_pd(bit_cast<__m256d>(x)));
#else
  VecF64 root;
  for (int i = 0; i < kLanes<double>; ++i) root[i] = __builtin_sqrt(x[i]);
  return 1.0 / root;
#endif
}
template <class T>
inline VecF64 inverse(VecF64 x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const VecF64 y = bit_cast<VecF64>(_mm512_maskz_rcp14_pd(0xff, bit_cast<__m512d>(x)));
    return y + y * (1.0 - x * y);
  }
#endif
  return 1.0 / x;
}

}  // namespace
}  // namespace geco::cpu
