#include "ops/conv_lstm.h"

#include "cpu/kernels.h"
#include "include/conv_lstm.h"
#include "include/layout.h"
#include "ops/lstm_gates.h"

namespace geco {

namespace {

using namespace conv_lstm;

constexpr std::int64_t kPanel = 2 * kGroup;
// Tiles of one task: their products stay in the second-level cache until they are transformed.
constexpr std::int64_t kTiles = 48;
// A run: tiles that are at the points at a time, for each thread. Few stay in cache and take little
// memory, but each time the weight is read, or its gradient read and written: a weight that is too
// large for the cache asks for more. In the weight's gradient the tiles of a run are summed before
// they are added, so the sums don't depend on the number of threads.
constexpr std::int64_t kRun = 64, kLongRun = 128, kLargeWeight = 1 << 22;

// A tile's outputs: those that take the fewest products.
int outputs_of(std::int64_t kernel, std::int64_t height, std::int64_t width) {
  if (kernel == 7) return 2;
  if (kernel == 5) return 4;
  STD_TORCH_CHECK(kernel == 3, "Winograd's domain serves kernels of 3, 5 and 7, got ", kernel);
  const auto products = [&](std::int64_t outputs) {
    const std::int64_t points = outputs + 2;
    return (height + outputs - 1) / outputs * ((width + outputs - 1) / outputs) * points * points;
  };
  return products(4) <= products(6) ? 4 : 6;
}

Geometry geometry_of(std::int64_t batch, std::int64_t height, std::int64_t width,
                     std::int64_t kernel, std::int64_t first, std::int64_t second, std::int64_t out,
                     std::int64_t blocks) {
  STD_TORCH_CHECK(first + second > 0 && out > 0 && height > 0 && width > 0,
                  "Winograd's domain needs channels and pixels");
  Geometry g{};
  g.batch = batch;
  g.height = height;
  g.width = width;
  g.kernel = int(kernel);
  g.outputs = outputs_of(kernel, height, width);
  g.tiles_y = (height + g.outputs - 1) / g.outputs;
  g.tiles_x = (width + g.outputs - 1) / g.outputs;
  g.in[0] = {first, 1};
  g.in[1] = {second, 1};
  g.out = {out / blocks, blocks};
  return g;
}

std::int64_t size_of(const std::optional<Tensor>& tensor, int dimension) {
  return tensor.has_value() ? tensor->size(dimension) : 0;
}

std::int64_t points_of(const Geometry& g) { return std::int64_t(g.points()) * g.points(); }

Image image_of(const Tensor& tensor) {
  return {static_cast<float*>(const_cast<void*>(tensor.const_data_ptr())),
          tensor.size(1),
          {tensor.stride(0), tensor.stride(2), tensor.stride(3)}};
}

Tensor empty_image(const Tensor& like, std::int64_t channels) {
  const std::int64_t height = like.size(2), width = like.size(3);
  const std::int64_t sizes[] = {like.size(0), channels, height, width};
  const std::int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  return empty(like, {sizes, 4}, {strides, 4}, ScalarType::Float);
}

// Tasks, of so many multiplications each, that pay for a thread's start.
std::int64_t grain_of(std::int64_t multiplications) {
  return std::max<std::int64_t>(1, (1 << 18) / std::max<std::int64_t>(1, multiplications));
}

// Each image is a matrix [rows, columns], and is written transposed.
void transpose_images(const Tensor& from, std::int64_t rows, std::int64_t columns,
                      const Tensor& to) {
  const layout::Transpose params{static_cast<const float*>(from.const_data_ptr()),
                                 static_cast<float*>(to.mutable_data_ptr()),
                                 from.size(0),
                                 rows,
                                 columns,
                                 from.stride(0),
                                 to.stride(0)};
  const auto kernel = cpu::active().kernels->transpose_images;
  torch::stable::parallel_for(
      0, params.tasks(), grain_of(std::min(rows, columns) * params.kBlock),
      [&](std::int64_t begin, std::int64_t end) { kernel(params, begin, end); });
}

// With channels next to each other, copied if they aren't.
Tensor channels_inside(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == ScalarType::Float,
                  "Winograd's domain takes float32 images [B, C, H, W]");
  if (tensor.stride(1) == 1 || tensor.size(1) == 1) return tensor;
  const std::int64_t pixels = tensor.size(2) * tensor.size(3);
  if (tensor.stride(3) != 1 || tensor.stride(2) != tensor.size(3) || tensor.stride(1) != pixels)
    return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
  const Tensor result = empty_image(tensor, tensor.size(1));
  transpose_images(tensor, tensor.size(1), pixels, result);
  return result;
}

// Whether PyTorch takes a tensor for channels-last, by its strides alone.
bool is_channels_last(const Tensor& tensor) {
  std::int64_t least = 0;
  if (tensor.stride(1) == 0) return false;
  for (const int d : {1, 3, 2, 0}) {
    if (tensor.size(d) == 0 || tensor.stride(d) < least) return false;
    // One channel, one pixel: contiguous.
    if (d == 0 && least == tensor.stride(1)) return false;
    least = tensor.stride(d) * std::max<std::int64_t>(tensor.size(d), 1);
  }
  return true;
}

// An image with channels inside in the layout that is asked for.
Tensor laid_out(const Tensor& image, bool channels_last) {
  if (channels_last) return image;
  const std::int64_t channels = image.size(1), pixels = image.size(2) * image.size(3);
  const std::int64_t sizes[] = {image.size(0), channels, image.size(2), image.size(3)};
  const std::int64_t strides[] = {channels * pixels, pixels, image.size(3), 1};
  const Tensor result = empty(image, {sizes, 4}, {strides, 4}, ScalarType::Float);
  transpose_images(image, pixels, channels, result);
  return result;
}

// Room for `count` tiles at the points; a panel more from one point to the next keeps the points of
// one tile out of each other's cache lines.
struct Workspace {
  Tensor memory;
  Planes planes;

