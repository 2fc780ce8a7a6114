// Squared error on the CPU: memory is all there is to it. Forward reads both operands once, with
// enough sums side by side that no addition waits for the one before; backward reads them again
// and writes what is wanted.
#pragma once

#include "cpu/rows.h"
#include "include/squared_error.h"

namespace geco::cpu {
namespace {

template <class Storage>
inline double squared_error_span(Storage* const* p, std::int64_t count) {
  using T = typename Compute<Storage>::type;
  constexpr int kSums = 4;
  const Storage *x = p[squared_error::kX], *y = p[squared_error::kY];
  Vec<T> sum[kSums] = {};
  const auto add = [&](int k, std::int64_t j, auto... n) __attribute__((always_inline)) {
    const Vec<T> difference = load(x + j, n...) - load(y + j, n...);
    sum[k] += difference * difference;
  };
  const Streams<Storage, decltype(squared_error::Forward::rows)::kOperands> streams(p);
  std::int64_t j = 0;
  for (; j + kSums * kLanes<T> <= count; j += kSums * kLanes<T>)
    for (int k = 0; k < kSums; ++k) {
      streams.ask(j + k * kLanes<T>);
      add(k, j + k * kLanes<T>);
    }
  for (; j + kLanes<T> <= count; j += kLanes<T>) add(0, j);
  if (j < count) add(1, j, int(count - j));
  return add_lanes<kVectorBytes>(to_double((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

void squared_error_forward(const squared_error::Forward& params, std::int64_t begin,
                           std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    sum_rows<Storage>(params.rows, params.sums, begin, end, squared_error_span<Storage>);
  });
}

template <class Storage, class T>
inline void squared_error_backward_span(Storage* const* p, std::int64_t count, T factor) {
  using B = squared_error::Backward;
  Storage *d_x = p[B::kGradX], *d_y = p[B::kGradY];
  for_each_vector<T>(
      count, Streams<Storage, decltype(B::rows)::kOperands>(p),
      [&](std::int64_t j, auto... n) __attribute__((always_inline)) {
        return (load(p[squared_error::kX] + j, n...) - load(p[squared_error::kY] + j, n...)) *
               factor;
      },
      [&](Vec<T> gradient, std::int64_t j, auto... n) __attribute__((always_inline)) {
        if (d_x != nullptr) store(d_x + j, gradient, n...);
        if (d_y != nullptr) store(d_y + j, -gradient, n...);
      });
}

void squared_error_backward(const squared_error::Backward& params, std::int64_t begin,
                            std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    using T = typename Compute<Storage>::type;
    for_each_block<Storage>(
        params.rows, begin, end,
        [&](std::int64_t row, std::int64_t, auto visit) __attribute__((always_inline)) {
          const T factor = T(2 * double(row_scalar<T>(params.grad, row)) / params.divisor);
          visit([&](Storage* const* p, std::int64_t count) __attribute__((always_inline)) {
            squared_error_backward_span<Storage, T>(p, count, factor);
          });
        });
  });
}

}  // namespace
}  // namespace geco::cpu
