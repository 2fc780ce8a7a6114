#include "rows.h"

#include <algorithm>

namespace geco::test {
namespace {

// The first dimension counts the rows.
const Space kSmall[] = {{2, {1, 1}},    {2, {5, 7}},      {2, {3, 67}},       {2, {1, 1101}},
                        {3, {4, 5, 3}}, {3, {2, 2, 300}}, {4, {3, 3, 5, 17}}, {5, {2, 3, 2, 3, 5}}};
// A whole block, two and three of them.
const Space kLarge[] = {
    {2, {2, kBlock}}, {2, {2, kBlock + 1}}, {3, {2, 3, 2777}}, {2, {1, 2 * kBlock + 13}}};

class RowCheck {
 public:
  RowCheck(DType dtype, RowSlots slots, unsigned absent, bool without_scalars, double units,
           std::uint64_t seed, const std::function<void(std::int64_t, std::int64_t)>& kernel,
           const RowFormula& formula)
      : dtype_(dtype),
        slots_(slots),
        absent_(absent),
        without_scalars_(without_scalars),
        units_(units),
        // Another for each dtype and choice of operands.
        random_(seed + 16 * unsigned(dtype) + 64 * absent),
        kernel_(kernel),
        formula_(formula),
        divisor_(slots.sums == nullptr ? 1 : slots.sums->divisor) {}

  void run(const Space& space, Edge edge, double scale, bool whole) {
    const Slots& first = slots_.first;
    std::vector<Placed> placed;
    *first.dims = space.dims - 1;
    std::copy(space.size.begin() + 1, space.size.end(), first.size);
    *slots_.count = space.size[0];
    const std::int64_t rows = space.size[0], length = space.numel() / rows;
    *slots_.length = length;
    for (int k = 0; k < first.operands; ++k) {
      Placed& operand = placed.emplace_back(space, dtype_, k < first.inputs, edge, random_);
      first.data[k] = is_absent(k) ? nullptr : operand.data();
      slots_.step[k] = operand.stride(0);
      for (int d = 1; d < space.dims; ++d) first.stride[k][d - 1] = operand.stride(d);
      if (k < first.inputs) operand.fill_normal(scale, random_);
      operand.remember();
    }

    const std::int64_t blocks = length > kBlock ? (length + kBlock - 1) / kBlock : 1;
    const DType arithmetic = compute_dtype(dtype_);
    const DType sum_dtype = blocks == 1 ? arithmetic : DType::kFloat64;
    const Guarded sums(std::size_t(rows * blocks) * size_of(sum_dtype), edge);
    if (slots_.sums != nullptr)
      *slots_.sums = {blocks == 1 ? sums.data() : nullptr,
                      blocks == 1 ? nullptr : reinterpret_cast<double*>(sums.data()), divisor_};
    const std::int64_t stride = random_.below(3);
    const Guarded scalars(std::size_t((rows - 1) * stride + 1) * size_of(arithmetic), edge);
    const auto scalar_at = [&](std::int64_t row) {
      return scalars.data() + row * stride * std::int64_t(size_of(arithmetic));
    };
    for (std::int64_t row = 0; row < rows; ++row)
      encode(arithmetic, random_.normal(), scalar_at(row));
    if (slots_.scalars != nullptr)
      *slots_.scalars = {without_scalars_ ? nullptr : scalars.data(), stride};

    const std::int64_t n = rows * blocks;
    const std::int64_t begin = whole ? 0 : random_.below(n);
    const std::int64_t end = whole ? n : begin + random_.below(n - begin + 1);
    const std::int64_t middle = (begin + end) / 2;
    kernel_(begin, middle);
    kernel_(middle, end);

    for (std::int64_t unit = 0; unit < n; ++unit) {
      const unsigned char* sum = sums.data() + unit * std::int64_t(size_of(sum_dtype));
      if (unit < begin || unit >= end) {
        expect(
            std::all_of(sum, sum + size_of(sum_dtype), [](unsigned char c) { return c == 0xff; }),
            "write to what isn't its own", [] { return std::string("another sum has changed"); });
        continue;
      }
      const std::int64_t row = unit / blocks, from = unit % blocks * kBlock;
      const double scalar = without_scalars_ ? 0 : decode(arithmetic, scalar_at(row));
      const Exact exact = check_unit(&placed, row * length + from,
                                     row * length + std::min(from + kBlock, length), scalar);
      if (slots_.sums == nullptr) continue;
      // The divisor applies to whole rows.
      const long double divisor = blocks == 1 ? divisor_ : 1;
      expect_close(arithmetic, decode(sum_dtype, sum),
                   {exact.value / divisor, exact.terms / std::fabs(divisor)}, units_, "sum");
    }
    for (const Placed& operand : placed) operand.expect_untouched();
  }

  Random& random() { return random_; }

 private:
  bool is_absent(int k) const { return absent_ >> k & 1; }

  // Checks the results of some elements and returns the sum of their parts.
  Exact check_unit(std::vector<Placed>* placed, std::int64_t begin, std::int64_t end,
                   double scalar) {
    const Slots& first = slots_.first;
    std::vector<double> in(first.inputs);
    std::vector<Exact> out(first.operands - first.inputs);
    Exact sum{};
    for (std::int64_t i = begin; i < end; ++i) {
      for (int k = 0; k < first.inputs; ++k) in[k] = is_absent(k) ? 0 : (*placed)[k].get(i);
      Exact part{};
      formula_(in.data(), scalar, out.data(), &part);
      sum = {sum.value + part.value, sum.terms + part.terms};
      for (int k = first.inputs; k < first.operands; ++k) {
        if (is_absent(k)) continue;
        expect_close(dtype_, (*placed)[k].get(i), out[k - first.inputs], units_, "result");
        (*placed)[k].forget(i);
      }
    }
    return sum;
  }

  DType dtype_;
  RowSlots slots_;
  unsigned absent_;
  bool without_scalars_;
  double units_;
  Random random_;
  const std::function<void(std::int64_t, std::int64_t)>& kernel_;
  const RowFormula& formula_;
  double divisor_;
};

}  // namespace

void check_rows(DType dtype, RowSlots slots, unsigned absent, bool without_scalars, double units,
                std::uint64_t seed, const std::function<void(std::int64_t, std::int64_t)>& kernel,
                const RowFormula& formula) {
  RowCheck check(dtype, slots, absent, without_scalars, units, seed, kernel, formula);
  for (const Edge edge : kEdges)
    for (const Space& space : kSmall) {
      check.run(space, edge, 1, true);
      check.run(space, edge, 2, false);
    }
  // One for each call: there are many calls.
  Random& random = check.random();
  const Space& large = kLarge[random.below(std::size(kLarge))];
  check.run(large, kEdges[random.below(2)], 1, random.one_in(2));
}

}  // namespace geco::test
