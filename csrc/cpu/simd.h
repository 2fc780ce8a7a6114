// Vectors as wide as the instruction set this file is compiled for, on GCC's vector extensions.
// Everything has internal linkage: each level's file holds a copy of its own, and the linker can't
// swap one level's code for another's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "include/numeric.h"
#include "include/strided.h"

namespace geco::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

using VecF32 = float __attribute__((vector_size(kVectorBytes)));
using VecF64 = double __attribute__((vector_size(kVectorBytes)));
using VecI32 = std::int32_t __attribute__((vector_size(kVectorBytes)));
using VecI64 = std::int64_t __attribute__((vector_size(kVectorBytes)));
using VecU32 = std::uint32_t __attribute__((vector_size(kVectorBytes)));
using VecU16 = std::uint16_t __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF32;
};
template <>
struct VecOf<double> {
  using type = VecF64;
};
template <class T>
using Vec = typename VecOf<T>::type;

// The standard library's are no part of a level: the linker would choose one level's for all.
template <class T>
inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}
template <class T>
inline bool is_finite(T x) {
  return x - x == 0;
}
template <class T, int kLength>
constexpr int length(const T (&)[kLength]) {
  return kLength;
}
template <class T>
constexpr T kInfinity = T(__builtin_inf());
template <class T>
constexpr T kLargest = sizeof(T) == 4 ? T(__FLT_MAX__) : T(__DBL_MAX__);
template <class T>
inline void fill(T* to, std::int64_t count, T value) {
  for (std::int64_t j = 0; j < count; ++j) to[j] = value;
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// How a vector of a storage type lies in memory, and its way to and from arithmetic.
template <class Storage>
struct Memory {
  using Raw = Vec<Storage>;
  static Raw widen(Raw raw) { return raw; }
  static Raw narrow(Raw x) { return x; }
};

template <>
struct Memory<BFloat16> {
  using Raw = VecU16;
  static VecF32 widen(Raw raw) {
    return bit_cast<VecF32>(__builtin_convertvector(raw, VecU32) << 16);
  }
  // Rounds to nearest even; a NaN stays one.
  static Raw narrow(VecF32 x) {
    const VecU32 bits = bit_cast<VecU32>(x);
    const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VecU32 nan = (bits >> 16) | 0x40u;
    return __builtin_convertvector(x == x ? rounded : nan, VecU16);
  }
};

template <>
struct Memory<Float16> {
  using Raw = VecU16;
#if defined(__AVX512F__)
  static VecF32 widen(Raw raw) {
    return bit_cast<VecF32>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(raw)));
  }
  static Raw narrow(VecF32 x) {
    return bit_cast<Raw>(
        _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static VecF32 widen(Raw raw) { return bit_cast<VecF32>(_mm256_cvtph_ps(bit_cast<__m128i>(raw))); }
  static Raw narrow(VecF32 x) {
    return bit_cast<Raw>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static VecF32 widen(Raw raw) {
    const VecU32 bits = __builtin_convertvector(raw, VecU32);
    const VecU32 magnitude = (bits & 0x7fffu) << 13;
    // Multiplying by 2^112 moves the exponent's bias from 15 to 127, subnormals included.
    const VecU32 finite = bit_cast<VecU32>(bit_cast<VecF32>(magnitude) * 0x1p112f);
    const VecU32 special = magnitude | 0x7f800000u;
    const VecU32 result = magnitude >= (0x7c00u << 13) ? special : finite;
    return bit_cast<VecF32>(result | ((bits & 0x8000u) << 16));
  }
  static Raw narrow(VecF32 x) {
    const VecU32 bits = bit_cast<VecU32>(x);
    const VecU32 magnitude = bits & 0x7fffffffu;
    const VecU32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 an addition does the rounding: 0.5's last place is float16's smallest number.
    const VecU32 subnormal = bit_cast<VecU32>(bit_cast<VecF32>(magnitude) + 0.5f) - 0x3f000000u;
    VecU32 result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? VecU32{} + 0x7c00u : result;
    result = magnitude > 0x7f800000u ? VecU32{} + 0x7e00u : result;
    return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), VecU16);
  }
#endif
};

