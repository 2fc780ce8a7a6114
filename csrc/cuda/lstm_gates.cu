// LSTM gates, forward and backward; the formulas are in include/lstm_gates.h. A thread owns a pack
// of the state, 16 bytes of it where the layout allows, and reads the four pre-activations that
// belong to it. Backward saves nothing: it computes the activations again. What has to move, in
// elements of the state: 5 read and 2 written forward, 7 read and 5 written backward.
#include "cuda/kernels.h"
#include "cuda/math.cuh"
#include "include/lstm_gates.h"

namespace geco {
namespace cuda {
namespace {

using lstm_gates::kC;
using lstm_gates::kF;
using lstm_gates::kG;
using lstm_gates::kI;
using lstm_gates::kO;

struct LstmGatesForward {
  double forget_bias;

  template <class Storage, int N, class Operands>
  __device__ __forceinline__ void operator()(const Here<Storage, N, Operands>& here) const {
    using T = ComputeOf<Storage>;
    using F = lstm_gates::Forward;
    const auto i = here.in(kI), f = here.in(kF), g = here.in(kG), o = here.in(kO), c = here.in(kC);
    Numbers<T, N> h, c_next;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      c_next.at[n] =
          sigmoid(f.at[n] + T(forget_bias)) * c.at[n] + sigmoid(i.at[n]) * tanh_of(g.at[n]);
      h.at[n] = sigmoid(o.at[n]) * tanh_of(c_next.at[n]);
    }
    here.out(F::kH, h);
    here.out(F::kCNext, c_next);
  }
};

struct LstmGatesBackward {
  double forget_bias;

  template <class Storage, int N, class Operands>
  __device__ __forceinline__ void operator()(const Here<Storage, N, Operands>& here) const {
    using T = ComputeOf<Storage>;
    using B = lstm_gates::Backward;
    auto i = here.in(kI), f = here.in(kF), g = here.in(kG), o = here.in(kO), c = here.in(kC);
    const auto grad_h = here.in_or_zeros(B::kGradH), grad_c = here.in_or_zeros(B::kGradCNext);
    const bool has_grad_h = here.has(B::kGradH);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T in_gate = sigmoid(i.at[n]), forget = sigmoid(f.at[n] + T(forget_bias));
      const T update = tanh_of(g.at[n]), out_gate = sigmoid(o.at[n]);
      const T t = tanh_of(forget * c.at[n] + in_gate * update);
      // Where no gradient comes, activations that aren't finite leave no trace.
      const T d_c =
          has_grad_h ? grad_c.at[n] + grad_h.at[n] * out_gate * (T(1) - t * t) : grad_c.at[n];
      o.at[n] = has_grad_h ? grad_h.at[n] * t * out_gate * (T(1) - out_gate) : T(0);
      i.at[n] = d_c * update * in_gate * (T(1) - in_gate);
      f.at[n] = d_c * c.at[n] * forget * (T(1) - forget);
      g.at[n] = d_c * in_gate * (T(1) - update * update);
      c.at[n] = d_c * forget;
    }
    here.out(B::kGradI, i);
    here.out(B::kGradF, f);
    here.out(B::kGradG, g);
    here.out(B::kGradO, o);
    here.out(B::kGradC, c);
  }
};

}  // namespace
}  // namespace cuda

void lstm_gates_forward_cuda(const lstm_gates::Forward& params, cudaStream_t stream) {
  cuda::for_each(params.dtype, params.operands, stream, cuda::LstmGatesForward{params.forget_bias});
}

void lstm_gates_backward_cuda(const lstm_gates::Backward& params, cudaStream_t stream) {
  cuda::for_each(params.dtype, params.operands, stream,
                 cuda::LstmGatesBackward{params.forget_bias});
}

}  // namespace geco
