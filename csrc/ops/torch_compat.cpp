#include "torch_compat.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace geco {

namespace {

// -1: `a` belongs inside `b`; 1: outside; 0: the operands don't say.
int compare(const Tensor& shape, std::initializer_list<const Strides*> operands, int a, int b) {
  for (const Strides* strides : operands) {
    const std::int64_t stride_a = (*strides)[a], stride_b = (*strides)[b];
    if (stride_a == 0 || stride_b == 0) continue;
    if (stride_a != stride_b) return stride_a < stride_b ? -1 : 1;
    if (shape.size(a) > shape.size(b)) return 1;
  }
  return 0;
}

// Describes the dimensions from `first` on, outermost first in the given order.
void merge(const Tensor& shape, int first, const Order& order, const Operand* operands, int count,
           int* dims, std::int64_t* size, std::int64_t (*stride)[kMaxDims], void** data) {
  for (int k = 0; k < count; ++k) data[k] = operands[k].data;
  *dims = 0;
  for (int position = 0; position < int(shape.dim()); ++position) {
    const int d = order[position];
    if (d < first || shape.size(d) == 1) continue;
    bool merges = *dims > 0;
    for (int k = 0; merges && k < count; ++k)
      merges = operands[k].data == nullptr ||
               stride[k][*dims - 1] == operands[k].strides[d] * shape.size(d);
    if (!merges) size[(*dims)++] = 1;
    size[*dims - 1] *= shape.size(d);
    for (int k = 0; k < count; ++k)
      if (operands[k].data != nullptr) stride[k][*dims - 1] = operands[k].strides[d];
  }
  if (*dims == 0) {
    size[(*dims)++] = 1;
    for (int k = 0; k < count; ++k) stride[k][0] = 1;
  }
}

}  // namespace

Order memory_order(const Tensor& shape, std::initializer_list<const Strides*> operands) {
  const int rank = int(shape.dim());
  Order inside_out{};
  for (int d = 0; d < rank; ++d) inside_out[d] = rank - 1 - d;
  for (int i = 1; i < rank; ++i) {
    int moving = i;
    for (int j = i - 1; j >= 0; --j) {
      const int order = compare(shape, operands, inside_out[j], inside_out[moving]);
      if (order < 0) break;
      if (order == 0) continue;
      std::swap(inside_out[j], inside_out[moving]);
      moving = j;
    }
  }
  std::reverse(inside_out.begin(), inside_out.begin() + rank);
  return inside_out;
}

Strides pointwise_strides(const Tensor& shape, std::initializer_list<const Strides*> operands) {
  const Order order = memory_order(shape, operands);
  Strides strides{};
  std::int64_t next = 1;
  for (int k = int(shape.dim()) - 1; k >= 0; --k) {
    strides[order[k]] = next;
    next *= std::max<std::int64_t>(shape.size(order[k]), 1);
  }
  return strides;
}

Strides wide_strides_of(const Tensor& tensor) {
  const Strides strides = strides_of(tensor);
  return tensor.element_size() == 2 ? pointwise_strides(tensor, {&strides}) : strides;
}

Tensor empty(const Tensor& like, IntArrayRef sizes, IntArrayRef strides, ScalarType dtype) {
  std::int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(std::int64_t(sizes.size()), sizes.data(), strides.data(),
                               std::int32_t(dtype), device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty_strided(const Tensor& like, const Strides& strides) {
  return empty(like, like.sizes(), {strides.data(), std::size_t(like.dim())}, like.scalar_type());
}

Tensor empty_vector(const Tensor& like, std::int64_t size, ScalarType dtype) {
  const std::int64_t stride = 1;
  return empty(like, {&size, 1}, {&stride, 1}, dtype);
}

Tensor gradient_like(const Tensor& tensor, bool is_wanted, ScalarType dtype) {
  if (!is_wanted) return empty_vector(tensor, 0, ScalarType::Float);
  const Strides given = strides_of(tensor), dense = pointwise_strides(tensor, {&given});
  return empty(tensor, tensor.sizes(), {dense.data(), std::size_t(tensor.dim())}, dtype);
}

Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  const std::vector<std::int64_t> one{1, 1}, padding{weight.size(2) / 2, weight.size(3) / 2};
  std::array<StableIValue, 7> stack{from(x),       from(weight), from(bias),           from(one),
                                    from(padding), from(one),    from(std::int64_t(1))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor weight_backwards(const Tensor& weight) {
  using torch::stable::detail::from;
  const std::vector<std::int64_t> spatial{2, 3};
  std::array<StableIValue, 2> stack{from(torch::stable::transpose(weight, 0, 1)), from(spatial)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::flip", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Operand block(const Tensor& tensor, std::int64_t k, std::int64_t channels) {
  Operand operand = input(tensor);
  const std::int64_t offset = k * channels * tensor.stride(1) * std::int64_t(tensor.element_size());
  operand.data = static_cast<char*>(operand.data) + offset;
  return operand;
}

void describe(const Tensor& shape, const Operand* operands, int count, int* dims,
              std::int64_t* size, std::int64_t (*stride)[kMaxDims], void** data) {
  // The last operand is an output, hence dense: its order is total.
  const Order order = memory_order(shape, {&operands[count - 1].strides});
  merge(shape, 0, order, operands, count, dims, size, stride, data);
}

void describe_rows(const Tensor& shape, const Order& order, const Operand* operands, int count,
                   int* dims, std::int64_t* size, std::int64_t (*stride)[kMaxDims], void** data) {
  merge(shape, 1, order, operands, count, dims, size, stride, data);
}

RowScalars row_scalars(const std::optional<Tensor>& grad, const Tensor& like) {
  if (!grad.has_value()) return {nullptr, 0};
  STD_TORCH_CHECK(grad->dim() == 1 && grad->size(0) == like.size(0) &&
                      grad->scalar_type() == compute_dtype(like),
                  "the gradient of a sum must be [B] in the dtype of the sum");
  return {grad->const_data_ptr(), grad->stride(0)};
}

void add_partial_sums(const double* partial, std::int64_t blocks, double divisor,
                      const Tensor& total) {
#ifdef GECO_CUDA
  const PartialSums params{partial,       blocks,          divisor,
                           total.size(0), dtype_of(total), total.mutable_data_ptr()};
  GECO_LAUNCH(add_partial_sums, params, total);
#else
  visit_storage(dtype_of(total), [&]<class Storage>(Storage*) {
    using T = typename Compute<Storage>::type;
    T* out = static_cast<T*>(total.mutable_data_ptr());
    for (std::int64_t row = 0; row < total.size(0); ++row) {
      CompensatedSum sum;
      for (std::int64_t block = 0; block < blocks; ++block) sum.add(partial[row * blocks + block]);
      out[row] = T(sum.value() / divisor);
    }
  });
#endif
}

}  // namespace geco