// `count` lanes of the last vector of a row are touched; the others are zero and dropped.
template <class Storage>
inline auto load(const Storage* from) {
  typename Memory<Storage>::Raw raw;
  std::memcpy(&raw, from, sizeof(raw));
  return Memory<Storage>::widen(raw);
}
template <class Storage>
inline auto load(const Storage* from, int count) {
  using Raw = typename Memory<Storage>::Raw;
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(Storage) == 8)
    return Memory<Storage>::widen(bit_cast<Raw>(_mm512_maskz_loadu_pd(__mmask8(mask), from)));
  else if constexpr (sizeof(Storage) == 4)
    return Memory<Storage>::widen(bit_cast<Raw>(_mm512_maskz_loadu_ps(__mmask16(mask), from)));
  else
    return Memory<Storage>::widen(bit_cast<Raw>(_mm256_maskz_loadu_epi16(__mmask16(mask), from)));
#else
  Raw raw{};
  std::memcpy(&raw, from, std::size_t(count) * sizeof(Storage));
  return Memory<Storage>::widen(raw);
#endif
}
template <class Storage, class V>
inline void store(Storage* to, V x) {
  const auto raw = Memory<Storage>::narrow(x);
  std::memcpy(to, &raw, sizeof(raw));
}
template <class Storage, class V>
inline void store(Storage* to, V x, int count) {
  const auto raw = Memory<Storage>::narrow(x);
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(Storage) == 8)
    _mm512_mask_storeu_pd(to, __mmask8(mask), bit_cast<__m512d>(raw));
  else if constexpr (sizeof(Storage) == 4)
    _mm512_mask_storeu_ps(to, __mmask16(mask), bit_cast<__m512>(raw));
  else
    _mm256_mask_storeu_epi16(to, __mmask16(mask), bit_cast<__m256i>(raw));
#else
  std::memcpy(to, &raw, std::size_t(count) * sizeof(Storage));
#endif
}

template <class T>
inline Vec<T> broadcast(T x) {
  return Vec<T>{} + x;
}

// Both bounds let NaN pass: min and max instructions return their second operand for it.
inline VecF32 clamp(VecF32 x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 raised = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), bit_cast<__m512>(x));
  return bit_cast<VecF32>(_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), raised));
#elif defined(__AVX2__)
  const __m256 raised = _mm256_max_ps(_mm256_set1_ps(low), bit_cast<__m256>(x));
  return bit_cast<VecF32>(_mm256_min_ps(_mm256_set1_ps(high), raised));
#elif defined(__SSE2__)
  const __m128 raised = _mm_max_ps(_mm_set1_ps(low), bit_cast<__m128>(x));
  return bit_cast<VecF32>(_mm_min_ps(_mm_set1_ps(high), raised));
#else
  x = x < low ? broadcast<float>(low) : x;
  return x > high ? broadcast<float>(high) : x;
#endif
}
inline VecF64 clamp(VecF64 x, double low, double high) {
  x = x < low ? broadcast<double>(low) : x;
  return x > high ? broadcast<double>(high) : x;
}

// 1 / d for finite, normal d and 1 / d. AVX-512's estimate and one Newton step are good to a unit
// in the last place or so, in a third of the time of its division.
inline VecF64 reciprocal(VecF64 d) { return 1.0 / d; }
inline VecF32 reciprocal(VecF32 d) {
#if defined(__AVX512F__)
  const VecF32 estimate = bit_cast<VecF32>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(d)));
  return estimate * (1.0f - d * estimate) + estimate;
#else
  return 1.0f / d;
#endif
}

