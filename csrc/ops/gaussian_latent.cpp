#include "ops/gaussian_latent.h"

#include "include/gaussian_latent.h"

namespace geco {

namespace {

using gaussian_latent::Backward;
using gaussian_latent::Forward;

void check(const Tensor& q_mean, std::initializer_list<const Tensor*> others) {
  STD_TORCH_CHECK(q_mean.dim() >= 1 && q_mean.dim() <= kMaxDims,
                  "gaussian_latent: operands must be [B, ...]");
  for (const Tensor* other : others) {
    STD_TORCH_CHECK(same_sizes(q_mean, *other), "gaussian_latent: shapes differ");
    STD_TORCH_CHECK(q_mean.scalar_type() == other->scalar_type(), "gaussian_latent: dtypes differ");
  }
}

}  // namespace

std::tuple<Tensor, Tensor> gaussian_latent_op(const Tensor& q_mean, const Tensor& q_log_std,
                                              const Tensor& p_mean, const Tensor& p_log_std,
                                              const Tensor& noise) {
  check(q_mean, {&q_log_std, &p_mean, &p_log_std, &noise});
  // The reference's layouts: exp(q_log_std), its product with the noise, their sum with q_mean.
  const Strides mean = wide_strides_of(q_mean), log_std = wide_strides_of(q_log_std);
  const Strides noise_strides = wide_strides_of(noise);
  const Strides deviation = pointwise_strides(q_mean, {&log_std});
  const Strides product = pointwise_strides(q_mean, {&deviation, &noise_strides});
  const Tensor z = empty_strided(q_mean, pointwise_strides(q_mean, {&mean, &product}));
  const Operand operands[] = {input(q_mean),    input(q_log_std), input(p_mean),
                              input(p_log_std), input(noise),     output(z)};
  Forward params{.dtype = dtype_of(q_mean)};
  describe_rows(q_mean, memory_order(q_mean, {&operands[Forward::kZ].strides}), operands,
                &params.rows);
  const Tensor kl = sum_rows(q_mean, &params, &Forward::kl, 1, [&](const Forward& p) {
    GECO_LAUNCH_ROWS(gaussian_latent_forward, p, q_mean);
  });
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_latent_backward_op(
    const Tensor& q_mean, const Tensor& q_log_std, const Tensor& p_mean, const Tensor& p_log_std,
    const Tensor& noise, const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_kl,
    std::int64_t needs) {
  check(q_mean, {&q_log_std, &p_mean, &p_log_std, &noise});
  if (grad_z.has_value()) check(q_mean, {&*grad_z});
  const Tensor* inputs[] = {&q_mean, &q_log_std, &p_mean, &p_log_std, &noise};
  const auto gradient = [&](int k) { return gradient_like(*inputs[k], needs >> k & 1); };
  const Tensor grads[] = {gradient(0), gradient(1), gradient(2), gradient(3), gradient(4)};
  if (q_mean.numel() > 0) {
    const auto out = [&](int k) { return wanted(grads[k], needs >> k & 1); };
    const Operand operands[] = {input(q_mean), input(q_log_std),
                                input(p_mean), input(p_log_std),
                                input(noise),  optional_input(grad_z),
                                out(0),        out(1),
                                out(2),        out(3),
                                out(4)};
    Backward params{.dtype = dtype_of(q_mean), .grad_kl = row_scalars(grad_kl, q_mean)};
    describe_rows(
        q_mean,
        memory_order(q_mean, {&operands[6].strides, &operands[7].strides, &operands[8].strides,
                              &operands[9].strides, &operands[10].strides}),
        operands, &params.rows);
    GECO_LAUNCH_ROWS(gaussian_latent_backward, params, q_mean);
  }
  return {grads[0], grads[1], grads[2], grads[3], grads[4]};
}

}  // namespace geco
