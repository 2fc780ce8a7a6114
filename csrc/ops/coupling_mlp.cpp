#include "ops/coupling_mlp.h"

#include <utility>

#include "cpu/kernels.h"
#include "include/coupling_mlp.h"
#include "ops/affine_coupling.h"

namespace geco {

namespace {

using coupling_mlp::Activation;
using coupling_mlp::AffineBackward;
using coupling_mlp::AffineForward;
using coupling_mlp::Backward;
using coupling_mlp::Chain;
using coupling_mlp::Forward;
using coupling_mlp::keeps_input;
using coupling_mlp::kPanel;
using coupling_mlp::Layer;
using coupling_mlp::padded;
using coupling_mlp::panels;

Activation parse(const Text& activation) {
  if (activation == "relu") return Activation::kRelu;
  if (activation == "leaky_relu") return Activation::kLeakyRelu;
  if (activation == "tanh") return Activation::kTanh;
  if (activation == "elu") return Activation::kElu;
  STD_TORCH_CHECK(activation == "silu", "coupling_mlp: unknown activation ", activation);
  return Activation::kSilu;
}

bool is_matrix(const Tensor& tensor, std::int64_t rows, std::int64_t columns, const Tensor& like) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
         tensor.scalar_type() == like.scalar_type();
}

// A context beside x, and the part of the first weight that it meets.
struct Context {
  std::optional<Tensor> value, weight;
};

std::vector<Layer> layers_of(const Tensor& x, const std::vector<Tensor>& weights,
                             const Context& context) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "coupling_mlp: the kernel takes float32 and float64");
  STD_TORCH_CHECK(x.dim() == 2 && !weights.empty(), "coupling_mlp: x must be [B, H0]");
  std::vector<Layer> layers;
  std::int64_t width = x.size(1);
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() == 2 && is_matrix(weight, weight.size(0), width, x),
                    "coupling_mlp: a weight must be [out, the width before], of the dtype of x");
    layers.push_back({.in = width, .own = width, .out = weight.size(0), .weight = matrix(weight)});
    width = weight.size(0);
  }
  STD_TORCH_CHECK(context.value.has_value() == context.weight.has_value(),
                  "coupling_layer: a context comes with its weight");
  if (context.value.has_value()) {
    const std::int64_t features = context.weight->size(-1);
    STD_TORCH_CHECK(is_matrix(*context.weight, layers[0].out, features, x) &&
                        is_matrix(*context.value, x.size(0), features, x),
                    "coupling_layer: context must be [B, features], its weight [H1, features]");
    layers[0].context_weight = matrix(*context.weight);
    layers[0].in = padded(layers[0].own) + features;
  }
  return layers;
}

std::int64_t hidden_size(std::int64_t batch, const std::vector<Layer>& layers) {
  std::int64_t size = 0;
  for (std::size_t l = 0; l + 1 < layers.size(); ++l) size += batch * padded(layers[l].out);
  return size;
}

void give_hidden(const Tensor& hidden, std::int64_t batch, std::vector<Layer>* layers) {
  char* data = static_cast<char*>(const_cast<void*>(hidden.const_data_ptr()));
  for (std::size_t l = 0; l + 1 < layers->size(); ++l) {
    (*layers)[l].hidden = data;
    data += batch * padded((*layers)[l].out) * std::int64_t(hidden.element_size());
  }
}

void describe(const Tensor& x, const Text& activation, const std::vector<Layer>& layers,
              Chain* chain) {
  chain->dtype = dtype_of(x);
  chain->activation = parse(activation);
  chain->count = std::int64_t(layers.size());
  chain->layers = layers.data();
  chain->batch = {x.size(0)};
  chain->x = matrix(x);
}

// Parts of one piece of memory: asked for first, given out when all are known.
class Parts {
 public:
  void ask(void** part, std::int64_t elements) {
    parts_.push_back({part, size_});
    size_ += elements;
  }
  Tensor allocate(const Tensor& like) const {
    const Tensor memory = empty_vector(like, size_, like.scalar_type());
    char* const data = static_cast<char*>(memory.mutable_data_ptr());
    for (const auto& [part, offset] : parts_)
      *part = data + offset * std::int64_t(like.element_size());
    return memory;
  }

 private:
  std::vector<std::pair<void**, std::int64_t>> parts_;
  std::int64_t size_ = 0;
};

// Shares out tasks that take so many multiplications, or as much time, together.
template <class Body>
void share(std::int64_t tasks, std::int64_t products, Body body) {
  constexpr std::int64_t kGrain = 1 << 18;
  if (tasks > 0) torch::stable::parallel_for(0, tasks, 1 + kGrain / (1 + products / tasks), body);
}

