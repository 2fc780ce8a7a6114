// Work on batch elements apart: each is a row of the index space, and has a sum or a factor of its
// own.
#pragma once

#include "cpu/simd.h"

namespace geco::cpu {
namespace {

// So few elements at a time that adding them one vector after another costs little accuracy.
template <class T>
constexpr std::int64_t kSpan = 64 * kLanes<T>;

// Calls body(row, block, visit) for the units of work [begin, end), where visit(span) calls
// span(pointers, count) for each piece of the block.
template <class Storage, class Rows, class Body>
inline void for_each_block(const Rows& rows, std::int64_t begin, std::int64_t end, Body body) {
  constexpr int kOperands = Rows::kOperands;
  using T = typename Compute<Storage>::type;
  auto operands = rows.first;
  bool plain = operands.dims == 1;
  for (int k = 0; k < kOperands; ++k)
    if (operands.data[k] != nullptr && operands.stride[k][0] != 1) plain = false;
  Walk<Storage, decltype(operands)> walk;

  const std::int64_t blocks = rows.blocks();
  std::int64_t row = begin / blocks, block = begin % blocks;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t from = block * kBlock;
    const std::int64_t to = rows.length < from + kBlock ? rows.length : from + kBlock;
    for (int k = 0; k < kOperands; ++k)
      if (operands.data[k] != nullptr)
        operands.data[k] = static_cast<Storage*>(rows.first.data[k]) + row * rows.step[k];

    const auto visit = [&](auto span) __attribute__((always_inline)) {
      Storage* pointers[kOperands];
      if (!plain && from < to) walk.start(operands, from);
      for (std::int64_t position = from; position < to;) {
        std::int64_t count = to - position < kSpan<T> ? to - position : kSpan<T>;
        if (plain)
          for (int k = 0; k < kOperands; ++k) {
            Storage* data = static_cast<Storage*>(operands.data[k]);
            pointers[k] = data == nullptr ? data : data + position;
          }
        else
          count = walk.next(operands, count, pointers);
        span(pointers, count);
        if (!plain) walk.finish(operands, count);
        position += count;
      }
    };
    body(row, block, visit);

    if (++block == blocks) {
      block = 0;
      ++row;
    }
  }
}

// The same for sums: span(pointers, count) returns its part.
template <class Storage, class Rows, class Span>
inline void sum_rows(const Rows& rows, const RowSums& sums, std::int64_t begin, std::int64_t end,
                     Span span) {
  using T = typename Compute<Storage>::type;
  for_each_block<Storage>(
      rows, begin, end,
      [&](std::int64_t row, std::int64_t block, auto visit) __attribute__((always_inline)) {
        CompensatedSum sum;
        visit([&](Storage* const* p, std::int64_t count)
                  __attribute__((always_inline)) { sum.add(span(p, count)); });
        const double total = sum.value();
        if (sums.partial != nullptr)
          sums.partial[row * rows.blocks() + block] = total;
        else
          static_cast<T*>(sums.total)[row] = T(total / sums.divisor);
      });
}

template <class T>
inline T row_scalar(const RowScalars& scalars, std::int64_t row) {
  return scalars.data == nullptr ? T(0) : static_cast<const T*>(scalars.data)[row * scalars.stride];
}

}  // namespace
}  // namespace geco::cpu
