// The one header that includes torch, and only its stable ABI.
#pragma once

#ifdef GECO_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>

#ifdef GECO_CUDA
#include "cuda/kernels.h"
#else
#include "cpu/kernels.h"
#endif
#include "include/numeric.h"
#include "include/strided.h"

namespace geco {

// A string that an operator takes. On torch's own way to a std::string, as of 2.13, each call
// allocates one that nobody frees.
struct Text : std::string {
  using std::string::string;
};

}  // namespace geco

// Its older name, up to torch 2.11.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

template <>
struct torch::stable::detail::ToImpl<geco::Text> {
  static geco::Text call(StableIValue value, std::uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    std::size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    const geco::Text text(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

namespace geco {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
// Of a tensor of at most kMaxDims dimensions; what is beyond its rank is zero.
using Strides = std::array<std::int64_t, kMaxDims>;
using Order = std::array<int, kMaxDims>;

inline DType dtype_of(const Tensor& tensor) {
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

// Strides of a tensor as the reference's arithmetic sees it: widened from 16 bits it is dense.
Strides wide_strides_of(const Tensor& tensor);

// Uninitialised tensors on the device of `like`: of any form, and with its sizes and dtype.
Tensor empty(const Tensor& like, IntArrayRef sizes, IntArrayRef strides, ScalarType dtype);
Tensor empty_strided(const Tensor& like, const Strides& strides);
Tensor empty_vector(const Tensor& like, std::int64_t size, ScalarType dtype);

// The dtype that arithmetic on a tensor is done in.
inline ScalarType compute_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Matrix matrix(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

struct Operand {
  void* data;
  Strides strides;
};

inline Operand input(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), strides_of(tensor)};
}
inline Operand optional_input(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? input(*tensor) : Operand{nullptr, {}};
}
inline Operand output(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), strides_of(tensor)};
}
// A gradient to `tensor`, uninitialised; empty where none is wanted.
Tensor gradient_like(const Tensor& tensor, bool is_wanted, ScalarType dtype);
inline Tensor gradient_like(const Tensor& tensor, bool is_wanted) {
  return gradient_like(tensor, is_wanted, tensor.scalar_type());
}
// What a kernel gets for it. Strides of zero take no part in the choice of an order.
inline Operand wanted(const Tensor& gradient, bool is_wanted) {
  return is_wanted ? output(gradient) : Operand{nullptr, {}};
}
// PyTorch's own convolution of stride 1 that keeps the size of the image; and of a weight what
// gives the gradient to the image.
Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
Tensor weight_backwards(const Tensor& weight);
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

// The same for Rows: the first dimension is apart, the others are ordered by `order`.
void describe_rows(const Tensor& shape, const Order& order, const Operand* operands, int count,
                   int* dims, std::int64_t* size, std::int64_t (*stride)[kMaxDims], void** data);

template <class Rows>
void describe_rows(const Tensor& shape, const Order& order,
                   const Operand (&operands)[Rows::kOperands], Rows* rows) {
  auto& first = rows->first;
  describe_rows(shape, order, operands, Rows::kOperands, &first.dims, first.size, first.stride,
                first.data);
  rows->count = shape.size(0);
  rows->length = first.numel();
  for (int k = 0; k < Rows::kOperands; ++k) rows->step[k] = operands[k].strides[0];
}

// A gradient [B] in the dtype of the arithmetic on `like`, or nothing.
RowScalars row_scalars(const std::optional<Tensor>& grad, const Tensor& like);

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Scratch = std::unique_ptr<T, Free>;

// A thread's scratch memory, uninitialised, on a cache line of its own.
template <class T>
Scratch<T> scratch_of(std::int64_t count) {
  constexpr std::size_t kAlign = 64;
  const std::size_t bytes = (std::size_t(count) * sizeof(T) + kAlign) / kAlign * kAlign;
  T* const memory = static_cast<T*>(std::aligned_alloc(kAlign, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return Scratch<T>(memory);
}

// Runs a CPU kernel over the whole index space of its parameters on torch's threads, block by
// block: where a run begins decides which of its code computes an element, and that must not depend
// on how the space was shared out.
template <class Params, class Kernel>
void launch_cpu(const Params& params, Kernel kernel) {
  const std::int64_t count = params.operands.numel();
  torch::stable::parallel_for(
      0, (count + kBlock - 1) / kBlock, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t block = begin; block < end; ++block)
          kernel(params, block * kBlock, std::min(count, (block + 1) * kBlock));
      });
}

// The same for a kernel that works on blocks of rows.
template <class Params, class Kernel>
void launch_rows_cpu(const Params& params, Kernel kernel) {
  constexpr std::int64_t kGrain = 16384;
  const std::int64_t blocks = params.rows.blocks();
  const std::int64_t elements = std::clamp<std::int64_t>(params.rows.length, 1, kBlock);
  torch::stable::parallel_for(
      0, params.rows.count * blocks, (kGrain + elements - 1) / elements,
      [&](std::int64_t begin, std::int64_t end) { kernel(params, begin, end); });
}

#ifdef GECO_CUDA
// torch's own, in its library for CUDA, which is there where a tensor is.
extern "C" std::int32_t aoti_torch_get_current_cuda_stream(std::int32_t device, void** stream);

// Runs a CUDA kernel's launcher on a tensor's device and that device's current stream.
template <class Params, class Launcher>
void launch_cuda(const Params& params, Launcher launcher, const char* name, const Tensor& like) {
#ifdef GECO_EMULATION
  (void)name, (void)like;
  launcher(params, nullptr);
#else
  const std::int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  // This library has a runtime of its own, which hasn't heard of torch's choice.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    launcher(params, static_cast<cudaStream_t>(stream));
    error = cudaGetLastError();
  }
  STD_TORCH_CHECK(error == cudaSuccess, name,
                  ": the launch of its CUDA kernel failed: ", cudaGetErrorString(error));
#endif
}
#define GECO_LAUNCH(kernel, params, like) launch_cuda(params, kernel##_cuda, #kernel, like)
#define GECO_LAUNCH_ROWS GECO_LAUNCH
#define GECO_LAUNCH_ONCE GECO_LAUNCH
#else
#define GECO_LAUNCH(kernel, params, like) launch_cpu(params, cpu::active().kernels->kernel)
#define GECO_LAUNCH_ROWS(kernel, params, like) \
  launch_rows_cpu(params, cpu::active().kernels->kernel)
#define GECO_LAUNCH_ONCE(kernel, params, like) cpu::active().kernels->kernel(params)
#endif

void add_partial_sums(const double* partial, std::int64_t blocks, double divisor,
                      const Tensor& total);

// Sums over each row, divided by `divisor`, in the dtype of the arithmetic, by a kernel that
// `launch(params)` runs. Sums of blocks meet in their order, whatever thread each came from.
template <class Params, class Launch>
Tensor sum_rows(const Tensor& like, Params* params, RowSums Params::* sums, double divisor,
                Launch launch) {
  const std::int64_t rows = params->rows.count, blocks = params->rows.blocks();
  const Tensor total = empty_vector(like, rows, compute_dtype(like));
  if (rows == 0) return total;
  if (blocks == 1) {
    params->*sums = {total.mutable_data_ptr(), nullptr, divisor};
    launch(*params);
    return total;
  }
  const Tensor scratch = empty_vector(like, rows * blocks, ScalarType::Double);
  double* partial = static_cast<double*>(scratch.mutable_data_ptr());
  params->*sums = {nullptr, partial, divisor};
  launch(*params);
  add_partial_sums(partial, blocks, divisor, total);
  return total;
}

}  // namespace geco
