#include "ops/pncc.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "include/pncc.h"

namespace geco {

namespace {

#ifdef GECO_CUDA
using Backward = pncc::OnDevice;
using Forward = pncc::OnDevice;
#else
using pncc::Backward;
using pncc::Forward;
#endif
using pncc::kDims;
using pncc::Problem;

#ifdef GECO_CUDA
// The tiles of a launch. Where they are too few for a GPU's multiprocessors a thread has fewer
// windows of its own: margins are read more often, but side by side.
void cut(const std::int64_t (&total)[kDims], std::int64_t images, std::int64_t (&tile)[kDims],
         std::int64_t (&tiles)[kDims]) {
  constexpr std::int64_t kFewTiles = 128;
  const bool is_deep = total[0] > 1;
  for (int own = pncc::kOwn; own > 0; own /= 2) {
    tile[0] = is_deep ? own : 1;
    tile[1] = is_deep ? pncc::kTileRows : pncc::kTileRows * own;
    tile[2] = pncc::kTile;
    std::int64_t all = images;
    for (int d = 0; d < kDims; ++d) all *= tiles[d] = (total[d] + tile[d] - 1) / tile[d];
    if (all >= kFewTiles) break;
  }
}

void cut(pncc::OnDevice* p) {
  cut(p->count, p->batch * p->groups, p->tile, p->tiles);
  cut(p->size, p->batch * p->groups, p->pixel_tile, p->pixel_tiles);
  p->tiles_of_group = p->tiles_per_group();
  p->tasks_on_device = p->tasks();
  p->pixel_tiles_of_group = p->pixel_tiles[0] * p->pixel_tiles[1] * p->pixel_tiles[2];
  p->pixel_tasks = p->batch * p->groups * p->pixel_tiles_of_group;
}

void cut_forward(Forward* p) { cut(p); }
void cut_backward(Backward* p) { cut(p); }
#else
// Equal parts of at most `most`, all but the last whole vectors of any instruction set.
std::int64_t part(std::int64_t total, std::int64_t most, std::int64_t multiple) {
  const std::int64_t parts = std::max<std::int64_t>(1, (total + most - 1) / most);
  return std::max<std::int64_t>(1, ((total + parts - 1) / parts + multiple - 1) / multiple) *
         multiple;
}

// Tiles depend on the sizes alone, so that results don't depend on the number of threads. Where a
// tile ends, the rows and columns of patches that cross the border are computed twice; the sums of
// a tile's last patch-height rows are held, and in three dimensions those of its last planes.
void cut(Problem* p, const std::int64_t (&total)[kDims], std::int64_t rows_held) {
  constexpr std::int64_t kHeld = 1 << 17;  // doubles in the planes held
  const auto most = [](std::int64_t patch, std::int64_t low, std::int64_t high) {
    return std::min(std::max(patch, low), high);
  };
  p->tile[2] = part(total[2], most(2 * p->patch[2], 128, 512), 8);
  p->tile[1] = part(total[1], std::max<std::int64_t>(128, 4 * p->patch[1]), 1);
  p->tile[0] = part(total[0], std::max<std::int64_t>(64, 8 * p->patch[0]), 1);
  if (p->patch[0] > 1) {
    const std::int64_t fitting = kHeld / (rows_held * p->patch[0] * p->tile[2]);
    p->tile[1] = std::min(p->tile[1], part(total[1], std::max(2 * p->patch[1], fitting), 1));
  }
  for (int d = 0; d < kDims; ++d) p->tiles[d] = (total[d] + p->tile[d] - 1) / p->tile[d];
}

void cut_forward(Forward* p) { cut(p, p->count, 5); }
void cut_backward(Backward* p) { cut(p, p->size, 10); }
#endif

void describe_image(const Tensor& tensor, std::int64_t (&stride)[2 + kDims]) {
  const int missing = kDims + 2 - int(tensor.dim());
  for (int d = 0; d < 2 + kDims; ++d) stride[d] = 0;
  stride[0] = tensor.stride(0);
  stride[1] = tensor.stride(1);
  for (int d = 2; d < tensor.dim(); ++d) stride[d + missing] = tensor.stride(d);
}

struct Options {
  std::vector<std::int64_t> patch, stride, pad;
  bool squared, joint;
  double eps, smooth;
  const Text& reduction;
};

std::vector<std::int64_t> for_each_dimension(const std::vector<std::int64_t>& given,
                                             const Tensor& image) {
  const std::size_t dims = std::size_t(image.dim() - 2);
  return given.size() == 1 ? std::vector<std::int64_t>(dims, given[0]) : given;
}

Problem problem_of(const Tensor& x, const Tensor& y, const Options& options) {
  STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 2 + kDims && same_sizes(x, y),
                  "pncc: images must be [B, C, *S] with 1 to 3 spatial dimensions, alike");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "pncc: dtypes differ");
  const std::size_t dims = std::size_t(x.dim() - 2);
  STD_TORCH_CHECK(options.patch.size() == dims && options.stride.size() == dims,
                  "pncc: one patch size and one stride for every dimension");
  Problem p{};
  p.dtype = dtype_of(x);
  p.squared = options.squared;
  p.reduced = options.reduction != "none";
  p.eps = options.eps;
  p.smooth = options.smooth;
  p.batch = x.size(0);
  p.groups = options.joint ? 1 : x.size(1);
  p.channels = options.joint ? x.size(1) : 1;
  const int missing = kDims - int(dims);
  double patches = double(p.groups);
  for (int d = 0; d < kDims; ++d) {
    const bool given = d >= missing;
    p.size[d] = given ? x.size(2 + d - missing) : 1;
    p.patch[d] = given ? options.patch[std::size_t(d - missing)] : 1;
    p.stride[d] = given ? options.stride[std::size_t(d - missing)] : 1;
    p.pad[d] = given ? options.pad[std::size_t(d - missing)] : 0;
    const std::int64_t room = p.size[d] + 2 * p.pad[d] - p.patch[d];
    STD_TORCH_CHECK(p.patch[d] >= 1 && p.stride[d] >= 1 && (room >= 0 || p.size[d] == 0),
                    "pncc: a patch does not fit into dimension ", d - missing);
    p.count[d] = p.size[d] == 0 ? 0 : room / p.stride[d] + 1;
    // One patch has no other beside it: a stride past the image stays within 64 bits.
    if (p.count[d] <= 1) p.stride[d] = p.patch[d];
    patches *= double(p.count[d]);
  }
  p.scale = options.reduction == "mean" ? 1 / patches : 1;
  p.image[0] = x.const_data_ptr();
  p.image[1] = y.const_data_ptr();
  describe_image(x, p.image_stride[0]);
  describe_image(y, p.image_stride[1]);
  return p;
}