  Workspace(const Tensor& like, const Geometry& g, std::int64_t panels, std::int64_t count)
      : memory(empty_vector(like, points_of(g) * (panels * count + 1) * kPanel, ScalarType::Float)),
        planes{static_cast<float*>(memory.mutable_data_ptr()), count * kPanel,
               (panels * count + 1) * kPanel} {}
};

template <class Params>
void run_tiles(const Params& params, std::int64_t count, std::int64_t groups,
               void (*kernel)(const Params&, std::int64_t, std::int64_t)) {
  // A transform takes some ten operations a value.
  const std::int64_t grain = grain_of(10 * points_of(params.geometry) * groups * kGroup);
  torch::stable::parallel_for(
      0, count, grain, [&](std::int64_t begin, std::int64_t end) { kernel(params, begin, end); });
}

template <class Params>
void run_tasks(const Params& params,
               void (*kernel)(const Params&, std::int64_t, std::int64_t, float*),
               std::int64_t (*measure)(const Params&)) {
  const std::int64_t floats = measure(params);
  const Geometry& g = params.geometry;
  const std::int64_t all = points_of(g) * params.count * g.in_slots() * g.out_slots();
  const std::int64_t grain = grain_of(all / params.tasks());
  torch::stable::parallel_for(0, params.tasks(), grain, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<float> scratch = scratch_of<float>(floats);
    kernel(params, begin, end, scratch.get());
  });
}

Tensor zeros(const Tensor& like, std::int64_t channels) {
  Tensor result = empty_vector(like, channels + kGroup, ScalarType::Float);
  return torch::stable::zero_(result);
}

// Equal blocks of at most kTiles tiles, for so many threads.
std::int64_t block_of(std::int64_t tiles, std::int64_t threads) {
  const std::int64_t each = kTiles * threads;
  const std::int64_t blocks = (tiles + each - 1) / each * threads;
  return (tiles + blocks - 1) / blocks;
}