template <class Params>
void share(const Params& params, std::int64_t tasks, std::int64_t products,
           void (*kernel)(const Params&, std::int64_t, std::int64_t)) {
  share(tasks, products, [&](std::int64_t begin, std::int64_t end) { kernel(params, begin, end); });
}

// The same for a kernel with scratch memory.
template <class Params>
void share(const Params& params, std::int64_t tasks, std::int64_t products,
           void (*kernel)(const Params&, std::int64_t, std::int64_t, void*)) {
  const std::int64_t bytes = params.scratch() * (params.dtype == DType::kFloat64 ? 8 : 4);
  share(tasks, products, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<char> scratch = scratch_of<char>(bytes);
    kernel(params, begin, end, scratch.get());
  });
}

// An element's packing takes the time of some multiplications.
constexpr std::int64_t kPacking = 16;

// What backward takes goes to `hidden`, if that is given; the map is applied, if one is given.
Tensor forward(const Tensor& x, const std::optional<Tensor>& projection,
               const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
               const Text& activation, Tensor* hidden, const Context& context = {},
               const AffineForward& affine = {}) {
  const std::int64_t batch = x.size(0);
  std::vector<Layer> layers = layers_of(x, weights, context);
  STD_TORCH_CHECK(biases.size() == weights.size(), "coupling_mlp: as many biases as weights");
  Parts parts;
  std::int64_t tasks = 0, values = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    Layer& layer = layers[l];
    const Tensor& bias = biases[l];
    STD_TORCH_CHECK(bias.numel() == 0 || (bias.dim() == 1 && bias.size(0) == layer.out &&
                                          bias.scalar_type() == x.scalar_type()),
                    "coupling_mlp: a bias must be [out], of the dtype of x, or empty");
    if (bias.numel() > 0)
      layer.bias = {const_cast<void*>(bias.const_data_ptr()), 0, bias.stride(0)};
    parts.ask(&layer.packed, panels(layer.out) * (layer.in + 1) * kPanel);
    tasks += panels(layer.out);
    values += layer.out * layer.in;
  }
  const Tensor packed = parts.allocate(x);
  if (hidden != nullptr) {
    *hidden = empty_vector(x, hidden_size(batch, layers), x.scalar_type());
    give_hidden(*hidden, batch, &layers);
  }
  const std::int64_t sizes[] = {batch, layers.back().out};
  const std::int64_t strides[] = {std::max<std::int64_t>(sizes[1], 1), 1};
  const Tensor result = empty(x, {sizes, 2}, {strides, 2}, x.scalar_type());
  Forward params{};
  describe(x, activation, layers, &params);
  if (projection.has_value()) {
    STD_TORCH_CHECK(is_matrix(*projection, batch, layers[0].out, x),
                    "coupling_mlp: context_projection must be [B, H1], of the dtype of x");
    params.projection = matrix(*projection);
  }
  params.result = matrix(result);
  if (context.value.has_value()) params.context = matrix(*context.value);
  params.affine = affine;
  STD_TORCH_CHECK(affine.count == 0 || layers.back().out == 2 * affine.count,
                  "coupling_mlp: the last layer must have two outputs for each changed feature");
  const cpu::Kernels& kernels = *cpu::active().kernels;
  share(params, tasks, kPacking * values, kernels.coupling_mlp_forward_pack);
  share(params, params.batch.blocks(), batch * values, kernels.coupling_mlp_forward);
  return result;
}

}  // namespace

Tensor coupling_mlp_op(const Tensor& x, const std::optional<Tensor>& context_projection,
                       const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                       Text activation) {
  return forward(x, context_projection, weights, biases, activation, nullptr);
}

std::tuple<Tensor, Tensor> coupling_mlp_with_hidden_op(
    const Tensor& x, const std::optional<Tensor>& context_projection,
    const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, Text activation) {
  Tensor hidden;
  const Tensor result = forward(x, context_projection, weights, biases, activation, &hidden);
  return {result, hidden};
}

