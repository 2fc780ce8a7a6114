#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "torch_compat.h"

namespace geco {

// The penalty [] and its gradient to c_hat; ema, log_lambda and step are written in place.
std::tuple<Tensor, Tensor> geco_update_op(const Tensor& c_hat, const Tensor& ema,
                                          const Tensor& log_lambda, const Tensor& step,
                                          double alpha, double step_size, double lambda_min,
                                          double lambda_max,
                                          const std::optional<std::vector<double>>& max_log_step,
                                          std::int64_t warmup_steps, std::int64_t update_every,
                                          const std::optional<double>& speedup,
                                          const Text& parametrization, bool update);

}  // namespace geco
