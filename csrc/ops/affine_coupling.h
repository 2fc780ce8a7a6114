#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "include/affine_coupling.h"
#include "torch_compat.h"

namespace geco {

// The map of that name.
affine_coupling::ScaleMap scale_map_of(const Text& name);

std::tuple<Tensor, Tensor> affine_coupling_op(const Tensor& x, const Tensor& log_scale,
                                              const Tensor& shift, bool inverse, Text scale_map,
                                              double clamp);

// The gradients to x, log_scale and shift. Forward, shift is not read, may be absent, and gets no
// gradient here: that is grad_y itself. Those that aren't wanted come back empty, too.
std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward_op(
    const Tensor& x, const Tensor& log_scale, const std::optional<Tensor>& shift, bool inverse,
    Text scale_map, double clamp, const std::optional<Tensor>& grad_y,
    const std::optional<Tensor>& grad_log_det, bool needs_x, bool needs_log_scale,
    bool needs_shift);

}  // namespace geco
