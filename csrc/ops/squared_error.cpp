#include "ops/squared_error.h"

#include "include/squared_error.h"

namespace geco {

namespace {

using squared_error::Backward;
using squared_error::Forward;

void check(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= kMaxDims && same_sizes(x, y),
                  "squared_error: x and y must be [B, ...] of one shape");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "squared_error: dtypes differ");
}

// The mean over no element divides zero by zero.
double divisor_of(const Tensor& x, const Text& reduction) {
  if (reduction == "sum") return 1;
  STD_TORCH_CHECK(reduction == "mean", "squared_error: unknown reduction ", reduction);
  double divisor = 1;
  for (std::int64_t d = 1; d < x.dim(); ++d) divisor *= double(x.size(d));
  return divisor;
}

}  // namespace

Tensor squared_error_op(const Tensor& x, const Tensor& y, Text reduction) {
  check(x, y);
  const Operand operands[] = {input(x), input(y)};
  Forward params{.dtype = dtype_of(x)};
  describe_rows(x, memory_order(x, {&operands[0].strides, &operands[1].strides}), operands,
                &params.rows);
  return sum_rows(x, &params, &Forward::sums, divisor_of(x, reduction),
                  [&](const Forward& p) { GECO_LAUNCH_ROWS(squared_error_forward, p, x); });
}

std::tuple<Tensor, Tensor> squared_error_backward_op(const Tensor& x, const Tensor& y,
                                                     Text reduction, const Tensor& grad,
                                                     bool needs_x, bool needs_y) {
  check(x, y);
  const Tensor grad_x = gradient_like(x, needs_x), grad_y = gradient_like(y, needs_y);
  if (x.numel() == 0) return {grad_x, grad_y};
  const Operand operands[] = {input(x), input(y), wanted(grad_x, needs_x), wanted(grad_y, needs_y)};
  Backward params{
      .dtype = dtype_of(x), .grad = row_scalars(grad, x), .divisor = divisor_of(x, reduction)};
  describe_rows(x,
                memory_order(x, {&operands[2].strides, &operands[3].strides, &operands[0].strides,
                                 &operands[1].strides}),
                operands, &params.rows);
  GECO_LAUNCH_ROWS(squared_error_backward, params, x);
  return {grad_x, grad_y};
}

}  // namespace geco
