#include "include/affine_coupling.h"

#include "rows.h"

namespace geco::test {
namespace {

using namespace affine_coupling;

constexpr ScaleMap kMaps[] = {ScaleMap::kExp, ScaleMap::kTanh, ScaleMap::kAtan, ScaleMap::kSigmoid};
constexpr double kClamp = 1.75;

struct Scale {
  long double s, slope, terms;
  Scale(ScaleMap map, long double a) {
    switch (map) {
      case ScaleMap::kExp:
        s = a;
        slope = 1;
        break;
      case ScaleMap::kTanh:
        s = kClamp * std::tanh(a);
        slope = kClamp / (std::cosh(a) * std::cosh(a));
        break;
      case ScaleMap::kAtan:
        s = kClamp * std::atan(a) / std::acos(0.0L);
        slope = kClamp / ((1 + a * a) * std::acos(0.0L));
        break;
      case ScaleMap::kSigmoid:
        s = -std::log1p(std::exp(-(a + 2)));
        slope = 1 / (1 + std::exp(a + 2));
        break;
    }
    // The map may round its argument.
    terms = std::fabs(s) + slope * (std::fabs(a) + 2);
  }
};

template <class Check>
void for_each_variant(const Check& check) {
  for (const DType dtype : kDTypes)
    for (const ScaleMap map : kMaps)
      for (const bool inverse : {false, true}) check(dtype, map, inverse);
}

void forward(const cpu::Level& level) {
  for_each_variant([&](DType dtype, ScaleMap map, bool inverse) {
    Forward params{.dtype = dtype, .map = map, .inverse = inverse, .clamp = kClamp};
    params.log_det.divisor = inverse ? -1 : 1;
    check_rows(
        dtype, row_slots(&params.rows, &params.log_det, nullptr), 0, false, 8, 1,
        [&](std::int64_t begin, std::int64_t end) {
          level.kernels->affine_coupling_forward(params, begin, end);
        },
        [&](const double* in, long double, Exact* out, Exact* part) {
          const Scale scale(map, in[kLogScale]);
          const long double x = in[kX], shift = in[kShift];
          const long double factor = std::exp(inverse ? -scale.s : scale.s);
          const long double product = (inverse ? x - shift : x) * factor;
          const long double terms = std::fabs(product) * (1 + scale.terms);
          out[0] =
              inverse ? Exact{product, terms} : Exact{product + shift, terms + std::fabs(shift)};
          *part = {scale.s, scale.terms};
        });
  });
}

void backward(const cpu::Level& level) {
  using B = Backward;
  constexpr unsigned kOfShift = 1u << kShift | 1u << B::kGradShift;
  struct Part {
    unsigned absent;
    bool without_log_det;
  };
  const Part parts[] = {{0, false},
                        {1u << B::kGradLogScale, true},
                        {1u << B::kGradX, true},
                        {1u << B::kGradY | 1u << B::kGradX | 1u << B::kGradShift, false}};
  for_each_variant([&](DType dtype, ScaleMap map, bool inverse) {
    for (const Part& part : parts) {
      B params{.dtype = dtype, .map = map, .inverse = inverse, .clamp = kClamp};
      check_rows(
          dtype, row_slots(&params.rows, nullptr, &params.grad_log_det),
          part.absent | (inverse ? 0 : kOfShift), part.without_log_det, 16, 2,
          [&](std::int64_t begin, std::int64_t end) {
            level.kernels->affine_coupling_backward(params, begin, end);
          },
          [&](const double* in, long double grad_log_det, Exact* out, Exact*) {
            const Scale scale(map, in[kLogScale]);
            const long double d_x = in[B::kGradY] * std::exp(inverse ? -scale.s : scale.s);
            const long double product = d_x * ((long double)(in[kX]) - in[kShift]);
            const long double d_s = (product + grad_log_det) * (inverse ? -1 : 1);
            const long double sensitivity = 1 + scale.terms;
            out[0] = {d_x, std::fabs(d_x) * sensitivity};
            // The slope's tails feel a rounding of the argument, too.
            out[1] = {d_s * scale.slope,
                      (std::fabs(product) * sensitivity + std::fabs(grad_log_det)) * scale.slope *
                          (3 + std::fabs(in[kLogScale]))};
            out[2] = {-d_x, std::fabs(d_x) * sensitivity};
          });
    }
  });
}

const Register tests[] = {{"affine_coupling_forward", forward},
                          {"affine_coupling_backward", backward}};

}  // namespace
}  // namespace geco::test