// exp(x) = 2^n exp(r) with |r| <= ln(2)/2, and exp(r) - 1 = r q(r). The coefficients of q, highest
// power first, are near-minimax fits of (exp(r) - 1) / r: relative error 1.2222e-8 and 2.0419e-17.
// Adding `round` leaves n plus the exponent's bias in the low bits, ready to be shifted into place.
template <class T>
struct Exp;
template <>
struct Exp<float> {
  using Bits = VecI32;
  static constexpr int kMantissa = 23;
  static constexpr float kBias = 127, kRound = 0x1.8p23f + kBias;
  // Beyond +-kReach exp is infinite or zero, from kOverflow its half is infinite, and below
  // -kOneHides it is lost beside one.
  static constexpr float kReach = 110, kOverflow = 89.7f, kOneHides = 30;
#if defined(__FMA__)
  // n times this constant enters a sum unrounded, and is off by 2e-9 n at most.
  static constexpr float kLn2High = 0.693147182f, kLn2Low = 0, kLn2Rest = -1.90465421e-9f;
#else
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kLn2Rest = kLn2Low;
#endif
  static constexpr float kQ[] = {0.001393365f, 0.00836915567f, 0.0416664649f,
                                 0.166665052f, 0.500000001f,   1.00000001f};
};
template <>
struct Exp<double> {
  using Bits = VecI64;
  static constexpr int kMantissa = 52;
  static constexpr double kBias = 1023, kRound = 0x1.8p52 + kBias;
  static constexpr double kReach = 750, kOverflow = 710.7, kOneHides = 50;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kLn2Rest = kLn2Low;
  static constexpr double kQ[] = {2.5105217004720745e-8,
                                  2.7626371065696356e-7,
                                  2.7557255400206424e-6,
                                  2.480150431378554e-5,
                                  0.00019841269874820625,
                                  0.0013888888932514779,
                                  0.0083333333333261351,
                                  0.041666666666573068,
                                  0.16666666666666671,
                                  0.50000000000000056,
                                  1.0};
};

// exp(A x) in two parts: scale = 2^n and em1 = exp(r) - 1, so that exp(A x) = scale + scale * em1.
// A is a power of two or its negative, hence exact in the coefficients. 2^n must be a normal
// number.
template <class T, int A>
inline void exp_parts(Vec<T> x, Vec<T>* em1, Vec<T>* scale) {
  using K = Exp<T>;
  const Vec<T> shifted = x * T(A * 1.4426950408889634) + K::kRound;
  const Vec<T> n = shifted - K::kRound;
  Vec<T> r = x - n * (K::kLn2High / A);
  if constexpr (K::kLn2Low != 0) r = r - n * (K::kLn2Low / A);
  constexpr int kDegree = int(sizeof(K::kQ) / sizeof(T)) - 1;
  T power = A;
  for (int k = 0; k < kDegree; ++k) power *= A;
  Vec<T> q = broadcast<T>(K::kQ[0] * power);
  for (int k = 1; k <= kDegree; ++k) {
    power /= A;
    q = q * r + K::kQ[k] * power;
  }
  *em1 = r * q;
  *scale = bit_cast<Vec<T>>(bit_cast<typename K::Bits>(shifted) << K::kMantissa);
}

// exp(A x), A = 1 or -1, over the whole range: infinite, subnormal and zero as it should be.
template <class T, int A>
inline Vec<T> exp(Vec<T> x) {
  using K = Exp<T>;
  constexpr T kRound = K::kRound + K::kBias;
  const Vec<T> held = clamp(x, -K::kReach, K::kReach);
  const Vec<T> shifted = held * T(A * 1.4426950408889634) + kRound;
  const Vec<T> n = shifted - kRound;
  const Vec<T> r = ((A < 0 ? -held : held) - n * K::kLn2High) - n * K::kLn2Rest;
  Vec<T> q = broadcast<T>(K::kQ[0]);
  for (int k = 1; k < length(K::kQ); ++k) q = q * r + K::kQ[k];
  const Vec<T> result = r * q + T(1);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return bit_cast<Vec<T>>(
        _mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(result), bit_cast<__m512>(n)));
  else
    return bit_cast<Vec<T>>(
        _mm512_maskz_scalef_pd(0xff, bit_cast<__m512d>(result), bit_cast<__m512d>(n)));
#else
  // 2^n may be out of range where the result isn't: two factors, of n plus twice the bias.
  const auto bits = bit_cast<typename K::Bits>(shifted);
  const auto half = bits >> 1;
  return result * bit_cast<Vec<T>>(half << K::kMantissa) *
         bit_cast<Vec<T>>((bits - half) << K::kMantissa);
