#pragma once

#include <optional>
#include <tuple>

#include "torch_compat.h"

namespace geco {

std::tuple<Tensor, Tensor> gaussian_latent_op(const Tensor& q_mean, const Tensor& q_log_std,
                                              const Tensor& p_mean, const Tensor& p_log_std,
                                              const Tensor& noise);

// The five gradients, in the inputs' order. Bit k of `needs` is set where the k-th is wanted; the
// others come back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_latent_backward_op(
    const Tensor& q_mean, const Tensor& q_log_std, const Tensor& p_mean, const Tensor& p_log_std,
    const Tensor& noise, const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_kl,
    std::int64_t needs);

}  // namespace geco
