#include "include/geco_update.h"

#include <algorithm>
#include <cstring>

#include "harness.h"

namespace geco::test {
namespace {

using geco_update::Params;
using geco_update::State;

// Equally spaced elements at an edge; what lies between them is NaN.
class Vector {
 public:
  Vector(std::int64_t count, std::int64_t stride, DType dtype, Edge edge)
      : dtype_(dtype),
        stride_(stride),
        memory_(count == 0 ? 0 : std::size_t((count - 1) * stride + 1) * size_of(dtype), edge) {}

  double get(std::int64_t i) const { return decode(dtype_, at(i)); }
  void set(std::int64_t i, double value) { encode(dtype_, value, at(i)); }
  State state() const { return {memory_.data(), stride_, dtype_}; }
  void expect_gaps_kept() const {
    for (std::size_t byte = 0; byte < memory_.bytes(); ++byte) {
      const bool own = byte / size_of(dtype_) % std::size_t(stride_) == 0;
      expect(own || memory_.data()[byte] == 0xff, "write to what isn't its own",
             [] { return std::string("what lies between the state's elements has changed"); });
    }
  }

 private:
  unsigned char* at(std::int64_t i) const {
    return memory_.data() + i * stride_ * std::int64_t(size_of(dtype_));
  }

  DType dtype_;
  std::int64_t stride_;
  Guarded memory_;
};

// All arithmetic is in float64 and rounded once, whatever the result's type.
void expect_rounded_once(DType dtype, double got, Exact exact, const char* what) {
  const double ratio = epsilon(DType::kFloat64) / epsilon(dtype);
  expect_close(dtype, got, exact, 16 * ratio, what);
}

Exact moved(const Params& p, long double log_lambda, Exact ema) {
  const auto within = [](long double x, long double low, long double high) {
    return std::fmin(std::fmax(x, low), high);
  };
  const long double rate = p.step_size * (ema.value <= 0 ? p.speedup : 1);
  long double ascent = rate * ema.value, terms = rate * ema.terms;
  if (p.softplus2) {
    const long double root = std::exp(log_lambda / 2), w = std::log(std::expm1(root));
    const long double slope = 1 / (1 + std::exp(-w)), next = w + ascent * 2 * root * slope;
    const long double softplus = std::log1p(std::exp(next));
    ascent = 2 * std::log(softplus) - log_lambda;
    // How far log_lambda moves with w.
    const long double relative = 2 / ((1 + std::exp(-next)) * softplus);
    terms = relative * (std::fabs(w) + root + 1 + terms * 2 * root * slope) + 1;
  }
  return {within(log_lambda + within(ascent, p.down, p.up), p.low, p.high),
          terms + std::fabs(log_lambda) + std::fabs(ascent)};
}

struct Batch {
  std::int64_t constraints, values;
};
// None, one vector and less, tails, pieces of a gathered row; 0 is NaN for its mean.
constexpr Batch kBatches[] = {{1, 1},  {3, 0},   {0, 5},   {2, 7},   {129, 11},
                              {5, 64}, {3, 257}, {2, 523}, {1, 4099}};

// One step on random state; `n` numbers the options.
void check_step(const cpu::Level& level, Batch size, DType dtype, int n, Edge edge,
                Random* random) {
  const DType wide[] = {DType::kFloat32, DType::kFloat64};
  const std::int64_t rows = size.constraints, columns = size.values;
  Vector ema(rows, 1 + random->below(3), wide[n & 1], edge);
  Vector log_lambda(rows, 1 + random->below(3), wide[n >> 1 & 1], edge);
  const DType result = n & 3 || dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Vector slope(rows, 1, result, edge), penalty(1, 1, result, edge);

  // Rows inside columns or the other way round; either may be at stride 0.
  const bool inside = random->one_in(3);
  std::int64_t batch_stride = inside ? rows + random->below(3) : 1 + random->one_in(3);
  std::int64_t row_stride = inside ? 1 : columns * batch_stride + random->below(3);
  if (random->one_in(6)) batch_stride = 0;
  if (random->one_in(6)) row_stride = 0;
  const bool empty = rows == 0 || columns == 0;
  const std::int64_t last = empty ? -1 : (rows - 1) * row_stride + (columns - 1) * batch_stride;
  const Guarded c_hat(std::size_t(last + 1) * size_of(dtype), edge);
  const auto element = [&](std::int64_t l, std::int64_t b) {
    return c_hat.data() + (l * row_stride + b * batch_stride) * std::int64_t(size_of(dtype));
  };
  for (std::int64_t l = 0; l < rows; ++l) {
    for (std::int64_t b = 0; b < columns; ++b) encode(dtype, random->normal(), element(l, b));
    ema.set(l, random->normal());
    log_lambda.set(l, random->normal());
  }
  const std::vector<unsigned char> before(c_hat.data(), c_hat.data() + c_hat.bytes());

  const Guarded counter(sizeof(std::int64_t), edge);
  const std::int64_t steps[] = {0, 1, 3, 4, std::int64_t(1) << 40};
  const std::int64_t step = steps[random->below(5)];
  std::memcpy(counter.data(), &step, sizeof(step));
  Params p{.constraints = rows,
           .batch = columns,
           .dtype = dtype,
           .c_hat = c_hat.data(),
           .constraint_stride = row_stride,
           .batch_stride = batch_stride,
           .ema = ema.state(),
           .log_lambda = log_lambda.state(),
           .slope = slope.state(),
           .penalty = penalty.state(),
           .step = reinterpret_cast<std::int64_t*>(counter.data()),
           .update = !random->one_in(4),
           .alpha = 0.75,
           .step_size = random->one_in(2) ? 0.01 : 1,
           .low = random->one_in(2) ? -14 : -0.5,
           .high = random->one_in(2) ? 14 : 0.25,
           .down = random->one_in(2) ? -HUGE_VAL : -0.125,
           .up = random->one_in(2) ? HUGE_VAL : 0.0625,
           .speedup = random->one_in(2) ? 1 : 10.0,
           .warmup_steps = random->one_in(2) ? 0 : 3,
           .update_every = 1 + random->below(2),
           .softplus2 = random->one_in(2)};
  std::vector<double> old_ema, old_log_lambda;
  for (std::int64_t l = 0; l < rows; ++l) {
    old_ema.push_back(ema.get(l));
    old_log_lambda.push_back(log_lambda.get(l));
  }
  level.kernels->geco_update_step(p);

  const bool due = step >= p.warmup_steps && step % p.update_every == 0;
  Exact sum{};
  for (std::int64_t l = 0; l < rows; ++l) {
    Exact mean{};
    for (std::int64_t b = 0; b < columns; ++b) {
      const long double c = decode(dtype, element(l, b));
      mean = {mean.value + c, mean.terms + std::fabs(c)};
    }
    // A vector's lanes add up their share one value after another: equal values drift.
    mean = {mean.value / columns, mean.terms / columns * (1 + columns / 32)};
    Exact next = mean;
    if (p.update && step > 0)
      next = {p.alpha * (long double)(old_ema[l]) + (1 - p.alpha) * mean.value,
              p.alpha * std::fabs(old_ema[l]) + (1 - p.alpha) * mean.terms};
    const long double lambda = std::exp((long double)(old_log_lambda[l]));
    sum = {sum.value + lambda * next.value, sum.terms + lambda * next.terms};
    if (columns > 0) expect_rounded_once(result, slope.get(l), {lambda / columns, lambda}, "slope");
    if (p.update) {
      expect_rounded_once(wide[n & 1], ema.get(l), next, "ema");
    } else {
      expect(ema.get(l) == old_ema[l], "ema", [] { return std::string("has changed"); });
    }
    if (p.update && due && columns > 0) {
      expect_rounded_once(wide[n >> 1 & 1], log_lambda.get(l), moved(p, old_log_lambda[l], next),
                          "log_lambda");
    } else if (!p.update || !due) {
      expect(log_lambda.get(l) == old_log_lambda[l], "log_lambda",
             [] { return std::string("has changed"); });
    }
  }
  expect_rounded_once(result, penalty.get(0), sum, "penalty");
  expect(*p.step == step + p.update, "step", [&] { return std::to_string(*p.step); });
  for (const Vector* vector : {&ema, &log_lambda, &slope, &penalty}) vector->expect_gaps_kept();
  expect(std::equal(before.begin(), before.end(), c_hat.data()), "c_hat",
         [] { return std::string("has changed"); });
}

void step(const cpu::Level& level) {
  Random random(1);
  for (const DType dtype : kDTypes)
    for (const Batch size : kBatches)
      for (const Edge edge : kEdges)
        for (int n = 0; n < 16; ++n) check_step(level, size, dtype, n, edge, &random);
}

const Register test("geco_update_step", step);

}  // namespace
}  // namespace geco::test
