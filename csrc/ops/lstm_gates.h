#pragma once

#include <optional>
#include <tuple>

#include "torch_compat.h"

namespace geco {

std::tuple<Tensor, Tensor> lstm_gates_op(const Tensor& gates, const Tensor& c, double forget_bias);

std::tuple<Tensor, Tensor> lstm_gates_backward_op(const Tensor& gates, const Tensor& c,
                                                  double forget_bias,
                                                  const std::optional<Tensor>& grad_h,
                                                  const std::optional<Tensor>& grad_c_next);

}  // namespace geco
