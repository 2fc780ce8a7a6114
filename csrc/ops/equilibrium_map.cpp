#include "ops/equilibrium_map.h"

#include <cmath>
#include <limits>
#include <vector>

#include "include/equilibrium_map.h"

namespace geco {

namespace {

#ifdef GECO_CUDA
using equilibrium_map::kVectorsOfBlock;
using Backward = equilibrium_map::BackwardOnDevice;
using Forward = equilibrium_map::ForwardOnDevice;
using Operands = equilibrium_map::OnDevice;
#else
using equilibrium_map::Backward;
using equilibrium_map::Forward;
using equilibrium_map::kPad;
using equilibrium_map::make_plan;
using equilibrium_map::Operands;
#endif
using equilibrium_map::Vector;

enum Wanted { kX = 1, kPsi = 2, kBeta = 4, kLogPrior = 8 };

void check(const Tensor& x, const Tensor& psi, const Tensor& beta,
           const std::optional<Tensor>& log_prior) {
  STD_TORCH_CHECK(x.dim() == 2 && psi.dim() == 2 && x.size(1) == psi.size(1),
                  "equilibrium_map: x must be [n, d] and psi [m, d]");
  STD_TORCH_CHECK(x.scalar_type() == psi.scalar_type(), "equilibrium_map: dtypes differ");
  STD_TORCH_CHECK(beta.dim() == 0, "equilibrium_map: beta must be a scalar");
  STD_TORCH_CHECK(
      !log_prior.has_value() || (log_prior->dim() == 1 && log_prior->size(0) == psi.size(0) &&
                                 log_prior->scalar_type() == x.scalar_type()),
      "equilibrium_map: log_prior must be [m], of the dtype of x");
}

Vector vector(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0)};
}
Vector vector(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? vector(*tensor) : Vector{nullptr, 0};
}

#ifdef GECO_CUDA
std::int64_t blocks_of_vectors(const Operands& p) {
  return (p.m + kVectorsOfBlock - 1) / kVectorsOfBlock;
}

// Cuts the data so that blocks keep a GPU busy and their sums stay small.
void share_out(Operands* p) {
  constexpr std::int64_t kBusy = 512, kFewestRows = 256, kRows = 32;
  constexpr std::int64_t kMemory = std::int64_t(1) << 26;
  const auto parts = [](std::int64_t all, std::int64_t each) { return (all + each - 1) / each; };
  const std::int64_t blocks = std::max<std::int64_t>(1, blocks_of_vectors(*p));
  const std::int64_t sums = 8 * std::max<std::int64_t>(1, p->m) * std::max<std::int64_t>(1, p->d);
  const std::int64_t most = std::min(parts(kBusy, blocks), parts(p->n, kFewestRows));
  const std::int64_t wanted = std::max<std::int64_t>(1, std::min(most, kMemory / sums));
  p->split_rows = std::max<std::int64_t>(1, parts(parts(p->n, wanted), kRows)) * kRows;
  p->splits = std::max<std::int64_t>(1, parts(p->n, p->split_rows));
}

// Scratch memory, if it is wanted.
double* scratch(const Tensor& like, bool is_wanted, std::int64_t size, std::vector<Tensor>* held) {
  if (!is_wanted) return nullptr;
  held->push_back(empty_vector(like, size, ScalarType::Double));
  return static_cast<double*>(held->back().mutable_data_ptr());
}

// Without data or vectors there is nothing to launch, and no gradient.
bool fill_without_pairs(const Operands& p, std::initializer_list<Tensor> zeros,
                        std::initializer_list<Tensor> minus_infinities) {
  if (p.n > 0 && p.m > 0) return false;
  for (Tensor tensor : zeros) torch::stable::zero_(tensor);
  for (Tensor tensor : minus_infinities)
    torch::stable::fill_(tensor, -std::numeric_limits<double>::infinity());
  return true;
}
#else
// Calls visitor(pointer to the scalar's value, in the type torch has for its dtype).
template <class Visitor>
void visit_scalar(const Tensor& scalar, Visitor visitor) {
  const void* data = scalar.const_data_ptr();
  switch (dtype_of(scalar)) {
    case DType::kFloat32:
      return visitor(static_cast<const float*>(data));
    case DType::kFloat64:
      return visitor(static_cast<const double*>(data));
    case DType::kBFloat16:
      return visitor(static_cast<const torch::headeronly::BFloat16*>(data));
    case DType::kFloat16:
      return visitor(static_cast<const torch::headeronly::Half*>(data));
  }
}

