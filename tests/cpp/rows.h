// Operands of random strides in guarded memory, for kernels over Rows operands.
#pragma once

#include "strided.h"

namespace geco::test {

// Where a kernel's parameters keep their operands, the rows' sums and scalars. Those that it hasn't
// are null.
struct RowSlots {
  Slots first;
  std::int64_t *count, *step, *length;
  RowSums* sums;
  RowScalars* scalars;
};
template <int Inputs, int Outputs>
RowSlots row_slots(Rows<Inputs, Outputs>* rows, RowSums* sums, RowScalars* scalars) {
  return {slots(&rows->first), &rows->count, rows->step, &rows->length, sums, scalars};
}

// One element's results and its part of the row's sum, given its inputs and the row's scalar.
using RowFormula =
    std::function<void(const double* in, long double scalar, Exact* out, Exact* part)>;

// Like check_pointwise, for rows from one element to several blocks and units of them. The sums are
// divided by what `sums` says. With `without_scalars` they are null, which stands for zeros.
void check_rows(DType dtype, RowSlots slots, unsigned absent, bool without_scalars, double units,
                std::uint64_t seed,
                const std::function<void(std::int64_t begin, std::int64_t end)>& kernel,
                const RowFormula& formula);

}  // namespace geco::test
