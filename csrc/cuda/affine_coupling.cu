// Affine map of a coupling layer with its log determinant, forward and backward; the formulas are
// in include/affine_coupling.h. What has to move, in elements of an operand: 3 read and 1 written
// forward; backward x, log_scale and the gradient, the shift for the inverse, and 1 written for
// each wanted gradient. Backward computes the map again.
#include "cuda/kernels.h"
#include "cuda/math.cuh"
#include "cuda/rows.cuh"
#include "include/affine_coupling.h"

namespace geco {
namespace cuda {
namespace {

using affine_coupling::kLogScale;
using affine_coupling::kShift;
using affine_coupling::kX;
using affine_coupling::ScaleMap;

// s, its derivative, and exp(s), or exp(-s) for the inverse.
template <class T>
struct Scale {
  T s, slope, factor;
};

template <ScaleMap kMap, bool kInverse, class T>
__device__ __forceinline__ Scale<T> scale_of(T a, T clamp) {
  if constexpr (kMap == ScaleMap::kSigmoid) {
    // log sigmoid(x) = min(x, 0) - log(1 + exp(-|x|))
    const T x = a + T(2);
    const T e = exp_of(x < T(0) ? x : -x);
    const T near = T(1) / (T(1) + e), far = e * near;
    return {(x < T(0) ? x : T(0)) - log1p_of(e), x < T(0) ? near : far,
            kInverse ? T(1) + exp_of(-x) : (x < T(0) ? far : near)};
  } else {
    Scale<T> scale{a, T(1), T(0)};
    if constexpr (kMap == ScaleMap::kTanh) {
      const T t = tanh_of(a);
      scale = {clamp * t, clamp * (T(1) - t * t), T(0)};
    } else if constexpr (kMap == ScaleMap::kAtan) {
      const T factor = clamp * T(0.6366197723675814);  // 2 / pi
      scale = {factor * atan_of(a), factor / (T(1) + a * a), T(0)};
    }
    scale.factor = exp_of(kInverse ? -scale.s : scale.s);
    return scale;
  }
}

template <ScaleMap kMap, bool kInverse>
struct AffineCouplingForward {
  double clamp;

  template <class Storage, int N, class Operands>
  __device__ __forceinline__ auto operator()(const Here<Storage, N, Operands>& here) const {
    using T = ComputeOf<Storage>;
    const auto log_scale = here.in(kLogScale), shift = here.in(kShift);
    auto x = here.in(kX);
    T sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Scale<T> scale = scale_of<kMap, kInverse>(log_scale.at[n], T(clamp));
      x.at[n] =
          kInverse ? (x.at[n] - shift.at[n]) * scale.factor : x.at[n] * scale.factor + shift.at[n];
      sum += scale.s;
    }
    here.out(affine_coupling::Forward::kY, x);
    return sum;
  }
};

template <ScaleMap kMap, bool kInverse>
struct AffineCouplingBackward {
  double clamp;

  template <class Storage, int N, class Operands>
  __device__ __forceinline__ void operator()(const Here<Storage, N, Operands>& here,
                                             ComputeOf<Storage> grad_log_det) const {
    using T = ComputeOf<Storage>;
    using B = affine_coupling::Backward;
    auto log_scale = here.in(kLogScale);
    Numbers<T, N> d_s, slope, factor;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Scale<T> scale = scale_of<kMap, kInverse>(log_scale.at[n], T(clamp));
      slope.at[n] = scale.slope;
      factor.at[n] = scale.factor;
      d_s.at[n] = grad_log_det;
    }
    if (here.has(B::kGradY)) {
      auto d_x = here.in(B::kGradY), x = here.in(kX);
      if constexpr (kInverse) {
        const auto shift = here.in(kShift);
#pragma unroll
        for (int n = 0; n < N; ++n) x.at[n] -= shift.at[n];
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        d_x.at[n] *= factor.at[n];
        d_s.at[n] += d_x.at[n] * x.at[n];
        x.at[n] = -d_x.at[n];
      }
      if (here.has(B::kGradX)) here.out(B::kGradX, d_x);
      if (kInverse && here.has(B::kGradShift)) here.out(B::kGradShift, x);
    }
    if (here.has(B::kGradLogScale)) {
#pragma unroll
      for (int n = 0; n < N; ++n)
        log_scale.at[n] = (kInverse ? -d_s.at[n] : d_s.at[n]) * slope.at[n];
      here.out(B::kGradLogScale, log_scale);
    }
  }
};

// Calls visitor.operator()<map, inverse>().
template <class Visitor>
void visit_map(ScaleMap map, bool inverse, Visitor visitor) {
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

}  // namespace
}  // namespace cuda

void affine_coupling_forward_cuda(const affine_coupling::Forward& params, cudaStream_t stream) {
  cuda::visit_map(params.map, params.inverse, [&]<affine_coupling::ScaleMap kMap, bool kInverse>() {
    cuda::sum_rows(params.dtype, params.rows, params.log_det, stream,
                   cuda::AffineCouplingForward<kMap, kInverse>{params.clamp});
  });
}

void affine_coupling_backward_cuda(const affine_coupling::Backward& params, cudaStream_t stream) {
  cuda::visit_map(params.map, params.inverse, [&]<affine_coupling::ScaleMap kMap, bool kInverse>() {
    cuda::for_each_in_rows(params.dtype, params.rows, params.grad_log_det, stream,
                           cuda::AffineCouplingBackward<kMap, kInverse>{params.clamp});
  });
}

}  // namespace geco