double value_of(const Tensor& scalar) {
  double value = 0;
  visit_scalar(scalar, [&](const auto* data) { value = double(*data); });
  return value;
}

void set_value(const Tensor& scalar, double value) {
  visit_scalar(scalar, [&]<class Value>(const Value* data) {
    if constexpr (sizeof(Value) == 2)
      *const_cast<Value*>(data) = Value(float(value));
    else
      *const_cast<Value*>(data) = Value(value);
  });
}
#endif

void describe(const Tensor& x, const Tensor& psi, const Tensor& beta,
              const std::optional<Tensor>& log_prior, const Tensor& mapped,
              const Tensor& log_normaliser, const Tensor& log_mass, bool backward, Operands* to) {
  to->dtype = dtype_of(x);
  to->n = x.size(0);
  to->m = psi.size(0);
  to->d = x.size(1);
  to->x = matrix(x);
  to->psi = matrix(psi);
  to->log_prior = vector(log_prior);
  to->mapped = matrix(mapped);
#ifdef GECO_CUDA
  (void)backward;
  to->uniform = -std::log(double(to->m));
  to->beta = beta.const_data_ptr();
  to->beta_dtype = dtype_of(beta);
  to->log_normaliser = const_cast<void*>(log_normaliser.const_data_ptr());
  to->log_mass = const_cast<void*>(log_mass.const_data_ptr());
  share_out(to);
#else
  to->beta = value_of(beta);
  to->log_normaliser = vector(log_normaliser);
  to->log_mass = vector(log_mass);
  const std::int64_t element_size = compute_dtype(x) == ScalarType::Double ? 8 : 4;
  to->plan = make_plan(to->n, to->m, to->d, element_size, backward);
#endif
}

#ifndef GECO_CUDA
// Packs the vectors, works on the slots, joins them.
template <class Params>
void launch(Params& params, void (*pack)(const Params&, std::int64_t, std::int64_t),
            void (*work)(const Params&, std::int64_t, std::int64_t),
            void (*finish)(const Params&, std::int64_t, std::int64_t), const Tensor& like) {
  const Tensor scratch = empty_vector(like, params.plan.bytes, ScalarType::Byte);
  params.scratch = static_cast<char*>(scratch.mutable_data_ptr());
  const auto run = [&](auto kernel, std::int64_t count, std::int64_t grain) {
    torch::stable::parallel_for(
        0, count, grain, [&](std::int64_t begin, std::int64_t end) { kernel(params, begin, end); });
  };
  const std::int64_t groups = params.plan.padded / kPad;
  const std::int64_t grain = 1 + 4096 / (kPad * std::max<std::int64_t>(1, params.d));
  run(pack, groups, grain);
  run(work, params.plan.slots, 1);
  run(finish, groups, grain);
}
#endif

}  // namespace

