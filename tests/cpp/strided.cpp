#include "strided.h"

#include <algorithm>
#include <cstring>

namespace geco::test {

std::int64_t Space::numel() const {
  std::int64_t n = 1;
  for (int d = 0; d < dims; ++d) n *= size[d];
  return n;
}

std::size_t Placed::choose(const Space& space, bool input, Random& random,
                           std::array<std::int64_t, kMaxDims>* stride) {
  std::array<int, kMaxDims> order{};
  for (int d = 0; d < space.dims; ++d) order[d] = space.dims - 1 - d;
  // Mostly in order: then unit-stride runs meet gathered ones.
  if (random.one_in(3))
    for (int d = space.dims - 1; d > 0; --d) std::swap(order[d], order[random.below(d + 1)]);
  std::int64_t next = random.one_in(3) ? 1 + random.below(3) : 1, last = 0;
  for (int k = 0; k < space.dims; ++k) {
    const int d = order[k];
    if (input && random.one_in(8)) continue;
    (*stride)[d] = next;
    last += next * (space.size[d] - 1);
    next *= space.size[d];
    if (random.one_in(3)) next += random.below(4);
  }
  return std::size_t(last) + 1;
}

Placed::Placed(const Space& space, DType dtype, bool input, Edge edge, Random& random)
    : space_(space),
      dtype_(dtype),
      memory_(choose(space, input, random, &stride_) * size_of(dtype), edge) {}

unsigned char* Placed::at(std::int64_t i) const {
  std::int64_t offset = 0;
  for (int d = space_.dims - 1; d >= 0; --d) {
    offset += i % space_.size[d] * stride_[d];
    i /= space_.size[d];
  }
  return memory_.data() + offset * std::int64_t(size_of(dtype_));
}

void Placed::fill_normal(double scale, Random& random) {
  for (std::int64_t i = 0; i < space_.numel(); ++i) encode(dtype_, scale * random.normal(), at(i));
}

void Placed::forget(std::int64_t i) {
  std::memcpy(before_.data() + (at(i) - memory_.data()), at(i), size_of(dtype_));
}

void Placed::expect_untouched() const {
  expect(std::equal(before_.begin(), before_.end(), memory_.data()), "write to what isn't its own",
         [] { return std::string("an operand's other elements have changed"); });
}

void expect_all(DType dtype, Placed* got, const std::vector<Exact>& exact, double units,
                const char* what) {
  for (std::size_t i = 0; i < exact.size(); ++i) {
    got->forget(std::int64_t(i));
    expect_close(dtype, got->get(std::int64_t(i)), exact[i], units, what);
  }
  got->expect_untouched();
}

void check_pointwise(DType dtype, Slots slots, unsigned absent, double units, std::uint64_t seed,
                     const std::function<void(std::int64_t, std::int64_t)>& kernel,
                     const Formula& formula) {
  Random random(seed);
  std::vector<double> in(slots.inputs);
  std::vector<Exact> out(slots.operands - slots.inputs);
  for (const Space& space : kSpaces)
    for (const Edge edge : kEdges)
      for (int repeat = 0; repeat < 3; ++repeat) {
        std::vector<Placed> placed;
        *slots.dims = space.dims;
        std::copy(space.size.begin(), space.size.end(), slots.size);
        for (int k = 0; k < slots.operands; ++k) {
          Placed& operand = placed.emplace_back(space, dtype, k < slots.inputs, edge, random);
          slots.data[k] = absent >> k & 1 ? nullptr : operand.data();
          for (int d = 0; d < space.dims; ++d) slots.stride[k][d] = operand.stride(d);
          if (k < slots.inputs) operand.fill_normal(repeat == 2 ? 8 : 1, random);
          operand.remember();
        }

        const std::int64_t n = space.numel();
        const std::int64_t begin = repeat == 0 ? 0 : random.below(n);
        const std::int64_t end = repeat == 0 ? n : begin + random.below(n - begin + 1);
        const std::int64_t middle = (begin + end) / 2;
        kernel(begin, middle);
        kernel(middle, end);

        for (std::int64_t i = begin; i < end; ++i) {
          for (int k = 0; k < slots.inputs; ++k) in[k] = absent >> k & 1 ? 0 : placed[k].get(i);
          formula(in.data(), out.data());
          for (int k = slots.inputs; k < slots.operands; ++k) {
            if (absent >> k & 1) continue;
            expect_close(dtype, placed[k].get(i), out[k - slots.inputs], units, "result");
            placed[k].forget(i);
          }
        }
        for (const Placed& operand : placed) operand.expect_untouched();
      }
}

}  // namespace geco::test
