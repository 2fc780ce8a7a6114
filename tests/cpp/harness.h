// What the kernels' tests share: guarded memory, elements in plain arithmetic, random numbers, and
// a list of tests that main() runs at every instruction-set level. Element types are chosen at run
// time, which keeps the build short.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "include/numeric.h"

namespace geco::test {

// A test gets the level to run at; `only`, if given, names the one level it was compiled for.
using Test = void (*)(const cpu::Level& level);
struct Register {
  Register(const char* name, Test test, const char* only = nullptr);
};

// Counts a check and reports it if it failed; `detail` is called only then.
void count_check();
void report(const char* what, const std::string& detail);
template <class Detail>
void expect(bool holds, const char* what, const Detail& detail) {
  count_check();
  if (!holds) report(what, detail());
}

std::string number(double x);

// SplitMix64: the same numbers with every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits();
  std::int64_t below(std::int64_t bound) { return std::int64_t(bits() % std::uint64_t(bound)); }
  bool one_in(std::int64_t chances) { return below(chances) == 0; }
  double normal();

 private:
  std::uint64_t state_;
};

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
std::size_t size_of(DType dtype);
// The distance from one to the next number, of a type and of the arithmetic behind it.
double epsilon(DType dtype);
double compute_epsilon(DType dtype);
// The type of that arithmetic, in which sums of rows are kept.
DType compute_dtype(DType dtype);

// One element to and from double, independently of simd.h. encode rounds to nearest even.
double decode(DType dtype, const void* element);
void encode(DType dtype, double value, void* element);

// Which edge of the memory lies at a page that can't be touched.
enum class Edge { kEnd, kBegin };
constexpr Edge kEdges[] = {Edge::kEnd, Edge::kBegin};

// So many bytes of memory, all 0xff, which is NaN in every type. A read or write one byte past the
// given edge ends the program; writes past the other one are found by the destructor.
class Guarded {
 public:
  Guarded(std::size_t bytes, Edge edge);
  Guarded(Guarded&& other) noexcept;
  ~Guarded();
  unsigned char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  unsigned char *pages_, *data_;
  std::size_t bytes_, usable_;
};

// What a result should be, and the size of the terms it is made of: results that cancel are only as
// good as their terms.
struct Exact {
  long double value, terms;
};

// Holds an element to `units` roundings of its terms in the arithmetic, and the rounding to memory.
// NaN and infinity must be where they are in the exact result.
void expect_close(DType dtype, double got, Exact exact, double units, const char* what);

}  // namespace geco::test