#endif
}

// (exp(x) - 1 - x) / 2 without cancellation: with x = n ln(2) + r and exp(r) = 1 + r + r^2 p(r) it
// is 2^(n-1) r^2 p(r) + (2^(n-1) - 1/2) (1 + r) - n ln(2) / 2, which for n = 0 is r^2 p(r) / 2.
template <class T>
inline Vec<T> half_exp_excess(Vec<T> x) {
  using K = Exp<T>;
  constexpr T kRound = K::kRound - 1;
  const Vec<T> held = clamp(x, -K::kOneHides, K::kOverflow);
  const Vec<T> shifted = held * T(1.4426950408889634) + kRound;
  const Vec<T> n = shifted - kRound;
  const Vec<T> r = (held - n * K::kLn2High) - n * K::kLn2Rest;
  Vec<T> p = broadcast<T>(K::kQ[0]);
  for (int k = 1; k + 1 < length(K::kQ); ++k) p = p * r + K::kQ[k];
  const Vec<T> half_power = bit_cast<Vec<T>>(bit_cast<typename K::Bits>(shifted) << K::kMantissa);
  const Vec<T> rest = (half_power - T(0.5)) * (r + T(1)) - n * T(0.34657359027997264);
  return r * r * p * half_power + rest + (held - x) * T(0.5);
}

// exp(2x) - 1, accurate relative to itself; infinite where exp(2x) is.
template <class T>
inline Vec<T> expm1_twice(Vec<T> x) {
  using K = Exp<T>;
  constexpr T kRound = K::kRound - 1;
  const Vec<T> held = clamp(x + x, -K::kOneHides, K::kOverflow);
  const Vec<T> shifted = held * T(1.4426950408889634) + kRound;
  const Vec<T> n = shifted - kRound;
  const Vec<T> r = (held - n * K::kLn2High) - n * K::kLn2Rest;
  Vec<T> q = broadcast<T>(K::kQ[0]);
  for (int k = 1; k < length(K::kQ); ++k) q = q * r + K::kQ[k];
  const Vec<T> half_power = bit_cast<Vec<T>>(bit_cast<typename K::Bits>(shifted) << K::kMantissa);
  const Vec<T> half = r * q * half_power + (half_power - T(0.5));
  return half + half;
}

// sigmoid(x) = 1 / (1 + e) with e = exp(-x), and its derivative is e sigmoid(x)^2, without the
// cancellation of 1 - sigmoid(x). x is held where 1 + e, and for the paired form 1 + e times tanh's
// denominator, has a reciprocal that is a normal number. Where x is lower than that the caller
// takes zero for sigmoid, which is below 2e-38, and in the paired form 3e-29.
template <class T>
constexpr T kSigmoidBound = sizeof(T) == 4 ? T(87) : T(708);
template <class T>
constexpr T kPairedSigmoidBound = sizeof(T) == 4 ? T(66) : T(660);
template <class T>
constexpr T kTanhBound = sizeof(T) == 4 ? T(10) : T(20);

template <class T>
inline Vec<T> sigmoid_exp(Vec<T> x, T bound) {
  Vec<T> em1, scale;
  exp_parts<T, -1>(clamp(x, -bound, kSigmoidBound<T>), &em1, &scale);
  return em1 * scale + scale;
}

// `value` where x is not below `low` (or is NaN), else zero.
template <class T>
inline Vec<T> zero_below(Vec<T> x, T low, Vec<T> value) {
  return x < low ? Vec<T>{} : value;
}

// tanh(x) = numerator / denominator, with e = exp(2x): (e - 1) / (e + 1). The numerator is exact to
// its last places near zero. The derivative, 4e / (e + 1)^2, has no cancellation in this form; past
// the bound, where tanh is 1 in the arithmetic's precision, it is zero.
template <class T>
struct TanhParts {
  Vec<T> exp, numerator, denominator;
  Vec<T> derivative(Vec<T> inverse_denominator) const {
    const Vec<T> twice = inverse_denominator + inverse_denominator;
    return twice * twice * exp;
  }
};
template <class T>
inline TanhParts<T> tanh_parts(Vec<T> x) {
  Vec<T> em1, scale;
  const Vec<T> held = clamp(x, -kTanhBound<T>, kTanhBound<T>);
  exp_parts<T, 2>(held, &em1, &scale);
  const Vec<T> numerator = em1 * scale + (scale - T(1));
  const Vec<T> exp = em1 * scale + scale;
  return {held == x ? exp : Vec<T>{}, numerator, numerator + T(2)};
}

