#pragma once

#include <optional>
#include <tuple>

#include "torch_compat.h"

namespace geco {

// mapped [m, d], log_normaliser [n], log_mass [m].
std::tuple<Tensor, Tensor, Tensor> equilibrium_map_op(const Tensor& x, const Tensor& psi,
                                                      const Tensor& beta,
                                                      const std::optional<Tensor>& log_prior);

// Gradients to x, psi, beta, log_prior. Those whose bit of `wanted` is not set are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> equilibrium_map_backward_op(
    const Tensor& x, const Tensor& psi, const Tensor& beta, const std::optional<Tensor>& log_prior,
    const Tensor& mapped, const Tensor& log_normaliser, const Tensor& log_mass,
    const std::optional<Tensor>& grad_mapped, const std::optional<Tensor>& grad_log_normaliser,
    std::int64_t wanted);

}  // namespace geco
