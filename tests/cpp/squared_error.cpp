#include "include/squared_error.h"

#include "rows.h"

namespace geco::test {
namespace {

void forward(const cpu::Level& level) {
  for (const DType dtype : kDTypes)
    for (const double divisor : {1.0, 67.0}) {
      squared_error::Forward params{.dtype = dtype};
      params.sums.divisor = divisor;
      check_rows(
          dtype, row_slots(&params.rows, &params.sums, nullptr), 0, false, 8, 1,
          [&](std::int64_t begin, std::int64_t end) {
            level.kernels->squared_error_forward(params, begin, end);
          },
          [](const double* in, long double, Exact*, Exact* part) {
            const long double difference =
                (long double)(in[squared_error::kX]) - in[squared_error::kY];
            *part = {difference * difference, difference * difference};
          });
    }
}

void backward(const cpu::Level& level) {
  using B = squared_error::Backward;
  for (const DType dtype : kDTypes)
    for (const unsigned absent : {0u, 1u << B::kGradX, 1u << B::kGradY}) {
      B params{.dtype = dtype, .divisor = 3};
      check_rows(
          dtype, row_slots(&params.rows, nullptr, &params.grad), absent, false, 4, 2,
          [&](std::int64_t begin, std::int64_t end) {
            level.kernels->squared_error_backward(params, begin, end);
          },
          [&](const double* in, long double grad, Exact* out, Exact*) {
            const long double difference =
                (long double)(in[squared_error::kX]) - in[squared_error::kY];
            const long double value = 2 * grad * difference / params.divisor;
            out[0] = {value, std::fabs(value)};
            out[1] = {-value, std::fabs(value)};
          });
    }
}

const Register tests[] = {{"squared_error_forward", forward}, {"squared_error_backward", backward}};

}  // namespace
}  // namespace geco::test