// log(1 + e) for e in [0, 1] is 2 atanh(w), with w = e / (2 + e) in [0, 1/3], and
// atanh(w) = w + w^3 p(w^2). The near-minimax coefficients of p, highest power first, leave a
// relative error of 5.4e-9 and 5.1e-17.
template <class T>
constexpr T kAtanh[] = {0.140060052f, 0.140009001f, 0.200107634f, 0.333332092f};
template <>
constexpr double kAtanh<double>[] = {0.08869882661925295, 0.04951408937344817, 0.06793157427924132,
                                     0.07682147731547198, 0.09091407038001621, 0.11111096452272821,
                                     0.14285714528999396, 0.1999999999802485,  0.3333333333333885};

template <class T>
inline Vec<T> twice_atanh(Vec<T> w) {
  const Vec<T> square = w * w;
  Vec<T> p = broadcast<T>(kAtanh<T>[0]);
  for (int k = 1; k < length(kAtanh<T>); ++k) p = p * square + kAtanh<T>[k];
  const Vec<T> twice = w + w;
  return twice * square * p + twice;
}

// atan(x) for |x| > 1 is pi/2 - atan(1 / x), and below atan(t) = t + t^3 p(t^2). The near-minimax
// coefficients of p leave a relative error of 9.1e-9 and 3.7e-17.
template <class T>
constexpr T kAtan[] = {-0.00179362716f, 0.0109146331f,  -0.0311779026f,
                       0.0579576567f,   -0.0840345472f, 0.109521873f,
                       -0.142642424f,   0.199985489f,   -0.333332986f};
template <>
constexpr double kAtan<double>[] = {
    -2.0258404332964542e-05, 0.0002230210017870163, -0.0011640657037916386, 0.003855958897341685,
    -0.009184530373453598,   0.016977998455149475,  -0.025826760786267066,  0.03406778480445268,
    -0.04092636780842918,    0.04673949000864856,   -0.05239232807318931,   0.05877307725104268,
    -0.0666586035530049,     0.0769221292964696,    -0.09090901235332983,   0.11111110678747181,
    -0.14285714271334835,    0.19999999999755022,   -0.3333333333333186};

template <class T>
struct Atan {
  Vec<T> value, derivative;
};
template <class T>
inline Atan<T> atan(Vec<T> x) {
  constexpr T kHalfPi = T(1.5707963267948966);
  // Beyond 1e30 the arctangent is pi/2; so infinity, too, has a reciprocal that is a number.
  const Vec<T> held = clamp(x, T(-1e30), T(1e30));
  const Vec<T> magnitude = held < T(0) ? -held : held;
  const auto steep = magnitude > T(1);
  const Vec<T> inverse = reciprocal(steep ? magnitude : broadcast<T>(1));
  const Vec<T> t = steep ? inverse : magnitude;
  const Vec<T> square = t * t;
  Vec<T> p = broadcast<T>(kAtan<T>[0]);
  for (int k = 1; k < length(kAtan<T>); ++k) p = p * square + kAtan<T>[k];
  const Vec<T> low = t * square * p + t;
  const Vec<T> value = steep ? kHalfPi - low : low;
  // 1 / (1 + x^2), whose denominator would overflow, as t^2 / (1 + t^2).
  const Vec<T> slope = reciprocal(square + T(1));
  return {held < T(0) ? -value : value, steep ? square * slope : slope};
}

// The first `count` lanes; the others are zero.
template <class T>
inline Vec<T> first_lanes(Vec<T> x, int count) {
  T lane[kLanes<T>];
  for (int j = 0; j < kLanes<T>; ++j) lane[j] = T(j);
  Vec<T> number;
  std::memcpy(&number, lane, sizeof(number));
  return number < T(count) ? x : Vec<T>{};
}

