// Element types as they lie in memory, and the type their arithmetic is done in.
#pragma once

#include <cstdint>

namespace geco {

enum class DType : std::int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

template <class Storage>
struct Compute {
  using type = float;
};

template <>
struct Compute<double> {
  using type = double;
};

// A sum that keeps what each addition rounds off (Knuth's TwoSum): that of many numbers is as good
// as they are. Always inlined, so that no level's code serves another.
struct CompensatedSum {
  double sum = 0, lost = 0;

  __attribute__((always_inline)) void add(double x) {
    const double next = sum + x;
    const double share = next - sum;
    lost += (sum - (next - share)) + (x - share);
    sum = next;
  }
  // Past the range what is lost is not a number.
  __attribute__((always_inline)) double value() const {
    return lost - lost == 0 ? sum + lost : sum;
  }
};

// Calls `visitor` with a null pointer of the storage type: visitor(static_cast<Storage*>(nullptr)).
template <class Visitor>
void visit_storage(DType dtype, Visitor visitor) {
  switch (dtype) {
    case DType::kFloat32:
      return visitor(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return visitor(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return visitor(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return visitor(static_cast<Float16*>(nullptr));
  }
}

}  // namespace geco
