#include "torch_compat.h"

#include <algorithm>
#include <utility>

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

Tensor empty_strided(const Tensor& like, const Strides& strides) {
  std::int32_t dtype, device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(like.dim(), like.sizes().data(),
                                                         strides.data(), dtype, device_type,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

Operand block(const Tensor& tensor, std::int64_t k, std::int64_t channels) {
  Operand operand = input(tensor);
  const std::int64_t offset = k * channels * tensor.stride(1) * std::int64_t(tensor.element_size());
  operand.data = static_cast<char*>(operand.data) + offset;
  return operand;
}

void describe(const Tensor& shape, const Operand* operands, int count, int* dims,
              std::int64_t* size, std::int64_t (*stride)[kMaxDims], void** data) {
  for (int k = 0; k < count; ++k) data[k] = operands[k].data;

  // The last operand is an output, hence dense: its order is total.
  *dims = 0;
  const Order order = memory_order(shape, {&operands[count - 1].strides});
  for (int position = 0; position < int(shape.dim()); ++position) {
    const int d = order[position];
    if (shape.size(d) == 1) continue;
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

}  // namespace geco
