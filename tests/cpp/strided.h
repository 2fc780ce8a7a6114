// Operands of random strides in guarded memory, for kernels over Strided operands.
#pragma once

#include <array>

#include "harness.h"
#include "include/strided.h"

namespace geco::test {

struct Space {
  int dims;
  std::array<std::int64_t, kMaxDims> size;
  std::int64_t numel() const;
};
// One vector and less, tails, more than a gathered run, every rank.
inline const Space kSpaces[] = {
    {1, {1}},    {1, {7}},      {1, {16}},       {1, {67}},         {1, {523}},
    {2, {5, 3}}, {2, {3, 300}}, {3, {3, 5, 17}}, {4, {2, 3, 4, 9}}, {5, {2, 3, 2, 3, 5}}};

// One operand's memory and strides. An input may have strides of 0.
class Placed {
 public:
  Placed(const Space& space, DType dtype, bool input, Edge edge, Random& random);

  void* data() const { return memory_.data(); }
  std::int64_t stride(int d) const { return stride_[d]; }
  // The i-th element of the index space, its last dimension innermost.
  unsigned char* at(std::int64_t i) const;
  double get(std::int64_t i) const { return decode(dtype_, at(i)); }
  void fill_normal(double scale, Random& random);

  // Reports every byte that has changed since `remember`, less the elements given up to `forget`.
  void remember() { before_.assign(memory_.data(), memory_.data() + memory_.bytes()); }
  void forget(std::int64_t i);
  void expect_untouched() const;

 private:
  Space space_;
  DType dtype_;
  std::array<std::int64_t, kMaxDims> stride_{};
  Guarded memory_;
  std::vector<unsigned char> before_;
  static std::size_t choose(const Space& space, bool input, Random& random,
                            std::array<std::int64_t, kMaxDims>* stride);
};

inline Matrix matrix(const Placed& placed) {
  return {placed.data(), placed.stride(0), placed.stride(1)};
}

// Holds every element to roundings in the arithmetic of `dtype`. Nothing else may have been
// written.
void expect_all(DType dtype, Placed* got, const std::vector<Exact>& exact, double units,
                const char* what);

// Where a kernel's parameters keep their operands.
struct Slots {
  int inputs, operands;
  int* dims;
  std::int64_t* size;
  std::int64_t (*stride)[kMaxDims];
  void** data;
};
template <int Inputs, int Outputs>
Slots slots(Strided<Inputs, Outputs>* space) {
  return {Inputs, Inputs + Outputs, &space->dims, space->size, space->stride, space->data};
}

// One element's results, given its inputs.
using Formula = std::function<void(const double* in, Exact* out)>;

// Runs a kernel on parts of the index spaces above, with operands that it places in `slots`, and
// compares what it writes with a formula. Operands whose bit is set in `absent` are null. `units`
// is the rounding allowed (see expect_close).
void check_pointwise(DType dtype, Slots slots, unsigned absent, double units, std::uint64_t seed,
                     const std::function<void(std::int64_t begin, std::int64_t end)>& kernel,
                     const Formula& formula);

}  // namespace geco::test
