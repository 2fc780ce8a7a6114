#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "torch_compat.h"

namespace geco {

// [B, out]. A bias without elements stands for none.
Tensor coupling_mlp_op(const Tensor& x, const std::optional<Tensor>& context_projection,
                       const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                       Text activation);

// The same, and what backward takes of the hidden layers (see include/coupling_mlp.h).
std::tuple<Tensor, Tensor> coupling_mlp_with_hidden_op(
    const Tensor& x, const std::optional<Tensor>& context_projection,
    const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, Text activation);

// Gradients to x, context_projection, all weights, all biases; those not wanted are empty.
std::vector<Tensor> coupling_mlp_backward_op(const Tensor& x, const std::vector<Tensor>& weights,
                                             Text activation, const Tensor& hidden,
                                             const Tensor& grad, const std::vector<bool>& wanted);

// A whole coupling layer, whose two parts are the features before and from the middle on: y,
// log_det and, if they are to be kept, what backward takes of the hidden layers, and log_scale with
// shift.
std::tuple<Tensor, Tensor, Tensor, Tensor> coupling_layer_op(
    const Tensor& x, const std::optional<Tensor>& context,
    const std::optional<Tensor>& context_weight, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases, Text activation, bool keeps_second, bool inverse,
    Text scale_map, double clamp, bool keep);

// Gradients to x, context, its weight, all weights, all biases; those not wanted are empty.
std::vector<Tensor> coupling_layer_backward_op(
    const Tensor& x, const std::optional<Tensor>& context,
    const std::optional<Tensor>& context_weight, const std::vector<Tensor>& weights,
    Text activation, bool keeps_second, bool inverse, Text scale_map, double clamp,
    const Tensor& hidden, const Tensor& raw, const std::optional<Tensor>& grad_y,
    const std::optional<Tensor>& grad_log_det, const std::vector<bool>& wanted);

}  // namespace geco
