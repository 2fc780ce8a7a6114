#include "ops/geco_update.h"

#include <cmath>
#include <limits>

#include "include/geco_update.h"

namespace geco {

namespace {

using geco_update::Params;
using geco_update::State;
using torch::headeronly::ScalarType;

// A tensor's elements as rows of equally spaced ones, in bytes.
struct Rows {
  const char* data;
  std::int64_t rows, row_step, count, step, width;

  explicit Rows(const Tensor& tensor)
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        rows(tensor.dim() > 1 ? tensor.size(0) : 1),
        row_step(tensor.dim() > 1 ? tensor.stride(0) : 0),
        count(tensor.dim() > 0 ? tensor.size(-1) : 1),
        step(tensor.dim() > 0 ? tensor.stride(-1) : 0),
        width(std::int64_t(tensor.element_size())) {
    row_step *= width;
    step *= width;
  }
  bool empty() const { return rows == 0 || count == 0; }
  const char* end() const { return data + (rows - 1) * row_step + (count - 1) * step + width; }

  bool holds(const char* element, std::int64_t size) const {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t offset = element - (data + r * row_step);
      if (offset <= -size || offset >= (count - 1) * step + width) continue;
      if (step == 0 || offset < 0) return true;
      const std::int64_t within = offset % step;
      if (within < width || (within + size > step && offset / step + 1 < count)) return true;
    }
    return false;
  }
};

void check_apart(const Tensor& written, const char* name, const Tensor& other,
                 const char* other_name) {
  const Rows a(written), b(other);
  if (a.empty() || b.empty() || a.end() <= b.data || b.end() <= a.data) return;
  for (std::int64_t l = 0; l < a.count; ++l)
    STD_TORCH_CHECK(!b.holds(a.data + l * a.step, a.width), "geco_update: ", name,
                    " is written in place and shares memory with ", other_name,
                    "; clone one of them");
}

void check(const Tensor& c_hat, const Tensor& ema, const Tensor& log_lambda, const Tensor& step) {
  STD_TORCH_CHECK(c_hat.dim() == 1 || c_hat.dim() == 2, "geco_update: c_hat must be [L] or [L, B]");
  for (const Tensor* state : {&ema, &log_lambda}) {
    STD_TORCH_CHECK(state->dim() == 1 && state->size(0) == c_hat.size(0),
                    "geco_update: ema and log_lambda must be [L]");
    STD_TORCH_CHECK(
        state->scalar_type() == ScalarType::Float || state->scalar_type() == ScalarType::Double,
        "geco_update: ema and log_lambda must be float32 or float64");
  }
  STD_TORCH_CHECK(step.dim() == 0 && step.scalar_type() == ScalarType::Long,
                  "geco_update: step must be int64 []");
}

void check_writable(const Tensor& c_hat, const Tensor& ema, const Tensor& log_lambda,
                    const Tensor& step) {
  for (const Tensor* state : {&ema, &log_lambda})
    STD_TORCH_CHECK(state->size(0) < 2 || state->stride(0) != 0,
                    "geco_update: ", state == &ema ? "ema" : "log_lambda",
                    " is written in place, and its elements share memory; clone it");
  check_apart(ema, "ema", log_lambda, "log_lambda");
  check_apart(ema, "ema", c_hat, "c_hat");
  check_apart(ema, "ema", step, "step");
  check_apart(log_lambda, "log_lambda", c_hat, "c_hat");
  check_apart(log_lambda, "log_lambda", step, "step");
  check_apart(step, "step", c_hat, "c_hat");
}

State state_of(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.dim() > 0 ? tensor.stride(0) : 0, dtype_of(tensor)};
}

}  // namespace

std::tuple<Tensor, Tensor> geco_update_op(const Tensor& c_hat, const Tensor& ema,
                                          const Tensor& log_lambda, const Tensor& step,
                                          double alpha, double step_size, double lambda_min,
                                          double lambda_max,
                                          const std::optional<std::vector<double>>& max_log_step,
                                          std::int64_t warmup_steps, std::int64_t update_every,
                                          const std::optional<double>& speedup,
                                          const Text& parametrization, bool update) {
  check(c_hat, ema, log_lambda, step);
  if (update) check_writable(c_hat, ema, log_lambda, step);
  STD_TORCH_CHECK(!max_log_step || max_log_step->size() == 2,
                  "geco_update: max_log_step must be (down, up)");
  STD_TORCH_CHECK(update_every > 0, "geco_update: update_every must be >= 1");

  const ScalarType types[] = {c_hat.scalar_type(), ema.scalar_type(), log_lambda.scalar_type()};
  const bool wide =
      std::find(std::begin(types), std::end(types), ScalarType::Double) != std::end(types);
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor penalty = empty(c_hat, {}, {}, dtype);
  // One value for each constraint, seen as often as there are values in the batch.
  const std::int64_t steps[] = {1, 0};
  const Tensor slope = empty(c_hat, c_hat.sizes(), {steps, std::size_t(c_hat.dim())}, dtype);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const bool batched = c_hat.dim() == 2;
  const Params params{
      .constraints = c_hat.size(0),
      .batch = batched ? c_hat.size(1) : 1,
      .dtype = dtype_of(c_hat),
      .c_hat = c_hat.const_data_ptr(),
      .constraint_stride = c_hat.stride(0),
      .batch_stride = batched ? c_hat.stride(1) : 1,
      .ema = state_of(ema),
      .log_lambda = state_of(log_lambda),
      .slope = state_of(slope),
      .penalty = state_of(penalty),
      .step = static_cast<std::int64_t*>(step.mutable_data_ptr()),
      .update = update,
      .alpha = alpha,
      .step_size = step_size,
      .low = std::log(lambda_min),
      .high = std::log(lambda_max),
      // One number for both came as a pair of it.
      .down = max_log_step ? -std::fabs((*max_log_step)[0]) : -kInfinity,
      .up = max_log_step ? (*max_log_step)[1] : kInfinity,
      .speedup = speedup.value_or(1.0),
      .warmup_steps = warmup_steps,
      .update_every = update_every,
      .softplus2 = parametrization == "softplus2",
  };
  GECO_LAUNCH_ONCE(geco_update_step, params, c_hat);
  return {penalty, slope};
}

}  // namespace geco