namespace {

// A coupling layer's own part of backward: where the gradient to x goes, and those to the context.
struct OfLayer {
  AffineBackward affine;
  Matrix grad_x;
  Context context, grad_context;
};

// The gradients as they are wanted; in a coupling layer `grad` is none.
std::vector<Tensor> backward(const Tensor& x, const std::vector<Tensor>& weights,
                             const Text& activation, const Tensor& hidden, const Matrix& grad,
                             const std::vector<bool>& wanted, const OfLayer& own) {
  const std::int64_t batch = x.size(0), count = std::int64_t(weights.size());
  const AffineBackward& affine = own.affine;
  std::vector<Layer> layers = layers_of(x, weights, own.context);
  STD_TORCH_CHECK(affine.count == 0 || layers.back().out == 2 * affine.count,
                  "coupling_mlp: the last layer must have two outputs for each changed feature");
  STD_TORCH_CHECK(
      hidden.numel() == hidden_size(batch, layers) && hidden.scalar_type() == x.scalar_type(),
      "coupling_mlp: hidden values are another call's");
  STD_TORCH_CHECK(std::int64_t(wanted.size()) == 2 + 2 * count,
                  "coupling_mlp: for x, context_projection, each weight and bias, say if wanted");
  const bool wants_x = wanted[0], wants_projection = wanted[1];
  give_hidden(hidden, batch, &layers);

  Backward params{};
  describe(x, activation, layers, &params);
  params.grad = grad;
  params.affine = affine;
  std::vector<Tensor> grads;
  const bool has_place = own.grad_x.data != nullptr;
  grads.push_back(gradient_like(x, wants_x && !has_place));
  if (wants_x) params.grad_x = has_place ? own.grad_x : matrix(grads[0]);
  const bool wants_context = own.grad_context.value.has_value();
  const bool wants_context_weight = own.grad_context.weight.has_value();
  if (own.context.value.has_value()) params.context = matrix(*own.context.value);
  if (wants_context) params.grad_context = matrix(*own.grad_context.value);
  if (wants_context_weight) layers[0].grad_context_weight = matrix(*own.grad_context.weight);
  const std::int64_t sizes[] = {batch, layers[0].out};
  const std::int64_t strides[] = {std::max<std::int64_t>(sizes[1], 1), 1};
  grads.push_back(wants_projection ? empty(x, {sizes, 2}, {strides, 2}, x.scalar_type())
                                   : gradient_like(x, false));
  if (wants_projection) params.grad_projection = matrix(grads[1]);
  for (std::int64_t l = 0; l < count; ++l) {
    grads.push_back(gradient_like(weights[l], wanted[2 + l]));
    if (wanted[2 + l]) layers[l].grad_weight = matrix(grads.back());
  }
  for (std::int64_t l = 0; l < count; ++l) {
    const bool wants_bias = wanted[2 + count + l];
    grads.push_back(wants_bias ? empty_vector(x, layers[l].out, x.scalar_type())
                               : gradient_like(x, false));
    if (wants_bias) layers[l].grad_bias = {grads.back().mutable_data_ptr(), 0, 1};
  }

  if (!wants_x && !wants_projection && !wants_context && !wants_context_weight)
    while (params.lowest + 1 < count && !wanted[2 + params.lowest] &&
           !wanted[2 + count + params.lowest])
      ++params.lowest;
  Parts parts;
  std::int64_t values = 0, packings = 0, tiles = 0, biases = 0;
  for (std::int64_t l = params.lowest; l < count; ++l) {
    Layer& layer = layers[l];
    parts.ask(&layer.grad, batch * padded(layer.out));
    if (l > params.lowest || wants_x || wants_context) {
      parts.ask(&layer.packed, panels(layer.in) * layer.out * kPanel);
      packings += panels(layer.in);
      values += layer.out * layer.in;
    }
    if (params.tiles(layer) > 0) {
      if (l == 0 || keeps_input(params.activation))
        parts.ask(&layer.input, batch * padded(layer.in));
      else
        layer.input = layers[l - 1].hidden;
      tiles += params.tiles(layer);
    }
    if (wanted[2 + count + l]) biases += panels(layer.out);
  }
  const Tensor memory = parts.allocate(x);
  const cpu::Kernels& kernels = *cpu::active().kernels;
  share(params, packings, kPacking * values, kernels.coupling_mlp_backward_pack);
  share(params, params.batch.blocks(), batch * values, kernels.coupling_mlp_backward);
  share(params, tiles, tiles * params.kTile * batch, kernels.coupling_mlp_backward_weight);
  share(params, biases, biases * kPanel * batch, kernels.coupling_mlp_backward_bias);
  return grads;
}

// The two parts of the features of a coupling layer.
struct Split {
  std::int64_t kept, changed, kept_count, changed_count;