#ifdef GECO_CUDA
// The images' pivots, if they are to have any.
Tensor find_pivots(pncc::OnDevice* params, const Tensor& x) {
  constexpr std::int64_t kPart = 1 << 14, kMostParts = 64;
  const std::int64_t images = 2 * params->batch * params->groups;
  const bool has_zeros_around = params->pad[0] + params->pad[1] + params->pad[2] > 0;
  params->parts = std::clamp<std::int64_t>(2 * x.numel() / images / kPart, 1, kMostParts);
  const Tensor pivots =
      empty_vector(x, has_zeros_around ? 0 : images * params->parts, ScalarType::Double);
  if (has_zeros_around) return pivots;
  params->pivots = static_cast<double*>(pivots.mutable_data_ptr());
  GECO_LAUNCH(pncc_pivots, *params, x);
  return pivots;
}

void run_forward(Forward params, const Tensor& x) {
  const Tensor pivots = find_pivots(&params, x);
  GECO_LAUNCH(pncc_scores, params, x);
}

void run_backward(Backward params, const Tensor& x) {
  const Tensor pivots = find_pivots(&params, x);
  const std::int64_t patches =
      params.batch * params.groups * params.count[0] * params.count[1] * params.count[2];
  const Tensor coefficients = empty_vector(x, params.stored_fields() * patches, ScalarType::Double);
  params.coefficients = static_cast<double*>(coefficients.mutable_data_ptr());
  GECO_LAUNCH(pncc_scores, params, x);
  GECO_LAUNCH(pncc_gradients, params, x);
}

void finish(const Problem& params, const Tensor& sums) {
  const std::int64_t of_each = params.groups * params.tiles_per_group();
  add_partial_sums(params.partial, of_each, 1 / params.scale, sums);
}
#else
// Runs a kernel over all tasks on torch's threads, each with scratch memory of its own.
template <class Params, class Kernel, class Measure>
void run(const Params& params, std::int64_t values, Kernel kernel, Measure measure) {
  constexpr std::int64_t kGrain = 4096;  // values that pay for a thread's start
  const std::int64_t tasks = params.tasks();
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain * tasks / values);
  const std::int64_t doubles = measure(params);
  torch::stable::parallel_for(0, tasks, grain, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<double> scratch = scratch_of<double>(doubles);
    kernel(params, begin, end, scratch.get());
  });
}

void run_forward(const Forward& params, const Tensor& x) {
  const cpu::Kernels& kernels = *cpu::active().kernels;
  run(params, x.numel(), kernels.pncc_forward, kernels.pncc_forward_scratch);
}

