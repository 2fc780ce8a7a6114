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
