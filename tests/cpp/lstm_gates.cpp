#include "include/lstm_gates.h"

#include "strided.h"

namespace geco::test {
namespace {

long double sigmoid(long double x) { return 1 / (1 + std::exp(-x)); }

struct Cell {
  long double i, f, g, o, c_next, terms;
  Cell(const double* in, double bias)
      : i(sigmoid(in[lstm_gates::kI])),
        f(sigmoid((long double)(in[lstm_gates::kF]) + bias)),
        g(std::tanh((long double)(in[lstm_gates::kG]))),
        o(sigmoid(in[lstm_gates::kO])),
        c_next(f * in[lstm_gates::kC] + i * g),
        // Sigmoid feels a rounding of its argument in proportion to the argument.
        terms((1 + std::fabs(in[lstm_gates::kF] + bias)) * std::fabs(f * in[lstm_gates::kC]) +
              (1 + std::fabs(in[lstm_gates::kI])) * std::fabs(i * g)) {}
};

void forward(const cpu::Level& level) {
  for (const DType dtype : kDTypes) {
    lstm_gates::Forward params{.dtype = dtype, .forget_bias = 0.75};
    check_pointwise(
        dtype, slots(&params.operands), 0, 8, 1,
        [&](std::int64_t begin, std::int64_t end) {
          level.kernels->lstm_gates_forward(params, begin, end);
        },
        [&](const double* in, Exact* out) {
          const Cell cell(in, params.forget_bias);
          const long double h = cell.o * std::tanh(cell.c_next);
          out[0] = {h, (1 + std::fabs(in[lstm_gates::kO])) * std::fabs(h) + cell.o * cell.terms};
          out[1] = {cell.c_next, cell.terms};
        });
  }
}

void backward(const cpu::Level& level) {
  using B = lstm_gates::Backward;
  for (const DType dtype : kDTypes)
    for (const unsigned absent : {0u, 1u << B::kGradH, 1u << B::kGradCNext}) {
      B params{.dtype = dtype, .forget_bias = -0.5};
      check_pointwise(
          dtype, slots(&params.operands), absent, 16, 2,
          [&](std::int64_t begin, std::int64_t end) {
            level.kernels->lstm_gates_backward(params, begin, end);
          },
          [&](const double* in, Exact* out) {
            const Cell cell(in, params.forget_bias);
            const long double t = std::tanh(cell.c_next), c = in[lstm_gates::kC];
            const long double d_h = in[B::kGradH], d_out = in[B::kGradCNext];
            const long double d = d_h * cell.o * (1 - t * t) + d_out;
            long double sum = 1;
            for (int k = 0; k < 5; ++k) sum += std::fabs(in[k]);
            const long double sensitivity = sum * (1 + cell.terms);
            // Past tanh's bound its derivative is zero, which is right beside one alone.
            const long double size = sensitivity * (std::fabs(d_h * cell.o) + std::fabs(d_out));
            out[0] = {d * cell.g * cell.i * (1 - cell.i), size * std::fabs(cell.i * cell.g)};
            out[1] = {d * c * cell.f * (1 - cell.f), size * std::fabs(c * cell.f)};
            out[2] = {d * cell.i * (1 - cell.g * cell.g), size * cell.i};
            out[3] = {d_h * t * cell.o * (1 - cell.o), sensitivity * std::fabs(d_h) * cell.o};
            out[4] = {d * cell.f, size * cell.f};
          });
    }
}

const Register tests[] = {{"lstm_gates_forward", forward}, {"lstm_gates_backward", backward}};

}  // namespace
}  // namespace geco::test