void run_backward(const Backward& params, const Tensor& x) {
  const cpu::Kernels& kernels = *cpu::active().kernels;
  run(params, x.numel(), kernels.pncc_backward, kernels.pncc_backward_scratch);
}

void finish(const Problem& params, const Tensor&) { cpu::active().kernels->pncc_finish(params); }
#endif

// The shape of the scores, [B, *S'] or [B, C, *S'].
std::vector<std::int64_t> score_sizes(const Problem& p, const Tensor& x, bool joint) {
  std::vector<std::int64_t> sizes{p.batch};
  if (!joint) sizes.push_back(p.groups);
  for (std::int64_t d = 2 + kDims - x.dim(); d < kDims; ++d) sizes.push_back(p.count[d]);
  return sizes;
}

Tensor empty_sums(const Problem& p, const Tensor& x) {
  return empty_vector(x, p.batch, compute_dtype(x));
}

// No values correlate to zero; the mean over no patches is not a number.
double score_of_nothing(const Problem& p, const Options& options) {
  const bool mean = options.reduction == "mean" && p.scale > 1;
  return mean ? std::numeric_limits<double>::quiet_NaN() : 0.0;
}

Tensor forward(const Tensor& x, const Tensor& y, const Options& options) {
  const Problem problem = problem_of(x, y, options);
  Forward params{};
  static_cast<Problem&>(params) = problem;
  Tensor result = params.reduced
                      ? empty_sums(problem, x)
                      : torch::stable::new_empty(x, score_sizes(problem, x, options.joint));
  if (x.numel() == 0) return torch::stable::fill_(result, score_of_nothing(problem, options));
  cut_forward(&params);
  const Tensor partial = empty_vector(x, params.reduced ? params.tasks() : 0, ScalarType::Double);
  if (params.reduced) {
    params.partial = static_cast<double*>(partial.mutable_data_ptr());
    params.sums = result.mutable_data_ptr();
  } else {
    params.scores = result.mutable_data_ptr();
    std::int64_t step = 1;
    for (int d = kDims - 1; d >= 0; --d) {
      params.score_stride[2 + d] = step;
      step *= params.count[d];
    }
    params.score_stride[1] = step;
    params.score_stride[0] = step * params.groups;
  }
  run_forward(params, x);
  if (params.reduced) finish(params, result);
  return result;
}

// Where the kernel is to put the gradients to the images. The score is symmetric: the kernel's y is
// the image whose gradient is wanted for certain.
Backward backward_of(const Tensor& x, const Tensor& y, const Options& options, const Tensor& grad_x,
                     const Tensor& grad_y, bool wants_x, bool wants_y) {
  Backward params{};
  static_cast<Problem&>(params) = wants_y ? problem_of(x, y, options) : problem_of(y, x, options);
  const Tensor& certain = wants_y ? grad_y : grad_x;
  params.grad_dtype = dtype_of(certain);
  params.grad_image[1] = certain.mutable_data_ptr();
  describe_image(certain, params.grad_image_stride[1]);
  if (wants_x && wants_y) {
    params.grad_image[0] = grad_x.mutable_data_ptr();
    describe_image(grad_x, params.grad_image_stride[0]);
  }
  cut_backward(&params);
  return params;
}

std::tuple<Tensor, Tensor> backward(const Tensor& x, const Tensor& y, const Options& options,
                                    const Tensor& grad, bool wants_x, bool wants_y) {
  Tensor grad_x = gradient_like(x, wants_x), grad_y = gradient_like(y, wants_y);
  if (x.numel() == 0 || !(wants_x || wants_y)) return {grad_x, grad_y};
  Backward params = backward_of(x, y, options, grad_x, grad_y, wants_x, wants_y);

  const std::vector<std::int64_t> sizes = score_sizes(params, x, options.joint);
  bool fits = grad.dim() == (params.reduced ? 1 : std::int64_t(sizes.size()));
  for (std::int64_t d = 0; fits && d < grad.dim(); ++d) fits = grad.size(d) == sizes[d];
  STD_TORCH_CHECK(
      fits && grad.scalar_type() == (params.reduced ? compute_dtype(x) : x.scalar_type()),
      "pncc: the gradient must have the shape and dtype of the result");
  params.grad = grad.const_data_ptr();
  params.score_stride[0] = grad.stride(0);
  if (!params.reduced) {
    const std::int64_t first = options.joint ? 1 : 2;
    if (!options.joint) params.score_stride[1] = grad.stride(1);
    for (std::int64_t d = first; d < grad.dim(); ++d)
      params.score_stride[2 + kDims - (grad.dim() - first) + (d - first)] = grad.stride(d);
  }
  run_backward(params, x);
  return {grad_x, grad_y};
}

