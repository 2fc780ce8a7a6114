#include "include/gaussian_latent.h"

#include "rows.h"

namespace geco::test {
namespace {

using namespace gaussian_latent;

struct Element {
  long double std, inverse_std, log_ratio, expm1, expm1_terms, distance;
  explicit Element(const double* in)
      : std(std::exp((long double)(in[kQLogStd]))),
        inverse_std(std::exp(-(long double)(in[kPLogStd]))),
        log_ratio((long double)(in[kQLogStd]) - in[kPLogStd]),
        expm1(std::expm1(2 * log_ratio)),
        // It feels a rounding of its argument in proportion to the argument.
        expm1_terms(std::fabs(expm1) + std::fabs(2 * log_ratio) * (expm1 + 1)),
        distance(((long double)(in[kQMean]) - in[kPMean]) * inverse_std) {}
};

void forward(const cpu::Level& level) {
  for (const DType dtype : kDTypes) {
    Forward params{.dtype = dtype};
    params.kl.divisor = 1;
    check_rows(
        dtype, row_slots(&params.rows, &params.kl, nullptr), 0, false, 8, 1,
        [&](std::int64_t begin, std::int64_t end) {
          level.kernels->gaussian_latent_forward(params, begin, end);
        },
        [](const double* in, long double, Exact* out, Exact* part) {
          const Element e(in);
          const long double product = e.std * in[kNoise];
          out[0] = {product + in[kQMean], std::fabs(product) + std::fabs(in[kQMean])};
          const long double square = e.distance * e.distance / 2;
          const long double excess = e.expm1 / 2 - e.log_ratio;
          // Near the prior expm1 and log_ratio cancel, which the kernel must not feel.
          *part = {square + excess, square + excess + std::fabs(e.expm1 * e.log_ratio)};
        });
  }
}

void backward(const cpu::Level& level) {
  using B = Backward;
  constexpr unsigned kOfPrior = 1u << B::kGradPMean | 1u << B::kGradPLogStd;
  constexpr unsigned kOfPosterior = 1u << B::kGradQMean | 1u << B::kGradQLogStd;
  struct Part {
    unsigned absent;
    bool without_kl;
  };
  const Part parts[] = {{0, false},
                        {1u << B::kGradZ | 1u << B::kGradNoise, false},
                        {kOfPosterior, false},
                        {kOfPrior | 1u << B::kGradNoise, false},
                        {kOfPrior, true},
                        {kOfPrior | 1u << B::kGradQMean, true}};
  for (const DType dtype : kDTypes)
    for (const Part& part : parts) {
      B params{.dtype = dtype};
      check_rows(
          dtype, row_slots(&params.rows, nullptr, &params.grad_kl), part.absent, part.without_kl,
          16, 2,
          [&](std::int64_t begin, std::int64_t end) {
            level.kernels->gaussian_latent_backward(params, begin, end);
          },
          [](const double* in, long double grad_kl, Exact* out, Exact*) {
            const Element e(in);
            const long double d_z = in[B::kGradZ];
            const long double d_mean = grad_kl * e.distance * e.inverse_std;
            const long double d_noise = d_z * e.std, d_std = d_noise * in[kNoise];
            const long double terms = std::fabs(grad_kl) * e.expm1_terms;
            const long double square = e.distance * e.distance;
            out[0] = {d_mean + d_z, std::fabs(d_mean) + std::fabs(d_z)};
            out[1] = {grad_kl * e.expm1 + d_std, terms + std::fabs(d_std)};
            out[2] = {-d_mean, std::fabs(d_mean)};
            out[3] = {-grad_kl * (square + e.expm1), terms + std::fabs(grad_kl) * square};
            out[4] = {d_noise, std::fabs(d_noise)};
          });
    }
}

const Register tests[] = {{"gaussian_latent_forward", forward},
                          {"gaussian_latent_backward", backward}};

}  // namespace
}  // namespace geco::test
