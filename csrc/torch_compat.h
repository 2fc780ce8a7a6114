// The one header that includes torch, and only its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>

#include "include/numeric.h"
#include "include/strided.h"

namespace geco {

using torch::stable::Tensor;
// Of a tensor of at most kMaxDims dimensions; what is beyond its rank is zero.
using Strides = std::array<std::int64_t, kMaxDims>;
using Order = std::array<int, kMaxDims>;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "geco_fast takes float32, float64, bfloat16 and float16 tensors");
  }
}

inline Strides strides_of(const Tensor& tensor) {
  const auto given = tensor.strides();
  STD_TORCH_CHECK(given.size() <= kMaxDims, "at most ", kMaxDims, " dimensions, got ",
                  given.size());
  Strides strides{};
  std::copy(given.begin(), given.end(), strides.begin());
  return strides;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (std::int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// Dimensions from the outermost to the innermost, ordered as TensorIterator orders them: by the
// operands' strides, earlier operands first, broadcast dimensions left undecided.
Order memory_order(const Tensor& shape, std::initializer_list<const Strides*> operands);

// Dense strides for the sizes of `shape` in the order of the operands: the layout PyTorch gives to
// a pointwise result.
Strides pointwise_strides(const Tensor& shape, std::initializer_list<const Strides*> operands);

// An uninitialised tensor with the sizes, dtype and device of `like`.
Tensor empty_strided(const Tensor& like, const Strides& strides);

struct Operand {
  void* data;
  Strides strides;
};

inline Operand input(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), strides_of(tensor)};
}
inline Operand output(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), strides_of(tensor)};
}
// The k-th of a tensor's blocks of `channels` channels.
Operand block(const Tensor& tensor, std::int64_t k, std::int64_t channels);

// Fills an index space with the sizes of `shape`, ordered and merged for the operands: dimensions
// that every operand walks as one become one.
void describe(const Tensor& shape, const Operand* operands, int count, int* dims,
              std::int64_t* size, std::int64_t (*stride)[kMaxDims], void** data);

template <class Operands>
void describe(const Tensor& shape, const Operand (&operands)[Operands::kOperands],
              Operands* space) {
  describe(shape, operands, Operands::kOperands, &space->dims, space->size, space->stride,
           space->data);
}

// Runs a CPU kernel over the whole index space of its parameters on torch's threads.
template <class Params, class Kernel>
void launch_cpu(const Params& params, Kernel kernel) {
  constexpr std::int64_t kGrain = 4096;  // elements that pay for a thread's start
  torch::stable::parallel_for(
      0, params.operands.numel(), kGrain,
      [&](std::int64_t begin, std::int64_t end) { kernel(params, begin, end); });
}

}  // namespace geco