// How many tiles make a run: all, some images, or a part of one.
std::int64_t run_of(const Geometry& g) {
  const std::int64_t each = g.tiles_per_image(), all = g.batch * each;
  const std::int64_t weight = points_of(g) * g.in_slots() * g.out_slots();
  const std::int64_t most = weight > kLargeWeight ? kLongRun : kRun;
  if (all <= most) return std::max<std::int64_t>(1, all);
  if (each <= most) return most / each * each;
  const std::int64_t parts = (each + most - 1) / most;
  return (each + parts - 1) / parts;
}

std::int64_t threads() { return torch::stable::get_num_threads(); }

// How many tiles are at the points at a time.
std::int64_t part_of(const Geometry& g) {
  return std::min(run_of(g) * threads(), std::max<std::int64_t>(1, g.batch * g.tiles_per_image()));
}

// Returns whether all is finite; if not, some of the results may be wrong.
bool forward(Forward params, const Tensor& like, const Tensor& transformed,
             const std::optional<Tensor>& x, const std::optional<Tensor>& h) {
  const Geometry& g = params.geometry;
  STD_TORCH_CHECK(transformed.numel() == points_of(g) * g.weight_step(),
                  "the transformed weight is for other channels or another size of image");
  params.transformed = static_cast<const float*>(transformed.const_data_ptr());
  const cpu::Kernels& kernels = *cpu::active().kernels;
  const std::int64_t all = g.batch * g.tiles_per_image(), part = part_of(g);
  const Workspace inputs(like, g, g.in_panels(), part);
  const Tensor zero = zeros(like, std::max(g.in[0].channels, g.in[1].channels));
  Tiles tiles{g, {}, static_cast<const float*>(zero.const_data_ptr()), 0, inputs.planes};
  if (x.has_value()) tiles.image[0] = image_of(*x);
  if (h.has_value()) tiles.image[1] = image_of(*h);
  params.inputs = inputs.planes;
  std::int32_t not_finite = 0;
  params.not_finite = &not_finite;
  for (std::int64_t first = 0; first < all; first += part) {
    tiles.first = params.first = first;
    params.count = std::min(part, all - first);
    params.block = block_of(params.count, threads());
    run_tiles(tiles, params.count, g.in_groups(), kernels.winograd_input);
    run_tasks(params, kernels.winograd_forward, kernels.winograd_forward_scratch);
  }
  return not_finite == 0;
}

const float* bias_of(const std::optional<Tensor>& bias, std::int64_t channels) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->numel() == channels && bias->scalar_type() == ScalarType::Float,
                  "the bias must have a float32 value for each output channel");
  return static_cast<const float*>(bias->const_data_ptr());
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

std::optional<Tensor> channels_inside(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(channels_inside(*tensor)) : std::nullopt;
}

// Adds images to another, both dense with channels inside.
void add_image(const Tensor& to, const Tensor& image) {
  const Tensor other =
      torch::stable::contiguous(image, torch::headeronly::MemoryFormat::ChannelsLast);
  float* sum = static_cast<float*>(to.mutable_data_ptr());
  const float* each = static_cast<const float*>(other.const_data_ptr());
  for (std::int64_t k = 0; k < to.numel(); ++k) sum[k] += each[k];
}

// The pre-activations by PyTorch's own convolution, with channels inside.
Tensor direct_gates(const std::optional<Tensor>& x, const Tensor& h, const Tensor& weight,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& projection) {
  Tensor both = weight;
  const std::int64_t split = size_of(x, 1);
  const Tensor gates =
      torch::stable::contiguous(convolve(h, torch::stable::narrow(both, 1, split, h.size(1)), bias),
                                torch::headeronly::MemoryFormat::ChannelsLast);
  if (split > 0)
    add_image(gates, convolve(*x, torch::stable::narrow(both, 1, 0, split), std::nullopt));
  if (projection.has_value()) add_image(gates, *projection);
  return gates;
}