// The sums or means, and their gradients in the dtype of the arithmetic.
std::tuple<Tensor, Tensor, Tensor> with_gradients(const Tensor& x, const Tensor& y,
                                                  const Options& options, bool wants_x,
                                                  bool wants_y) {
  const Problem problem = problem_of(x, y, options);
  STD_TORCH_CHECK(problem.reduced && (wants_x || wants_y),
                  "pncc: gradients come with sums and means, if any is wanted");
  Tensor sums = empty_sums(problem, x);
  const ScalarType wide = compute_dtype(x);
  const Tensor grad_x = gradient_like(x, wants_x, wide), grad_y = gradient_like(y, wants_y, wide);
  if (x.numel() == 0)
    return {torch::stable::fill_(sums, score_of_nothing(problem, options)), grad_x, grad_y};
  Backward params = backward_of(x, y, options, grad_x, grad_y, wants_x, wants_y);
  const Tensor partial = empty_vector(x, params.tasks(), ScalarType::Double);
  params.partial = static_cast<double*>(partial.mutable_data_ptr());
  params.sums = sums.mutable_data_ptr();
  run_backward(params, x);
  finish(params, sums);
  return {sums, grad_x, grad_y};
}

Options patch_options(const Tensor& x, const std::vector<std::int64_t>& patch_size,
                      const std::vector<std::int64_t>& stride, const Text& channels, double eps,
                      const Text& reduction) {
  return {for_each_dimension(patch_size, x),
          for_each_dimension(stride, x),
          for_each_dimension({0}, x),
          false,
          channels == "joint",
          eps,
          0.0,
          reduction};
}

Options window_options(const Tensor& x, std::int64_t kernel_size, double smooth_nr,
                       double smooth_dr, const Text& reduction) {
  return {for_each_dimension({kernel_size}, x),
          for_each_dimension({1}, x),
          for_each_dimension({kernel_size / 2}, x),
          true,
          false,
          smooth_dr,
          smooth_nr,
          reduction};
}

}  // namespace

Tensor pncc_op(const Tensor& x, const Tensor& y, const std::vector<std::int64_t>& patch_size,
               const std::vector<std::int64_t>& stride, const Text& channels, double eps,
               const Text& reduction) {
  return forward(x, y, patch_options(x, patch_size, stride, channels, eps, reduction));
}

std::tuple<Tensor, Tensor> pncc_backward_op(const Tensor& x, const Tensor& y,
                                            const std::vector<std::int64_t>& patch_size,
                                            const std::vector<std::int64_t>& stride,
                                            const Text& channels, double eps, const Text& reduction,
                                            const Tensor& grad, bool wants_x, bool wants_y) {
  return backward(x, y, patch_options(x, patch_size, stride, channels, eps, reduction), grad,
                  wants_x, wants_y);
}

std::tuple<Tensor, Tensor, Tensor> pncc_with_gradients_op(
    const Tensor& x, const Tensor& y, const std::vector<std::int64_t>& patch_size,
    const std::vector<std::int64_t>& stride, const Text& channels, double eps,
    const Text& reduction, bool wants_x, bool wants_y) {
  return with_gradients(x, y, patch_options(x, patch_size, stride, channels, eps, reduction),
                        wants_x, wants_y);
}

Tensor lncc_op(const Tensor& x, const Tensor& y, std::int64_t kernel_size, double smooth_nr,
               double smooth_dr, const Text& reduction) {
  return forward(x, y, window_options(x, kernel_size, smooth_nr, smooth_dr, reduction));
}

std::tuple<Tensor, Tensor> lncc_backward_op(const Tensor& x, const Tensor& y,
                                            std::int64_t kernel_size, double smooth_nr,
                                            double smooth_dr, const Text& reduction,
                                            const Tensor& grad, bool wants_x, bool wants_y) {
  return backward(x, y, window_options(x, kernel_size, smooth_nr, smooth_dr, reduction), grad,
                  wants_x, wants_y);
}

std::tuple<Tensor, Tensor, Tensor> lncc_with_gradients_op(const Tensor& x, const Tensor& y,
                                                          std::int64_t kernel_size,
                                                          double smooth_nr, double smooth_dr,
                                                          const Text& reduction, bool wants_x,
                                                          bool wants_y) {
  return with_gradients(x, y, window_options(x, kernel_size, smooth_nr, smooth_dr, reduction),
                        wants_x, wants_y);
}

}  // namespace geco
