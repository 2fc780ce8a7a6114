#include "ops/affine_coupling.h"

#include "include/affine_coupling.h"

namespace geco {

namespace {

using affine_coupling::Backward;
using affine_coupling::Forward;
using affine_coupling::ScaleMap;

void check(const Tensor& x, std::initializer_list<const Tensor*> others) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= kMaxDims,
                  "affine_coupling: operands must be [B, ...]");
  for (const Tensor* other : others) {
    STD_TORCH_CHECK(same_sizes(x, *other), "affine_coupling: shapes differ");
    STD_TORCH_CHECK(x.scalar_type() == other->scalar_type(), "affine_coupling: dtypes differ");
  }
}

}  // namespace

ScaleMap scale_map_of(const Text& name) {
  if (name == "exp") return ScaleMap::kExp;
  if (name == "tanh") return ScaleMap::kTanh;
  if (name == "atan") return ScaleMap::kAtan;
  STD_TORCH_CHECK(name == "sigmoid", "affine_coupling: unknown scale_map ", name);
  return ScaleMap::kSigmoid;
}

std::tuple<Tensor, Tensor> affine_coupling_op(const Tensor& x, const Tensor& log_scale,
                                              const Tensor& shift, bool inverse, Text scale_map,
                                              double clamp) {
  check(x, {&log_scale, &shift});
  const Strides value = wide_strides_of(x), offset = wide_strides_of(shift);
  const Strides conditioner = wide_strides_of(log_scale);
  // The reference's layouts: exp(s) is dense in the order of log_scale, but contiguous where it
  // comes from PyTorch's logsigmoid; then come a product and a sum, or for the inverse a difference
  // and a product.
  const ScaleMap map = scale_map_of(scale_map);
  const Strides scale =
      map == ScaleMap::kSigmoid ? pointwise_strides(x, {}) : pointwise_strides(x, {&conditioner});
  const Strides inner = pointwise_strides(x, {&value, inverse ? &offset : &scale});
  const Tensor y = empty_strided(x, pointwise_strides(x, {&inner, inverse ? &scale : &offset}));
  const Operand operands[] = {input(x), input(log_scale), input(shift), output(y)};
  Forward params{.dtype = dtype_of(x), .map = map, .inverse = inverse, .clamp = clamp};
  describe_rows(x, memory_order(x, {&operands[Forward::kY].strides}), operands, &params.rows);
  const Tensor log_det =
      sum_rows(x, &params, &Forward::log_det, inverse ? -1 : 1,
               [&](const Forward& p) { GECO_LAUNCH_ROWS(affine_coupling_forward, p, x); });
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward_op(
    const Tensor& x, const Tensor& log_scale, const std::optional<Tensor>& shift, bool inverse,
    Text scale_map, double clamp, const std::optional<Tensor>& grad_y,
    const std::optional<Tensor>& grad_log_det, bool needs_x, bool needs_log_scale,
    bool needs_shift) {
  check(x, {&log_scale});
  if (grad_y.has_value()) check(x, {&*grad_y});
  STD_TORCH_CHECK(shift.has_value() == inverse,
                  "affine_coupling: backward takes shift for the inverse alone");
  if (inverse) check(x, {&*shift});
  STD_TORCH_CHECK(grad_y.has_value() || !(needs_x || needs_shift),
                  "affine_coupling: x and shift have no gradient without that of y");
  needs_shift = needs_shift && inverse;
  const Tensor grad_x = gradient_like(x, needs_x);
  const Tensor grad_log_scale = gradient_like(log_scale, needs_log_scale);
  const Tensor grad_shift = gradient_like(needs_shift ? *shift : x, needs_shift);
  if (x.numel() > 0) {
    const Operand operands[] = {input(x),
                                input(log_scale),
                                optional_input(shift),
                                optional_input(grad_y),
                                wanted(grad_x, needs_x),
                                wanted(grad_log_scale, needs_log_scale),
                                wanted(grad_shift, needs_shift)};
    Backward params{.dtype = dtype_of(x),
                    .map = scale_map_of(scale_map),
                    .inverse = inverse,
                    .clamp = clamp,
                    .grad_log_det = row_scalars(grad_log_det, x)};
    describe_rows(
        x, memory_order(x, {&operands[4].strides, &operands[5].strides, &operands[6].strides}),
        operands, &params.rows);
    GECO_LAUNCH_ROWS(affine_coupling_backward, params, x);
  }
  return {grad_x, grad_log_scale, grad_shift};
}

}  // namespace geco