std::tuple<Tensor, Tensor, Tensor> equilibrium_map_op(const Tensor& x, const Tensor& psi,
                                                      const Tensor& beta,
                                                      const std::optional<Tensor>& log_prior) {
  check(x, psi, beta, log_prior);
  const ScalarType dtype = compute_dtype(x);
  // Laid out as PyTorch's zeros_like(psi).
  const Tensor like = torch::stable::empty_like(psi);
  const Tensor mapped =
      dtype == psi.scalar_type() ? like : empty(psi, like.sizes(), like.strides(), dtype);
  const Tensor log_normaliser = empty_vector(x, x.size(0), dtype);
  const Tensor log_mass = empty_vector(psi, psi.size(0), dtype);
  Forward params{};
  describe(x, psi, beta, log_prior, mapped, log_normaliser, log_mass, false, &params);
#ifdef GECO_CUDA
  if (fill_without_pairs(params, {mapped}, {log_normaliser, log_mass}))
    return {mapped, log_normaliser, log_mass};
  std::vector<Tensor> held;
  params.bounds = scratch(x, true, params.splits * params.m, &held);
  params.masses = scratch(x, true, params.splits * params.m, &held);
  params.means = scratch(x, true, params.splits * params.m * params.d, &held);
  GECO_LAUNCH(equilibrium_map_forward, params, x);
#else
  const cpu::Kernels& kernels = *cpu::active().kernels;
  launch<Forward>(params, kernels.equilibrium_map_forward_pack, kernels.equilibrium_map_forward,
                  kernels.equilibrium_map_forward_finish, x);
#endif
  return {mapped, log_normaliser, log_mass};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> equilibrium_map_backward_op(
    const Tensor& x, const Tensor& psi, const Tensor& beta, const std::optional<Tensor>& log_prior,
    const Tensor& mapped, const Tensor& log_normaliser, const Tensor& log_mass,
    const std::optional<Tensor>& grad_mapped, const std::optional<Tensor>& grad_log_normaliser,
    std::int64_t wanted) {
  check(x, psi, beta, log_prior);
  const ScalarType dtype = compute_dtype(x);
  const auto matches = [&](const Tensor& tensor, const Tensor& shape, std::int64_t rank) {
    bool same = tensor.dim() == rank && tensor.scalar_type() == dtype;
    for (std::int64_t k = 0; same && k < rank; ++k) same = tensor.size(k) == shape.size(k);
    return same;
  };
  STD_TORCH_CHECK(
      matches(mapped, psi, 2) && matches(log_normaliser, x, 1) && matches(log_mass, psi, 1),
      "equilibrium_map: results must have the shapes and dtypes of forward's");
  STD_TORCH_CHECK((!grad_mapped.has_value() || matches(*grad_mapped, psi, 2)) &&
                      (!grad_log_normaliser.has_value() || matches(*grad_log_normaliser, x, 1)),
                  "equilibrium_map: a gradient must have the shape and dtype of its result");
  const bool wants_prior = (wanted & kLogPrior) != 0 && log_prior.has_value();
  const Tensor none = empty_vector(x, 0, x.scalar_type());
  const Tensor grad_x = wanted & kX ? gradient_like(x, true) : none;
  const Tensor grad_psi = wanted & kPsi ? gradient_like(psi, true) : none;
  const Tensor grad_beta = wanted & kBeta ? gradient_like(beta, true) : none;
  const Tensor grad_log_prior = wants_prior ? gradient_like(*log_prior, true) : none;

  Backward params{};
  describe(x, psi, beta, log_prior, mapped, log_normaliser, log_mass, true, &params);
  if (grad_mapped.has_value()) params.grad_mapped = matrix(*grad_mapped);
  params.grad_log_normaliser = vector(grad_log_normaliser);
  if (wanted & kX) params.grad_x = matrix(grad_x);
  if (wanted & kPsi) params.grad_psi = matrix(grad_psi);
  if (wants_prior) params.grad_log_prior = vector(grad_log_prior);
#ifdef GECO_CUDA
  if (fill_without_pairs(params, {grad_x, grad_psi, grad_beta, grad_log_prior}, {}))
    return {grad_x, grad_psi, grad_beta, grad_log_prior};
  if (wanted & kBeta) params.grad_beta = grad_beta.mutable_data_ptr();
  const Tensor rest = empty_vector(x, params.n, dtype);
  const bool adds_up = wanted & kX && params.m > kVectorsOfBlock;
  const Tensor sums = empty_vector(x, adds_up ? params.n * params.d : 0, dtype);
  params.rest = rest.mutable_data_ptr();
  params.sums = adds_up ? sums.mutable_data_ptr() : nullptr;
  std::vector<Tensor> held;
  const std::int64_t all = params.splits * params.m;
  params.psi_sums = scratch(x, wanted & kPsi, all * params.d, &held);
  params.prior_sums = scratch(x, wants_prior, all, &held);
  params.beta_sums = scratch(x, wanted & kBeta, params.splits * blocks_of_vectors(params), &held);
  GECO_LAUNCH(equilibrium_map_backward, params, x);
#else
  double beta_value = 0;
  if (wanted & kBeta) params.grad_beta = &beta_value;
  const cpu::Kernels& kernels = *cpu::active().kernels;
  launch<Backward>(params, kernels.equilibrium_map_backward_pack, kernels.equilibrium_map_backward,
                   kernels.equilibrium_map_backward_finish, x);
  if (wanted & kBeta) set_value(grad_beta, beta_value);
#endif
  return {grad_x, grad_psi, grad_beta, grad_log_prior};
}

}  // namespace geco
