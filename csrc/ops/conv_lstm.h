#pragma once

#include <optional>
#include <tuple>

#include "torch_compat.h"

namespace geco {

// The weight in Winograd's domain for images of this size, or `transposed`, its form for the
// gradients to the inputs. `split` channels belong to the first source; `blocks` is 4 for the gates
// of a ConvLSTM, 1 for a convolution.
Tensor winograd_weight_op(const Tensor& weight, std::int64_t split, std::int64_t blocks,
                          std::int64_t height, std::int64_t width, bool transposed);

// The gradient [out_channels, in_channels, kernel, kernel] from that to its transform.
Tensor winograd_weight_backward_op(const Tensor& grad, std::int64_t out_channels,
                                   std::int64_t in_channels, std::int64_t kernel,
                                   std::int64_t split, std::int64_t blocks, std::int64_t height,
                                   std::int64_t width);

Tensor winograd_conv2d_op(const Tensor& x, const Tensor& weight, const Tensor& transformed,
                          const std::optional<Tensor>& bias);

// h_next, c_next and, if they are to be kept, the pre-activations in channels-last.
std::tuple<Tensor, Tensor, Tensor> winograd_step_op(const std::optional<Tensor>& x, const Tensor& h,
                                                    const Tensor& c, const Tensor& weight,
                                                    const Tensor& transformed,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& x_projection,
                                                    double forget_bias, bool keep);

// Gradients to both sources, the transformed weight and the bias; those whose bit of `wanted` is
// not set are empty. That to the transformed weight is added to `total`, if it is given.
std::tuple<Tensor, Tensor, Tensor, Tensor> winograd_backward_op(
    const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& h,
    const Tensor& weight, const Tensor& transposed, std::int64_t blocks, std::int64_t wanted,
    const std::optional<Tensor>& total);

}  // namespace geco