template <class T, int kBytes>
struct Lanes {
  using type __attribute__((vector_size(kBytes))) = T;
};

// The sum of `kBytes` of doubles, by halves.
template <int kBytes>
inline double add_lanes(typename Lanes<double, kBytes>::type x) {
  if constexpr (kBytes == 2 * sizeof(double)) {
    return x[0] + x[1];
  } else {
    typename Lanes<double, kBytes / 2>::type half[2];
    std::memcpy(half, &x, sizeof(x));
    return add_lanes<kBytes / 2>(half[0] + half[1]);
  }
}
inline VecF64 to_double(VecF64 x) { return x; }
inline VecF64 to_double(VecF32 x) {
  Lanes<float, kVectorBytes / 2>::type half[2];
  std::memcpy(half, &x, sizeof(x));
  return __builtin_convertvector(half[0], VecF64) + __builtin_convertvector(half[1], VecF64);
}

// A running sum with what rounding takes from it (Kahan): terms of either sign may leave a result
// far smaller than the sum was on the way.
template <class T>
class RunningSum {
 public:
  void add(Vec<T> x) {
    const Vec<T> next = sum_ + x;
    lost_ += (sum_ - next) + x;
    sum_ = next;
  }
  Vec<T> lanes() const { return sum_ + lost(); }
  double value() const { return add_lanes<kVectorBytes>(to_double(sum_) + to_double(lost())); }

 private:
  // Infinity has lost NaN.
  Vec<T> lost() const { return lost_ == lost_ ? lost_ : Vec<T>{}; }
  Vec<T> sum_{}, lost_{};
};

// An input that may be absent, which stands for zeros; reading it takes no branch either way.
template <class Storage>
struct OrZeros {
  static constexpr Storage kZeros[kVectorBytes / sizeof(Storage)] = {};
  const Storage* data;
  std::int64_t mask;
  explicit OrZeros(const Storage* given)
      : data(given ? given : kZeros), mask(given ? ~std::int64_t(0) : 0) {}
  const Storage* operator+(std::int64_t j) const { return data + (j & mask); }
  // A product with this input, zero where it is absent even if the other factor is NaN.
  template <class V>
  V product(V x) const {
    using T = typename Compute<Storage>::type;
    using Bits = typename Exp<T>::Bits;
    const Bits kept =
        Bits{} + static_cast<std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>>(mask);
    return bit_cast<V>(bit_cast<Bits>(x) & kept);
  }
};

// A place in the operands' index space that moves on in runs along the innermost dimension, with
// unit-stride pointers. Operands with another innermost stride are gathered to and scattered from
// a small buffer; absent ones stay null.
template <class Storage, class Operands>
class Walk {
 public:
  __attribute__((noinline)) void start(const Operands& operands, std::int64_t position) {
    const int inner = operands.dims - 1;
    for (std::int64_t& each : offset_) each = 0;
    for (std::int64_t d = inner, rest = position; d >= 0; --d) {
      index_[d] = rest % operands.size[d];
      rest /= operands.size[d];
      for (int k = 0; k < kOperands; ++k)
        if (operands.data[k] != nullptr) offset_[k] += index_[d] * operands.stride[k][d];
    }
    longest_ = operands.size[inner];
    for (int k = 0; k < kOperands; ++k) {
      gathered_[k] = operands.data[k] != nullptr && operands.stride[k][inner] != 1;
      if (gathered_[k] && longest_ > kRun) longest_ = kRun;
    }
  }

  // Points at the next run and returns its length, `limit` at most.
  __attribute__((noinline)) std::int64_t next(const Operands& operands, std::int64_t limit,
                                              Storage** pointers) {
    const int inner = operands.dims - 1;
    std::int64_t count = operands.size[inner] - index_[inner];
    if (count > longest_) count = longest_;
    if (count > limit) count = limit;
    for (int k = 0; k < kOperands; ++k) {
      Storage* from = static_cast<Storage*>(operands.data[k]);
      pointers[k] = gathered_[k] ? buffer_[k] : from == nullptr ? from : from + offset_[k];
      if (!gathered_[k] || k >= Operands::kInputs) continue;
      const std::int64_t stride = operands.stride[k][inner];
      from += offset_[k];
      if (stride == 0)
        for (std::int64_t j = 0; j < count; ++j) buffer_[k][j] = *from;
      else
        for (std::int64_t j = 0; j < count; ++j) buffer_[k][j] = from[j * stride];
    }
    return count;
  }

