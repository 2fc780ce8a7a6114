#include "ops/lstm_gates.h"

#include "include/lstm_gates.h"

namespace geco {

namespace {

using lstm_gates::Backward;
using lstm_gates::Forward;

void check(const Tensor& gates, const Tensor& c) {
  STD_TORCH_CHECK(gates.dim() >= 2 && gates.dim() <= 5 && gates.dim() == c.dim() &&
                      gates.size(1) == 4 * c.size(1),
                  "lstm_gates: gates must be [B, 4C, *S] and c [B, C, *S]");
  for (std::int64_t d = 0; d < c.dim(); ++d)
    STD_TORCH_CHECK(d == 1 || gates.size(d) == c.size(d),
                    "lstm_gates: gates and c differ in dimension ", d);
  STD_TORCH_CHECK(gates.scalar_type() == c.scalar_type(), "lstm_gates: dtypes differ");
}

Operand gradient(const std::optional<Tensor>& grad, const Tensor& c) {
  if (!grad.has_value()) return {nullptr, {}};
  STD_TORCH_CHECK(same_sizes(*grad, c) && grad->scalar_type() == c.scalar_type(),
                  "lstm_gates: a gradient must have the shape and dtype of c");
  return input(*grad);
}

}  // namespace

std::tuple<Tensor, Tensor> lstm_gates_op(const Tensor& gates, const Tensor& c, double forget_bias) {
  check(gates, c);
  // The reference's layouts: sigmoid(f) is dense in the order of gates; then come two products.
  const Strides gate_strides = strides_of(gates), c_strides = strides_of(c);
  const Strides activated = pointwise_strides(c, {&gate_strides});
  const Tensor c_next = empty_strided(c, pointwise_strides(c, {&activated, &c_strides}));
  const Strides c_next_strides = strides_of(c_next);
  const Tensor h = empty_strided(c, pointwise_strides(c, {&activated, &c_next_strides}));
  if (c.numel() == 0) return {h, c_next};

  const std::int64_t channels = c.size(1);
  const Operand operands[] = {block(gates, 0, channels),
                              block(gates, 1, channels),
                              block(gates, 2, channels),
                              block(gates, 3, channels),
                              input(c),
                              output(h),
                              output(c_next)};
  Forward params{.dtype = dtype_of(c), .forget_bias = forget_bias};
  describe(c, operands, &params.operands);
  GECO_LAUNCH(lstm_gates_forward, params, c);
  return {h, c_next};
}

std::tuple<Tensor, Tensor> lstm_gates_backward_op(const Tensor& gates, const Tensor& c,
                                                  double forget_bias,
                                                  const std::optional<Tensor>& grad_h,
                                                  const std::optional<Tensor>& grad_c_next) {
  check(gates, c);
  const Tensor grad_gates = gradient_like(gates, true);
  const Tensor grad_c = gradient_like(c, true);
  if (c.numel() == 0) return {grad_gates, grad_c};

  const std::int64_t channels = c.size(1);
  const Operand operands[] = {block(gates, 0, channels),
                              block(gates, 1, channels),
                              block(gates, 2, channels),
                              block(gates, 3, channels),
                              input(c),
                              gradient(grad_h, c),
                              gradient(grad_c_next, c),
                              block(grad_gates, 0, channels),
                              block(grad_gates, 1, channels),
                              block(grad_gates, 2, channels),
                              block(grad_gates, 3, channels),
                              output(grad_c)};
  Backward params{.dtype = dtype_of(c), .forget_bias = forget_bias};
  describe(c, operands, &params.operands);
  GECO_LAUNCH(lstm_gates_backward, params, c);
  return {grad_gates, grad_c};
}

}  // namespace geco
