// LSTM gates on the CPU. One vector of the index space at a time: five loads (a sixth and a
// seventh in backward), all maths in registers, two stores (five in backward), so a step moves
// each operand once. Backward recomputes the activations from the saved inputs: to keep the
// four gates', forward would have to write three times as much.
#pragma once

#include "cpu/simd.h"
#include "include/lstm_gates.h"

namespace geco::cpu {
namespace {

// With sigmoid(x) = 1/s and tanh(x) = n/d, a product of the two is n * 1/(s d): one reciprocal for
// two functions. Either factor comes back by one multiplication.
template <class T>
struct Gates {
  Vec<T> o_gate, e_o, i, f, e_i, e_f, i_times_g, f_times_c, g_derivative, c_next;
};

template <class T>
inline Gates<T> lstm_gates_head(Vec<T> i, Vec<T> f, Vec<T> g, Vec<T> o, Vec<T> c) {
  constexpr T kPaired = kPairedSigmoidBound<T>;
  Gates<T> r;
  r.e_i = sigmoid_exp<T>(i, kPaired);
  r.e_f = sigmoid_exp<T>(f, kSigmoidBound<T>);
  const TanhParts<T> t_g = tanh_parts<T>(g);
  r.e_o = sigmoid_exp<T>(o, kPaired);
  r.o_gate = o;
  const Vec<T> s_i = T(1) + r.e_i;
  const Vec<T> inverse = reciprocal(s_i * t_g.denominator);
  const Vec<T> open_inverse = zero_below(i, -kPaired, inverse);
  r.i_times_g = open_inverse * t_g.numerator;
  r.i = open_inverse * t_g.denominator;
  r.g_derivative = t_g.derivative(inverse * s_i);
  r.f = zero_below(f, -kSigmoidBound<T>, reciprocal(T(1) + r.e_f));
  r.f_times_c = r.f * c;
  r.c_next = r.f * c + r.i_times_g;
  return r;
}

// The hidden state: o gate times tanh(c_next).
template <class T>
inline Vec<T> lstm_gates_hidden(const Gates<T>& r) {
  const TanhParts<T> t = tanh_parts<T>(r.c_next);
  const Vec<T> inverse = reciprocal((T(1) + r.e_o) * t.denominator);
  return zero_below(r.o_gate, -kPairedSigmoidBound<T>, inverse) * t.numerator;
}

template <class Storage>
void lstm_gates_forward_run(Storage* const* p, std::int64_t count, double forget_bias) {
  using T = typename Compute<Storage>::type;
  using F = lstm_gates::Forward;
  const T bias = T(forget_bias);
  const auto head = [&](std::int64_t j, auto... n) __attribute__((always_inline)) {
    const auto in = [&](int k) { return load(p[k] + j, n...); };
    return lstm_gates_head<T>(in(lstm_gates::kI), in(lstm_gates::kF) + bias, in(lstm_gates::kG),
                              in(lstm_gates::kO), in(lstm_gates::kC));
  };
  for_each_vector<T>(count, Streams<Storage, decltype(F::operands)::kOperands>(p), head,
                     [&](const Gates<T>& r, std::int64_t j, auto... n)
                         __attribute__((always_inline)) {
                           store(p[F::kCNext] + j, r.c_next, n...);
                           store(p[F::kH] + j, lstm_gates_hidden(r), n...);
                         });
}

template <class Storage>
void lstm_gates_backward_run(Storage* const* p, std::int64_t count, double forget_bias) {
  using T = typename Compute<Storage>::type;
  using B = lstm_gates::Backward;
  const T bias = T(forget_bias);
  const OrZeros<Storage> grad_h(p[B::kGradH]), grad_c_next(p[B::kGradCNext]);
  const auto head = [&](std::int64_t j, auto... n) __attribute__((always_inline)) {
    const auto in = [&](int k) { return load(p[k] + j, n...); };
    return lstm_gates_head<T>(in(lstm_gates::kI), in(lstm_gates::kF) + bias, in(lstm_gates::kG),
                              in(lstm_gates::kO), in(lstm_gates::kC));
  };
  for_each_vector<T>(
      count, Streams<Storage, decltype(B::operands)::kOperands>(p), head,
      [&](const Gates<T>& r, std::int64_t j, auto... n) __attribute__((always_inline)) {
        const Vec<T> d_h = load(grad_h + j, n...);
        const Vec<T> d_out = load(grad_c_next + j, n...);
        const TanhParts<T> t = tanh_parts<T>(r.c_next);
        const Vec<T> inverse = reciprocal((T(1) + r.e_o) * t.denominator);
        const Vec<T> open_inverse = zero_below(r.o_gate, -kPairedSigmoidBound<T>, inverse);
        const Vec<T> h = open_inverse * t.numerator;
        const Vec<T> o = open_inverse * t.denominator;
        const Vec<T> d_c_next =
            grad_h.product(d_h * o * t.derivative(inverse * (T(1) + r.e_o))) + d_out;
        store(p[B::kGradI] + j, d_c_next * r.i_times_g * (r.e_i * r.i), n...);
        store(p[B::kGradF] + j, d_c_next * r.f_times_c * (r.e_f * r.f), n...);
        store(p[B::kGradG] + j, d_c_next * r.i * r.g_derivative, n...);
        store(p[B::kGradO] + j, grad_h.product(d_h * h * (r.e_o * o)), n...);
        store(p[B::kGradC] + j, d_c_next * r.f, n...);
      });
}

void lstm_gates_forward(const lstm_gates::Forward& params, std::int64_t begin, std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    for_each_run<Storage>(params.operands, begin, end, [&](Storage* const* p, std::int64_t n) {
      lstm_gates_forward_run(p, n, params.forget_bias);
    });
  });
}

void lstm_gates_backward(const lstm_gates::Backward& params, std::int64_t begin, std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    for_each_run<Storage>(params.operands, begin, end, [&](Storage* const* p, std::int64_t n) {
      lstm_gates_backward_run(p, n, params.forget_bias);
    });
  });
}

}  // namespace
}  // namespace geco::cpu
