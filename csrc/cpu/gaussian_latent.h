// Gaussian sample and divergence on the CPU. Forward reads the five operands once, with three
// exponentials for each element: the product of two of them would give the third, but overflow
// where it doesn't and lose digits near the prior. Backward reads them again and keeps nothing.
#pragma once

#include "cpu/rows.h"
#include "include/gaussian_latent.h"

namespace geco::cpu {
namespace {

template <class Storage>
inline double gaussian_latent_span(Storage* const* p, std::int64_t count) {
  using namespace gaussian_latent;
  using T = typename Compute<Storage>::type;
  struct Head {
    Vec<T> z, twice_log_ratio, distance;
  };
  RunningSum<T> sum;
  for_each_vector<T>(
      count, Streams<Storage, decltype(Forward::rows)::kOperands>(p),
      [&](std::int64_t j, auto... n) __attribute__((always_inline)) {
        const Vec<T> q_mean = load(p[kQMean] + j, n...), q_log_std = load(p[kQLogStd] + j, n...);
        const Vec<T> p_mean = load(p[kPMean] + j, n...), p_log_std = load(p[kPLogStd] + j, n...);
        const Vec<T> log_ratio = q_log_std - p_log_std;
        return Head{exp<T, 1>(q_log_std) * load(p[kNoise] + j, n...) + q_mean,
                    log_ratio + log_ratio, (q_mean - p_mean) * exp<T, -1>(p_log_std)};
      },
      [&](const Head& h, std::int64_t j, auto... n) __attribute__((always_inline)) {
        store(p[Forward::kZ] + j, h.z, n...);
        // Lanes past the end are zero, and so is their divergence.
        sum.add(h.distance * h.distance * T(0.5) + half_exp_excess<T>(h.twice_log_ratio));
      });
  return sum.value();
}

void gaussian_latent_forward(const gaussian_latent::Forward& params, std::int64_t begin,
                             std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    sum_rows<Storage>(params.rows, params.kl, begin, end, gaussian_latent_span<Storage>);
  });
}

// A gradient that is absent is left out rather than taken as zero: zero times infinity is NaN.
template <class Storage, class T>
inline void gaussian_latent_backward_span(Storage* const* p, std::int64_t count, T grad_kl,
                                          bool with_kl) {
  using namespace gaussian_latent;
  using B = Backward;
  const bool with_z = p[B::kGradZ] != nullptr;
  struct Head {
    Vec<T> d_noise, d_z, distance, inverse_std, expm1;
  };
  for_each_vector<T>(
      count, Streams<Storage, decltype(B::rows)::kOperands>(p),
      [&](std::int64_t j, auto... n) __attribute__((always_inline)) {
        Head h{};
        const Vec<T> q_log_std = load(p[kQLogStd] + j, n...);
        if (with_z) {
          h.d_z = load(p[B::kGradZ] + j, n...);
          h.d_noise = exp<T, 1>(q_log_std) * h.d_z;
        }
        if (with_kl) {
          const Vec<T> p_log_std = load(p[kPLogStd] + j, n...);
          h.inverse_std = exp<T, -1>(p_log_std);
          h.distance = (load(p[kQMean] + j, n...) - load(p[kPMean] + j, n...)) * h.inverse_std;
          h.expm1 = expm1_twice<T>(q_log_std - p_log_std);
        }
        return h;
      },
      [&](const Head& h, std::int64_t j, auto... n) __attribute__((always_inline)) {
        const auto out = [&](int k, Vec<T> value) __attribute__((always_inline)) {
          if (p[k] != nullptr) store(p[k] + j, value, n...);
        };
        out(B::kGradNoise, h.d_noise);
        if (!with_kl) {
          out(B::kGradQMean, h.d_z);
          out(B::kGradQLogStd, h.d_noise * load(p[kNoise] + j, n...));
          return;
        }
        const Vec<T> d_mean = grad_kl * h.distance * h.inverse_std;
        out(B::kGradPMean, -d_mean);
        out(B::kGradPLogStd, -grad_kl * (h.distance * h.distance + h.expm1));
        out(B::kGradQMean, with_z ? d_mean + h.d_z : d_mean);
        Vec<T> d_log_std = grad_kl * h.expm1;
        if (with_z) d_log_std += h.d_noise * load(p[kNoise] + j, n...);
        out(B::kGradQLogStd, d_log_std);
      });
}

void gaussian_latent_backward(const gaussian_latent::Backward& params, std::int64_t begin,
                              std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    using T = typename Compute<Storage>::type;
    const bool with_kl = params.grad_kl.data != nullptr;
    for_each_block<Storage>(
        params.rows, begin, end,
        [&](std::int64_t row, std::int64_t, auto visit) __attribute__((always_inline)) {
          const T grad_kl = row_scalar<T>(params.grad_kl, row);
          visit([&](Storage* const* p, std::int64_t count) __attribute__((always_inline)) {
            gaussian_latent_backward_span<Storage, T>(p, count, grad_kl, with_kl);
          });
        });
  });
}

}  // namespace
}  // namespace geco::cpu