// Room for a weight at the points, with zeros between them, where no kernel writes.
Tensor empty_planes(const Tensor& like, std::int64_t points, std::int64_t step) {
  const Tensor planes = empty_vector(like, points * step, ScalarType::Float);
  float* data = static_cast<float*>(planes.mutable_data_ptr());
  for (std::int64_t point = 1; point <= points; ++point)
    std::fill_n(data + point * step - kPanel, kPanel, 0.0f);
  return planes;
}

Weight weight_of(const Geometry& g, const Tensor& weight, const Tensor& transformed) {
  return {g, static_cast<float*>(const_cast<void*>(weight.const_data_ptr())),
          static_cast<float*>(const_cast<void*>(transformed.const_data_ptr()))};
}

}  // namespace

Tensor winograd_weight_op(const Tensor& weight, std::int64_t split, std::int64_t blocks,
                          std::int64_t height, std::int64_t width, bool transposed) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) &&
                      weight.scalar_type() == ScalarType::Float,
                  "Winograd's domain takes float32 weights [out, in, r, r]");
  STD_TORCH_CHECK(
      split >= 0 && split <= weight.size(1) && blocks > 0 && weight.size(0) % blocks == 0,
      "channels don't divide so");
  const Geometry g = geometry_of(0, height, width, weight.size(2), split, weight.size(1) - split,
                                 weight.size(0), blocks);
  const Tensor given = torch::stable::contiguous(weight);
  const Tensor result =
      empty_planes(weight, points_of(g), transposed ? g.transposed_step() : g.weight_step());
  const Weight params = weight_of(g, given, result);
  const cpu::Kernels& kernels = *cpu::active().kernels;
  const auto kernel = transposed ? kernels.winograd_weight_transposed : kernels.winograd_weight;
  torch::stable::parallel_for(
      0, transposed ? g.in_groups() : g.out.groups(),
      grain_of(points_of(g) * kPanel * g.in_slots()),
      [&](std::int64_t begin, std::int64_t end) { kernel(params, begin, end); });
  return result;
}

Tensor winograd_weight_backward_op(const Tensor& grad, std::int64_t out_channels,
                                   std::int64_t in_channels, std::int64_t kernel,
                                   std::int64_t split, std::int64_t blocks, std::int64_t height,
                                   std::int64_t width) {
  const Geometry g =
      geometry_of(0, height, width, kernel, split, in_channels - split, out_channels, blocks);
  STD_TORCH_CHECK(
      grad.numel() == points_of(g) * g.weight_step() && grad.scalar_type() == ScalarType::Float,
      "the gradient must have the shape and dtype of the transformed weight");
  const std::int64_t sizes[] = {out_channels, in_channels, kernel, kernel};
  const std::int64_t strides[] = {in_channels * kernel * kernel, kernel * kernel, kernel, 1};
  const Tensor result = empty(grad, {sizes, 4}, {strides, 4}, ScalarType::Float);
  const Tensor given = torch::stable::contiguous(grad);
  const Weight params = weight_of(g, result, given);
  const auto run = cpu::active().kernels->winograd_weight_backward;
  torch::stable::parallel_for(
      0, g.out.groups(), 1, [&](std::int64_t begin, std::int64_t end) { run(params, begin, end); });
  return result;
}

Tensor winograd_conv2d_op(const Tensor& x, const Tensor& weight, const Tensor& transformed,
                          const std::optional<Tensor>& bias) {
  const std::int64_t out_channels = weight.size(0);
  const Tensor image = channels_inside(x);
  const Tensor result = empty_image(x, out_channels);
  const std::optional<Tensor> offset = dense(bias);
  Forward params{};
  params.geometry =
      geometry_of(x.size(0), x.size(2), x.size(3), weight.size(2), x.size(1), 0, out_channels, 1);
  params.bias = bias_of(offset, out_channels);
  params.result = image_of(result);
  if (!forward(params, x, transformed, image, std::nullopt)) return convolve(x, weight, bias);
  return laid_out(result, is_channels_last(x) || is_channels_last(weight));
}