  // Writes out what the run has put in the buffer and moves past it.
  __attribute__((noinline)) void finish(const Operands& operands, std::int64_t count) {
    const int inner = operands.dims - 1;
    for (int k = Operands::kInputs; k < kOperands; ++k) {
      if (!gathered_[k]) continue;
      const std::int64_t stride = operands.stride[k][inner];
      Storage* to = static_cast<Storage*>(operands.data[k]) + offset_[k];
      for (std::int64_t j = 0; j < count; ++j) to[j * stride] = buffer_[k][j];
    }
    index_[inner] += count;
    for (int k = 0; k < kOperands; ++k)
      if (operands.data[k] != nullptr) offset_[k] += count * operands.stride[k][inner];
    for (int d = inner; d > 0 && index_[d] == operands.size[d]; --d) {
      index_[d] = 0;
      ++index_[d - 1];
      for (int k = 0; k < kOperands; ++k)
        if (operands.data[k] != nullptr)
          offset_[k] += operands.stride[k][d - 1] - operands.size[d] * operands.stride[k][d];
    }
  }

 private:
  static constexpr int kOperands = Operands::kOperands;
  static constexpr std::int64_t kRun = 256;
  Storage buffer_[kOperands][kRun];
  std::int64_t index_[kMaxDims];
  std::int64_t offset_[kOperands];
  std::int64_t longest_;
  bool gathered_[kOperands];
};

// Walks [begin, end) of the operands' index space and calls body(pointers, count) for each run.
template <class Storage, class Operands, class Body>
inline void for_each_run(const Operands& operands, std::int64_t begin, std::int64_t end,
                         Body body) {
  Walk<Storage, Operands> walk;
  walk.start(operands, begin);
  Storage* pointers[Operands::kOperands];
  for (std::int64_t position = begin; position < end;) {
    const std::int64_t count = walk.next(operands, end - position, pointers);
    body(pointers, count);
    walk.finish(operands, count);
    position += count;
  }
}

// Asks for what each operand holds kAhead bytes further on: the processor's own prefetchers follow
// few streams, and none beyond its page. Another operand takes an absent one's place. Nothing is
// read, so the place may be past the end.
template <class Storage, int kOperands>
class Streams {
 public:
  explicit Streams(Storage* const* p) {
    const Storage* present = p[0];
    for (int k = 0; k < kOperands; ++k) {
      const Storage* start = p[k] != nullptr ? p[k] : present;
      ahead_[k] = reinterpret_cast<std::uintptr_t>(start) + kAhead;
    }
  }
  void ask(std::int64_t j) const {
    const std::uintptr_t bytes = std::uintptr_t(j) * sizeof(Storage);
    for (const std::uintptr_t ahead : ahead_)
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + bytes));
  }

 private:
  static constexpr std::uintptr_t kAhead = 512;
  std::uintptr_t ahead_[kOperands];
};

// Calls tail(head(j), j) for each whole vector of `count` elements, then tail(head(j, n), j, n) for
// what is left over. In program order the next vector's head comes before this one's tail: an
// out-of-order core holds one of the two at a time, and so always finds independent work.
template <class T, class Operands, class Head, class Tail>
inline void for_each_vector(std::int64_t count, const Operands& operands, Head head, Tail tail) {
  std::int64_t j = 0;
  if (count >= kLanes<T>) {
    auto state = head(j);
    for (; j + 2 * kLanes<T> <= count; j += kLanes<T>) {
      operands.ask(j);
      auto next = head(j + kLanes<T>);
      tail(state, j);
      state = next;
    }
    tail(state, j);
    j += kLanes<T>;
  }
  if (j < count) tail(head(j, int(count - j)), j, int(count - j));
}

}  // namespace
}  // namespace geco::cpu
