#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "torch_compat.h"

namespace geco {

Tensor pncc_op(const Tensor& x, const Tensor& y, const std::vector<std::int64_t>& patch_size,
               const std::vector<std::int64_t>& stride, const Text& channels, double eps,
               const Text& reduction);

// A gradient that isn't wanted comes back as an empty tensor.
std::tuple<Tensor, Tensor> pncc_backward_op(const Tensor& x, const Tensor& y,
                                            const std::vector<std::int64_t>& patch_size,
                                            const std::vector<std::int64_t>& stride,
                                            const Text& channels, double eps, const Text& reduction,
                                            const Tensor& grad, bool wants_x, bool wants_y);

// A sum or mean and what its gradients are for a gradient of one, in the dtype of the arithmetic.
std::tuple<Tensor, Tensor, Tensor> pncc_with_gradients_op(
    const Tensor& x, const Tensor& y, const std::vector<std::int64_t>& patch_size,
    const std::vector<std::int64_t>& stride, const Text& channels, double eps,
    const Text& reduction, bool wants_x, bool wants_y);

Tensor lncc_op(const Tensor& x, const Tensor& y, std::int64_t kernel_size, double smooth_nr,
               double smooth_dr, const Text& reduction);

std::tuple<Tensor, Tensor> lncc_backward_op(const Tensor& x, const Tensor& y,
                                            std::int64_t kernel_size, double smooth_nr,
                                            double smooth_dr, const Text& reduction,
                                            const Tensor& grad, bool wants_x, bool wants_y);

std::tuple<Tensor, Tensor, Tensor> lncc_with_gradients_op(const Tensor& x, const Tensor& y,
                                                          std::int64_t kernel_size,
                                                          double smooth_nr, double smooth_dr,
                                                          const Text& reduction, bool wants_x,
                                                          bool wants_y);

}  // namespace geco
