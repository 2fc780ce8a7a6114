// Affine coupling on the CPU. Forward reads three operands and writes one, with the map, its
// exponential and the sum of s in registers; the next vector's map is computed before this one's
// exponential. Backward reads x, log_scale and the gradient, and computes s again.
#pragma once

#include "cpu/rows.h"
#include "include/affine_coupling.h"

namespace geco::cpu {
namespace {

using affine_coupling::ScaleMap;

// `exp` is set where the map gives it along with s.
template <class T>
struct Scale {
  Vec<T> s, slope, exp;
};

template <class T, ScaleMap kMap, bool kInverse>
inline Scale<T> scale_map(Vec<T> a, T clamp) {
  if constexpr (kMap == ScaleMap::kExp) {
    return {a, broadcast<T>(1), Vec<T>{}};
  } else if constexpr (kMap == ScaleMap::kTanh) {
    const TanhParts<T> t = tanh_parts<T>(a);
    const Vec<T> inverse = reciprocal(t.denominator);
    return {t.numerator * inverse * clamp, t.derivative(inverse) * clamp, Vec<T>{}};
  } else if constexpr (kMap == ScaleMap::kAtan) {
    const T factor = clamp * T(0.6366197723675814);  // 2 / pi
    const Atan<T> t = atan<T>(a);
    return {t.value * factor, t.derivative * factor, Vec<T>{}};
  } else {
    // With e = exp(-|x|), log sigmoid(x) = min(x, 0) - log(1 + e). One reciprocal serves 1 / (1 +
    // e) and the logarithm's 1 / (2 + e).
    const Vec<T> x = a + T(2);
    const auto negative = x < T(0);
    const Vec<T> e = exp<T, -1>(negative ? -x : x);
    const Vec<T> one = e + T(1), two = e + T(2);
    const Vec<T> inverse = reciprocal(one * two);
    const Vec<T> near = inverse * two, far = e * near;
    const Vec<T> s = (negative ? x : Vec<T>{}) - twice_atanh<T>(e * (inverse * one));
    if constexpr (kInverse)
      return {s, negative ? near : far, T(1) + (negative ? T(1) / e : e)};
    else
      return {s, negative ? near : far, negative ? far : near};
  }
}

// exp(s), or exp(-s) for the inverse.
template <class T, ScaleMap kMap, bool kInverse>
inline Vec<T> exp_of(const Scale<T>& scale) {
  if constexpr (kMap == ScaleMap::kSigmoid)
    return scale.exp;
  else
    return exp<T, kInverse ? -1 : 1>(scale.s);
}

template <class Storage, ScaleMap kMap, bool kInverse>
inline double affine_coupling_span(Storage* const* p, std::int64_t count, double clamp) {
  using T = typename Compute<Storage>::type;
  RunningSum<T> sum;
  for_each_vector<T>(
      count, Streams<Storage, decltype(affine_coupling::Forward::rows)::kOperands>(p),
      [&](std::int64_t j, auto... n) __attribute__((always_inline)) {
        return scale_map<T, kMap, kInverse>(load(p[affine_coupling::kLogScale] + j, n...),
                                            T(clamp));
      },
      [&](const Scale<T>& scale, std::int64_t j, auto... n) __attribute__((always_inline)) {
        const Vec<T> factor = exp_of<T, kMap, kInverse>(scale);
        const Vec<T> x = load(p[affine_coupling::kX] + j, n...),
                     shift = load(p[affine_coupling::kShift] + j, n...);
        store(p[affine_coupling::Forward::kY] + j,
              kInverse ? (x - shift) * factor : x * factor + shift, n...);
        // Lanes past the end are zero, which the map "sigmoid" doesn't take to zero.
        if constexpr (kMap == ScaleMap::kSigmoid && sizeof...(n) > 0)
          sum.add(first_lanes<T>(scale.s, n...));
        else
          sum.add(scale.s);
      });
  return sum.value();
}

template <class Storage, ScaleMap kMap, bool kInverse, class T>
inline void affine_coupling_backward_span(Storage* const* p, std::int64_t count, double clamp,
                                          T grad_log_det) {
  using B = affine_coupling::Backward;
  for_each_vector<T>(
      count, Streams<Storage, decltype(B::rows)::kOperands>(p),
      [&](std::int64_t j, auto... n) __attribute__((always_inline)) {
        return scale_map<T, kMap, kInverse>(load(p[affine_coupling::kLogScale] + j, n...),
                                            T(clamp));
      },
      [&](const Scale<T>& scale, std::int64_t j, auto... n) __attribute__((always_inline)) {
        Vec<T> d_s = broadcast<T>(grad_log_det);
        if (p[B::kGradY] != nullptr) {
          const Vec<T> factor = exp_of<T, kMap, kInverse>(scale);
          const Vec<T> d_x = load(p[B::kGradY] + j, n...) * factor;
          Vec<T> x = load(p[affine_coupling::kX] + j, n...);
          if constexpr (kInverse) x -= load(p[affine_coupling::kShift] + j, n...);
          d_s += d_x * x;
          if (p[B::kGradX] != nullptr) store(p[B::kGradX] + j, d_x, n...);
          if constexpr (kInverse)
            if (p[B::kGradShift] != nullptr) store(p[B::kGradShift] + j, -d_x, n...);
        }
        if (p[B::kGradLogScale] != nullptr)
          store(p[B::kGradLogScale] + j, (kInverse ? -d_s : d_s) * scale.slope, n...);
      });
}

// Calls visitor.operator()<map, inverse>().
template <class Visitor>
inline void visit_map(ScaleMap map, bool inverse, Visitor visitor) {
  const auto direction = [&]<ScaleMap kMap>() {
    if (inverse)
      visitor.template operator()<kMap, true>();
    else
      visitor.template operator()<kMap, false>();
  };
  switch (map) {
    case ScaleMap::kExp:
      return direction.template operator()<ScaleMap::kExp>();
    case ScaleMap::kTanh:
      return direction.template operator()<ScaleMap::kTanh>();
    case ScaleMap::kAtan:
      return direction.template operator()<ScaleMap::kAtan>();
    case ScaleMap::kSigmoid:
      return direction.template operator()<ScaleMap::kSigmoid>();
  }
}

void affine_coupling_forward(const affine_coupling::Forward& params, std::int64_t begin,
                             std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    visit_map(params.map, params.inverse, [&]<ScaleMap kMap, bool kInverse>() {
      sum_rows<Storage>(params.rows, params.log_det, begin, end,
                        [&](Storage* const* p, std::int64_t count) __attribute__((always_inline)) {
                          return affine_coupling_span<Storage, kMap, kInverse>(p, count,
                                                                               params.clamp);
                        });
    });
  });
}

void affine_coupling_backward(const affine_coupling::Backward& params, std::int64_t begin,
                              std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    using T = typename Compute<Storage>::type;
    visit_map(params.map, params.inverse, [&]<ScaleMap kMap, bool kInverse>() {
      for_each_block<Storage>(
          params.rows, begin, end,
          [&](std::int64_t row, std::int64_t, auto visit) __attribute__((always_inline)) {
            const T grad_log_det = row_scalar<T>(params.grad_log_det, row);
            visit([&](Storage* const* p, std::int64_t count) __attribute__((always_inline)) {
              affine_coupling_backward_span<Storage, kMap, kInverse, T>(p, count, params.clamp,
                                                                        grad_log_det);
            });
          });
    });
  });
}

}  // namespace
}  // namespace geco::cpu