  Split(const Tensor& x, bool keeps_second)
      : kept(keeps_second ? x.size(1) / 2 : 0),
        changed(keeps_second ? 0 : x.size(1) / 2),
        kept_count(keeps_second ? x.size(1) - x.size(1) / 2 : x.size(1) / 2),
        changed_count(x.size(1) - kept_count) {}
};

// A matrix from a column on.
Matrix from_column(const Tensor& tensor, std::int64_t column) {
  Matrix found = matrix(tensor);
  found.data = static_cast<char*>(found.data) + column * std::int64_t(tensor.element_size());
  return found;
}

Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace

std::vector<Tensor> coupling_mlp_backward_op(const Tensor& x, const std::vector<Tensor>& weights,
                                             Text activation, const Tensor& hidden,
                                             const Tensor& grad, const std::vector<bool>& wanted) {
  STD_TORCH_CHECK(!weights.empty() && is_matrix(grad, x.size(0), weights.back().size(0), x),
                  "coupling_mlp: the gradient must have the shape and dtype of the result");
  return backward(x, weights, activation, hidden, matrix(grad), wanted, {});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> coupling_layer_op(
    const Tensor& x, const std::optional<Tensor>& context,
    const std::optional<Tensor>& context_weight, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases, Text activation, bool keeps_second, bool inverse,
    Text scale_map, double clamp, bool keep) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 2, "coupling_layer: x must be [B, features]");
  const Split split(x, keeps_second);
  Tensor given = with_dense_rows(x);
  const std::int64_t sizes[] = {x.size(0), x.size(1)}, strides[] = {x.size(1), 1};
  const Tensor y = empty(x, {sizes, 2}, {strides, 2}, x.scalar_type());
  const Tensor log_det = empty_vector(x, x.size(0), x.scalar_type());
  AffineForward affine{};
  affine.map = scale_map_of(scale_map);
  affine.inverse = inverse;
  affine.clamp = clamp;
  affine.count = split.changed_count;
  affine.x = from_column(given, split.changed);
  affine.kept = from_column(y, split.kept);
  affine.y = from_column(y, split.changed);
  affine.log_det = log_det.mutable_data_ptr();
  Tensor hidden = empty_vector(x, 0, x.scalar_type());
  const Tensor raw =
      forward(torch::stable::narrow(given, 1, split.kept, split.kept_count), std::nullopt, weights,
              biases, activation, keep ? &hidden : nullptr, {context, context_weight}, affine);
  return {y, log_det, hidden, keep ? raw : empty_vector(x, 0, x.scalar_type())};
}

std::vector<Tensor> coupling_layer_backward_op(
    const Tensor& x, const std::optional<Tensor>& context,
    const std::optional<Tensor>& context_weight, const std::vector<Tensor>& weights,
    Text activation, bool keeps_second, bool inverse, Text scale_map, double clamp,
    const Tensor& hidden, const Tensor& raw, const std::optional<Tensor>& grad_y,
    const std::optional<Tensor>& grad_log_det, const std::vector<bool>& wanted) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 2, "coupling_layer: x must be [B, features]");
  STD_TORCH_CHECK(
      wanted.size() == 3 + 2 * weights.size(),
      "coupling_layer: for x, context, its weight, each weight and bias, say if wanted");
  const Split split(x, keeps_second);
  STD_TORCH_CHECK(is_matrix(raw, x.size(0), 2 * split.changed_count, x),
                  "coupling_layer: kept values are another call's");
  Tensor given = with_dense_rows(x);
  OfLayer own{};
  AffineBackward& affine = own.affine;
  affine.map = scale_map_of(scale_map);
  affine.inverse = inverse;
  affine.clamp = clamp;
  affine.count = split.changed_count;
  affine.x = from_column(given, split.changed);
  affine.raw = matrix(raw);
  affine.grad_log_det = row_scalars(grad_log_det, x);
  std::optional<Tensor> upstream;
  if (grad_y.has_value()) {
    STD_TORCH_CHECK(is_matrix(*grad_y, x.size(0), x.size(1), x),
                    "coupling_layer: the gradient must have the shape and dtype of x");
    upstream = with_dense_rows(*grad_y);
    affine.grad_kept = from_column(*upstream, split.kept);
    affine.grad_y = from_column(*upstream, split.changed);
  }
  const std::int64_t sizes[] = {x.size(0), x.size(1)}, strides[] = {x.size(1), 1};
  const Tensor grad_x =
      wanted[0] ? empty(x, {sizes, 2}, {strides, 2}, x.scalar_type()) : gradient_like(x, false);
  if (wanted[0]) {
    own.grad_x = from_column(grad_x, split.kept);
    affine.grad_x = from_column(grad_x, split.changed);
  }
  own.context = {context, context_weight};
  const Tensor none = gradient_like(x, false);
  std::vector<Tensor> grads = {grad_x, none, none};
  if (context.has_value() && wanted[1])
    own.grad_context.value = grads[1] = gradient_like(*context, true);
  if (context_weight.has_value() && wanted[2])
    own.grad_context.weight = grads[2] = gradient_like(*context_weight, true);
  std::vector<bool> of_chain = {wanted[0], false};
  of_chain.insert(of_chain.end(), wanted.begin() + 3, wanted.end());
  const std::vector<Tensor> rest =
      backward(torch::stable::narrow(given, 1, split.kept, split.kept_count), weights, activation,
               hidden, {}, of_chain, own);
  grads.insert(grads.end(), rest.begin() + 2, rest.end());
  return grads;
}

}  // namespace geco