std::tuple<Tensor, Tensor, Tensor> winograd_step_op(const std::optional<Tensor>& x, const Tensor& h,
                                                    const Tensor& c, const Tensor& weight,
                                                    const Tensor& transformed,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& x_projection,
                                                    double forget_bias, bool keep) {
  const std::int64_t channels = h.size(1);
  STD_TORCH_CHECK(same_sizes(h, c), "c must have the shape of h");
  const std::optional<Tensor> first = channels_inside(x),
                              projection = channels_inside(x_projection), offset = dense(bias);
  const Tensor hidden = channels_inside(h), cell = channels_inside(c);
  const Tensor h_next = empty_image(h, channels), c_next = empty_image(h, channels);
  const Tensor gates = keep ? empty_image(h, 4 * channels) : empty_vector(h, 0, ScalarType::Float);
  Forward params{};
  params.geometry = geometry_of(h.size(0), h.size(2), h.size(3), weight.size(2), size_of(x, 1),
                                channels, 4 * channels, 4);
  params.bias = bias_of(offset, 4 * channels);
  params.forget_bias = forget_bias;
  if (projection.has_value()) params.projection = image_of(*projection);
  params.c = image_of(cell);
  params.h_next = image_of(h_next);
  params.c_next = image_of(c_next);
  if (keep) params.gates = image_of(gates);
  const bool channels_last =
      is_channels_last(weight) || ((!x.has_value() || is_channels_last(*x)) && is_channels_last(h));
  if (!forward(params, h, transformed, first, hidden)) {
    const Tensor direct = direct_gates(x, h, weight, bias, x_projection);
    const auto [h_direct, c_direct] = lstm_gates_op(direct, cell, forget_bias);
    return {laid_out(h_direct, channels_last), laid_out(c_direct, channels_last),
            keep ? direct : gates};
  }
  return {laid_out(h_next, channels_last), laid_out(c_next, channels_last), gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> winograd_backward_op(
    const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& h,
    const Tensor& weight, const Tensor& transposed, std::int64_t blocks, std::int64_t wanted,
    const std::optional<Tensor>& total) {
  const std::int64_t out = grad.size(1);
  const Geometry g = geometry_of(grad.size(0), grad.size(2), grad.size(3), weight.size(2),
                                 size_of(x, 1), size_of(h, 1), out, blocks);
  const bool wants_weight = wanted & 4, wants_bias = wanted & 8;
  const std::optional<Tensor> sources[] = {channels_inside(x), channels_inside(h)};
  Tensor grad_source[2] = {empty_vector(grad, 0, ScalarType::Float),
                           empty_vector(grad, 0, ScalarType::Float)};
  const std::int64_t weight_size = points_of(g) * g.weight_step();
  const bool adds = wants_weight && total.has_value();
  STD_TORCH_CHECK(!adds || (total->numel() == weight_size && total->is_contiguous() &&
                            total->scalar_type() == ScalarType::Float),
                  "the gradient so far must have the shape and dtype of the transformed weight");
  const Tensor grad_weight =
      empty_planes(grad, wants_weight && !adds ? points_of(g) : 0, g.weight_step());
  Tensor grad_bias = empty_vector(grad, wants_bias ? out : 0, ScalarType::Float);
  bool wants_source = false;
  BackwardInput to_inputs{};
  for (int k = 0; k < 2; ++k) {
    if (!sources[k].has_value() || !(wanted >> k & 1)) continue;
    wants_source = true;
    grad_source[k] = empty_image(grad, sources[k]->size(1));
    torch::stable::zero_(grad_source[k]);
    to_inputs.grad_image[k] = image_of(grad_source[k]);
  }
  const std::int64_t all = g.batch * g.tiles_per_image();
  if (all == 0) {
    if (wants_weight && !adds) torch::stable::fill_(grad_weight, 0);
    if (wants_bias) torch::stable::fill_(grad_bias, 0);
    return {grad_source[0], grad_source[1], grad_weight, grad_bias};
  }
  STD_TORCH_CHECK(!wants_source || transposed.numel() == points_of(g) * g.transposed_step(),
                  "the transposed weight is for other channels or another size of image");

  const Tensor upstream = channels_inside(grad);
  const std::int64_t part = part_of(g);
  const Workspace grads(grad, g, g.out_panels(), part);
  const Workspace inputs(grad, g, g.in_panels(), wants_weight ? part : 0);
  const Tensor zero = zeros(grad, std::max({g.in[0].channels, g.in[1].channels, out}));
  const float* none = static_cast<const float*>(zero.const_data_ptr());
  Tiles from_grad{g, {image_of(upstream), {}}, none, 0, grads.planes};
  Tiles from_inputs{g, {}, none, 0, inputs.planes};
  for (int k = 0; k < 2; ++k)
    if (sources[k].has_value()) from_inputs.image[k] = image_of(*sources[k]);
  to_inputs.geometry = g;
  to_inputs.grad = grads.planes;
  to_inputs.transposed = static_cast<const float*>(transposed.const_data_ptr());
  std::int32_t not_finite = 0;
  to_inputs.not_finite = &not_finite;
  BackwardWeight to_weight{g,    0,     inputs.planes, grads.planes, run_of(g),
                           adds, false, nullptr,       nullptr};
  if (wants_weight)
    to_weight.grad_transformed =
        static_cast<float*>((adds ? *total : grad_weight).mutable_data_ptr());
  if (wants_bias) to_weight.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());

  const cpu::Kernels& kernels = *cpu::active().kernels;
  for (std::int64_t first = 0; first < all; first += part) {
    const std::int64_t count = std::min(part, all - first);
    from_grad.first = from_inputs.first = to_inputs.first = first;
    to_weight.count = to_inputs.count = count;
    run_tiles(from_grad, count, g.out.groups(), kernels.winograd_gradient);
    if (wants_source) {
      // Some images at once where they have few tiles, a part of one where they have many.
      const std::int64_t images = std::max<std::int64_t>(1, kTiles / g.tiles_per_image());
      to_inputs.share = std::min(count, images * g.tiles_per_image());
      to_inputs.block = block_of(to_inputs.share, 1);
      run_tasks(to_inputs, kernels.winograd_backward_input,
                kernels.winograd_backward_input_scratch);
    }
    if (wants_weight) run_tiles(from_inputs, count, g.in_groups(), kernels.winograd_input);
    if (wants_weight || wants_bias)
      torch::stable::parallel_for(0, points_of(g) * g.out_panels(),
                                  grain_of(count * g.in_slots() * kPanel),
                                  [&](std::int64_t begin, std::int64_t end) {
                                    kernels.winograd_backward_weight(to_weight, begin, end);
                                  });
    to_weight.adds_weight = to_weight.adds_bias = true;
  }
  if (not_finite != 0) {
    Tensor direct = convolve(grad, weight_backwards(weight), std::nullopt);
    for (int k = 0, first = 0; k < 2; first += int(size_of(sources[k], 1)), ++k)
      if (to_inputs.grad_image[k].data != nullptr)
        torch::stable::copy_(grad_source[k],
                             torch::stable::narrow(direct, 1, first, sources[k]->size(1)));
  }
  // PyTorch's own convolution gives a gradient the layout of its image.
  for (int k = 0; k < 2; ++k) {
    const std::optional<Tensor>& given = k == 0 ? x : h;
    if (to_inputs.grad_image[k].data != nullptr)
      grad_source[k] = laid_out(grad_source[k], is_channels_last(*given));
  }
  return {grad_source[0], grad_source[1], grad_weight, grad_bias};
}

}  // namespace geco
