#pragma once

#include <string>
#include <tuple>

#include "torch_compat.h"

namespace geco {

Tensor squared_error_op(const Tensor& x, const Tensor& y, Text reduction);

// A gradient that isn't wanted comes back empty.
std::tuple<Tensor, Tensor> squared_error_backward_op(const Tensor& x, const Tensor& y,
                                                     Text reduction, const Tensor& grad,
                                                     bool needs_x, bool needs_y);

}  // namespace geco
