#include "include/pncc.h"

#include <algorithm>
#include <optional>

#include "strided.h"

namespace geco::test {
namespace {

using pncc::kDims;
using pncc::Problem;

struct Shape {
  std::int64_t batch, groups, channels;
  std::int64_t size[kDims], patch[kDims], stride[kDims], pad[kDims];
};
// One to three dimensions, patches of one value to the whole image, with and without overlap, more
// channels than are staged together, pixels in no patch, patches with padding alone beside a pixel.
constexpr Shape kShapes[] = {
    {1, 1, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}},
    {2, 2, 1, {1, 1, 5}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}},
    {2, 1, 3, {1, 1, 67}, {1, 1, 7}, {1, 1, 1}, {0, 0, 0}},
    {1, 3, 1, {1, 1, 41}, {1, 1, 41}, {1, 1, 1}, {0, 0, 0}},
    {1, 1, 2, {1, 1, 59}, {1, 1, 4}, {1, 1, 9}, {0, 0, 0}},
    {2, 2, 1, {1, 1, 33}, {1, 1, 5}, {1, 1, 1}, {0, 0, 2}},
    {1, 1, 1, {1, 11, 37}, {1, 8, 8}, {1, 1, 1}, {0, 0, 0}},
    {2, 1, 5, {1, 7, 19}, {1, 3, 2}, {1, 2, 3}, {0, 0, 0}},
    {1, 2, 1, {1, 9, 10}, {1, 9, 10}, {1, 1, 1}, {0, 0, 0}},
    {1, 2, 1, {1, 10, 21}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}},
    {1, 1, 1, {1, 2, 3}, {1, 4, 4}, {1, 1, 1}, {0, 2, 2}},
    {1, 1, 2, {1, 13, 9}, {1, 1, 6}, {1, 4, 1}, {0, 0, 0}},
    {2, 1, 1, {5, 6, 18}, {2, 3, 4}, {1, 1, 1}, {0, 0, 0}},
    {1, 1, 2, {7, 5, 9}, {2, 1, 3}, {3, 2, 2}, {0, 0, 0}},
    {1, 2, 1, {4, 5, 6}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
    {1, 1, 9, {3, 4, 5}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}},
    {1, 1, 1, {3, 5, 7}, {3, 5, 7}, {1, 1, 1}, {0, 0, 0}},
};

Space image_space(const Shape& s) {
  return {5, {s.batch, s.groups * s.channels, s.size[0], s.size[1], s.size[2]}};
}
Space score_space(const Problem& p) {
  return {5, {p.batch, p.groups, p.count[0], p.count[1], p.count[2]}};
}

// The index of an element of five dimensions.
std::int64_t index_of(const Space& space, std::int64_t b, std::int64_t c, std::int64_t z,
                      std::int64_t r, std::int64_t i) {
  const auto& n = space.size;
  return (((b * n[1] + c) * n[2] + z) * n[3] + r) * n[4] + i;
}

Problem problem_of(const Shape& shape, DType dtype, bool squared, bool reduced) {
  Problem p{};
  p.dtype = dtype;
  p.squared = squared;
  p.reduced = reduced;
  p.scale = reduced ? 0.25 : 1;
  p.eps = squared ? 0x1p-4 : 1e-2;  // low scores stay within float16
  p.smooth = squared ? 0.125 : 0;
  p.batch = shape.batch;
  p.groups = shape.groups;
  p.channels = shape.channels;
  for (int d = 0; d < kDims; ++d) {
    p.size[d] = shape.size[d];
    p.patch[d] = shape.patch[d];
    p.pad[d] = shape.pad[d];
    p.count[d] = (p.size[d] + 2 * p.pad[d] - p.patch[d]) / shape.stride[d] + 1;
    p.stride[d] = p.count[d] == 1 ? p.patch[d] : shape.stride[d];
  }
  return p;
}

// Tiles of any height and depth; their rows end with whole vectors, or with the total.
void cut(Problem* p, const std::int64_t (&total)[kDims], Random* random) {
  for (int d = 0; d < kDims; ++d) {
    p->tile[d] = 1 + random->below(total[d]);
    if (d == kDims - 1) p->tile[d] = (p->tile[d] + 7) / 8 * 8;
    p->tiles[d] = (total[d] + p->tile[d] - 1) / p->tile[d];
  }
}

// The task that an element of the tiled space belongs to.
std::int64_t task_of(const Problem& p, std::int64_t b, std::int64_t g, std::int64_t z,
                     std::int64_t r, std::int64_t i) {
  const std::int64_t tile =
      (z / p.tile[0] * p.tiles[1] + r / p.tile[1]) * p.tiles[2] + i / p.tile[2];
  return (b * p.groups + g) * p.tiles_per_group() + tile;
}

// Two images.
struct Images {
  Space space;
  Placed x, y;
  const Problem& p;
  double largest = 0;

  Images(const Shape& shape, Problem* problem, Edge edge, Random& random)
      : space(image_space(shape)),
        x(space, problem->dtype, true, edge, random),
        y(space, problem->dtype, true, edge, random),
        p(*problem) {
    const Placed* const placed[2] = {&x, &y};
    x.fill_normal(1, random);
    y.fill_normal(2, random);
    for (int k = 0; k < 2; ++k) {
      problem->image[k] = placed[k]->data();
      for (int d = 0; d < 5; ++d) problem->image_stride[k][d] = placed[k]->stride(d);
      for (std::int64_t i = 0; i < space.numel(); ++i)
        largest = std::max(largest, std::fabs(placed[k]->get(i)));
    }
    x.remember();
    y.remember();
  }
  void expect_untouched() const {
    x.expect_untouched();
    y.expect_untouched();
  }
};

// One patch: its values' places in the image, or -1 in the padding, and what they give.
struct Patch {
  std::vector<std::int64_t> place;
  std::vector<long double> dx, dy;
  Exact score;
  long double a, a_terms, b_x, b_y;  // per unit of the score's gradient
  long double b_x_terms, b_y_terms;

  Patch(const Images& images, std::int64_t b, std::int64_t g, std::int64_t e, std::int64_t w,
        std::int64_t column) {
    const Problem& p = images.p;
    for (std::int64_t c = 0; c < p.channels; ++c)
      for (std::int64_t k = 0; k < p.patch[0] * p.patch[1] * p.patch[2]; ++k) {
        const std::int64_t z = e * p.stride[0] - p.pad[0] + k / p.patch[2] / p.patch[1];
        const std::int64_t r = w * p.stride[1] - p.pad[1] + k / p.patch[2] % p.patch[1];
        const std::int64_t i = column * p.stride[2] - p.pad[2] + k % p.patch[2];
        const bool inside =
            z >= 0 && z < p.size[0] && r >= 0 && r < p.size[1] && i >= 0 && i < p.size[2];
        place.push_back(inside ? index_of(images.space, b, g * p.channels + c, z, r, i) : -1);
        dx.push_back(inside ? images.x.get(place.back()) : 0);
        dy.push_back(inside ? images.y.get(place.back()) : 0);
      }
    const std::size_t n = place.size();
    // Patches of equal values must be centred to zero exactly.
    const long double first_x = dx[0], first_y = dy[0];
    long double mean_x = 0, mean_y = 0;
    for (std::size_t k = 0; k < n; ++k) {
      dx[k] -= first_x;
      dy[k] -= first_y;
    }
    for (std::size_t k = 0; k < n; ++k) {
      mean_x += dx[k] / (long double)(n);
      mean_y += dy[k] / (long double)(n);
    }
    // Sums of values that aren't centred are kept with 29 and more bits to spare.
    long double covariance = 0, vx = 0, vy = 0;
    long double size = 0x1p-26L * (long double)(n)*images.largest * images.largest;
    for (std::size_t k = 0; k < n; ++k) {
      dx[k] -= mean_x;
      dy[k] -= mean_y;
      covariance += dx[k] * dy[k];
      size += std::fabs(dx[k] * dy[k]);
      vx += dx[k] * dx[k];
      vy += dy[k] * dy[k];
    }
    if (p.squared) {
      const long double x = std::max<long double>(vx, p.eps), y = std::max<long double>(vy, p.eps);
      score = {(covariance * covariance + p.smooth) / (x * y), (size * size + p.smooth) / (x * y)};
      a = 2 * covariance / (x * y);
      a_terms = 2 * size / (x * y);
      b_x = vx > p.eps ? 2 * score.value / x : 0;
      b_y = vy > p.eps ? 2 * score.value / y : 0;
      b_x_terms = 2 * score.terms / x;
      b_y_terms = 2 * score.terms / y;
    } else {
      const long double x = vx + p.eps, y = vy + p.eps, both = std::sqrt(x * y);
      score = {covariance / both, size / both};
      a = a_terms = 1 / both;
      b_x = score.value / x;
      b_y = score.value / y;
      b_x_terms = score.terms / x;
      b_y_terms = score.terms / y;
    }
  }
};

// Calls visit(b, g, e, w, i) for every patch.
template <class Visit>
void each_patch(const Problem& p, Visit visit) {
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t g = 0; g < p.groups; ++g)
      for (std::int64_t e = 0; e < p.count[0]; ++e)
        for (std::int64_t w = 0; w < p.count[1]; ++w)
          for (std::int64_t i = 0; i < p.count[2]; ++i) visit(b, g, e, w, i);
}

// Runs some of the tasks first, then the others; `compare` is told which have been run.
template <class Kernel, class Compare>
void run_in_parts(const Problem& p, std::int64_t doubles, Edge edge, Random* random, Kernel kernel,
                  Compare compare) {
  const std::int64_t tasks = p.tasks();
  const std::int64_t begin = random->below(tasks), end = begin + 1 + random->below(tasks - begin);
  const auto run = [&](std::int64_t from, std::int64_t to) {
    const Guarded scratch(std::size_t(doubles) * sizeof(double), edge);
    kernel(from, to, reinterpret_cast<double*>(scratch.data()));
  };
  run(begin, end);
  compare(begin, end);
  run(0, begin);
  run(end, tasks);
  compare(0, tasks);
}

constexpr double kUnits = 8;

// Sums of scores, and where the kernel puts them.
struct Sums {
  Guarded partial, totals;
  std::vector<Exact> exact;

  Sums(pncc::Problem* p, Edge edge)
      : partial(std::size_t(p->tasks()) * sizeof(double), edge),
        totals(std::size_t(p->batch) * size_of(compute_dtype(p->dtype)), edge),
        exact(std::size_t(p->batch)) {
    p->partial = reinterpret_cast<double*>(partial.data());
    p->sums = totals.data();
  }
  void add(const pncc::Problem& p, std::int64_t b, const Exact& score) {
    Exact& sum = exact[std::size_t(b)];
    sum.value += score.value * p.scale;
    sum.terms += score.terms * p.scale;
  }
  void expect_partial(const pncc::Problem& p, std::int64_t begin, std::int64_t end) const {
    for (std::int64_t t = 0; t < p.tasks(); ++t)
      expect(std::isnan(p.partial[t]) == (t < begin || t >= end), "partial sums",
             [&] { return "task " + std::to_string(t); });
  }
  void expect_totals(const cpu::Level& level, const pncc::Problem& p) const {
    level.kernels->pncc_finish(p);
    const DType wide = compute_dtype(p.dtype);
    for (std::int64_t b = 0; b < p.batch; ++b)
      expect_close(wide, decode(wide, totals.data() + std::size_t(b) * size_of(wide)),
                   exact[std::size_t(b)], kUnits, "sums");
  }
};

void check_forward(const cpu::Level& level, const Shape& shape, DType dtype, bool squared,
                   bool reduced, Edge edge, Random* random) {
  pncc::Forward params{problem_of(shape, dtype, squared, reduced)};
  const Images images(shape, &params, edge, *random);
  cut(&params, params.count, random);
  const Space space = score_space(params);
  std::vector<Exact> exact;
  std::optional<Sums> sums;
  if (reduced) sums.emplace(&params, edge);
  each_patch(params,
             [&](std::int64_t b, std::int64_t g, std::int64_t e, std::int64_t w, std::int64_t i) {
               exact.push_back(Patch(images, b, g, e, w, i).score);
               if (sums) sums->add(params, b, exact.back());
             });

  Placed scores(space, dtype, false, edge, *random);
  if (!reduced) {
    params.scores = scores.data();
    for (int d = 0; d < 5; ++d) params.score_stride[d] = scores.stride(d);
  }
  const auto compare = [&](std::int64_t begin, std::int64_t end) {
    if (sums) {
      sums->expect_partial(params, begin, end);
      return;
    }
    std::int64_t k = 0;
    each_patch(params,
               [&](std::int64_t b, std::int64_t g, std::int64_t e, std::int64_t w, std::int64_t i) {
                 const std::int64_t task = task_of(params, b, g, e, w, i);
                 if (task >= begin && task < end) {
                   scores.forget(k);
                   expect_close(dtype, scores.get(k), exact[std::size_t(k)], kUnits, "scores");
                   expect(squared || std::fabs(scores.get(k)) <= 1, "scores past 1",
                          [&] { return number(scores.get(k)); });
                 }
                 ++k;
               });
    scores.expect_untouched();
  };
  scores.remember();
  run_in_parts(
      params, level.kernels->pncc_forward_scratch(params), edge, random,
      [&](std::int64_t begin, std::int64_t end, double* scratch) {
        level.kernels->pncc_forward(params, begin, end, scratch);
      },
      compare);
  images.expect_untouched();
  if (sums) sums->expect_totals(level, params);
}

// Which gradient comes in: of every score, of the sums, or none, for which the sums are made, too.
enum class Incoming { kScores, kSums, kNone };

void check_backward(const cpu::Level& level, const Shape& shape, DType dtype, bool squared,
                    Incoming incoming, unsigned wanted, Edge edge, Random* random) {
  const bool reduced = incoming != Incoming::kScores, alone = incoming == Incoming::kNone;
  pncc::Backward params{problem_of(shape, dtype, squared, reduced)};
  const Images images(shape, &params, edge, *random);
  cut(&params, params.size, random);
  const Space batch{1, {params.batch}};
  Placed upstream(reduced ? batch : score_space(params), reduced ? compute_dtype(dtype) : dtype,
                  true, edge, *random);
  upstream.fill_normal(1, *random);
  upstream.remember();
  if (!alone) params.grad = upstream.data();
  std::optional<Sums> sums;
  if (alone) sums.emplace(&params, edge);
  for (int d = 0; d < (reduced ? 1 : 5); ++d) params.score_stride[d] = upstream.stride(d);

  std::vector<Exact> exact[2];
  for (auto& gradient : exact) gradient.assign(std::size_t(images.space.numel()), {0, 0});
  std::int64_t k = 0;
  each_patch(params,
             [&](std::int64_t b, std::int64_t g, std::int64_t e, std::int64_t w, std::int64_t i) {
               const Patch patch(images, b, g, e, w, i);
               const long double given = alone ? 1 : upstream.get(reduced ? b : k);
               const long double grad = given * params.scale;
               if (sums) sums->add(params, b, patch.score);
               const long double spare = 0x1p-26L * images.largest;
               for (std::size_t q = 0; q < patch.place.size(); ++q) {
                 if (patch.place[q] < 0) continue;
                 const long double dx = patch.dx[q], dy = patch.dy[q];
                 Exact &to_x = exact[0][std::size_t(patch.place[q])],
                       &to_y = exact[1][std::size_t(patch.place[q])];
                 to_x.value += grad * (patch.a * dy - patch.b_x * dx);
                 to_y.value += grad * (patch.a * dx - patch.b_y * dy);
                 to_x.terms += std::fabs(grad) * (patch.a_terms * (std::fabs(dy) + spare) +
                                                  patch.b_x_terms * (std::fabs(dx) + spare));
                 to_y.terms += std::fabs(grad) * (patch.a_terms * (std::fabs(dx) + spare) +
                                                  patch.b_y_terms * (std::fabs(dy) + spare));
               }
               ++k;
             });

  params.grad_dtype = alone ? compute_dtype(dtype) : dtype;
  Placed grads[2] = {Placed(images.space, params.grad_dtype, false, edge, *random),
                     Placed(images.space, params.grad_dtype, false, edge, *random)};
  for (int image = 0; image < 2; ++image) {
    grads[image].remember();
    if (!(wanted >> image & 1)) continue;
    params.grad_image[image] = grads[image].data();
    for (int d = 0; d < 5; ++d) params.grad_image_stride[image][d] = grads[image].stride(d);
  }
  const auto compare = [&](std::int64_t begin, std::int64_t end) {
    for (int image = 0; image < 2; ++image) {
      for (std::int64_t place = 0; wanted >> image & 1 && place < images.space.numel(); ++place) {
        std::int64_t at[5], rest = place;
        for (int d = 4; d >= 0; --d) {
          at[d] = rest % images.space.size[d];
          rest /= images.space.size[d];
        }
        const std::int64_t task =
            task_of(params, at[0], at[1] / params.channels, at[2], at[3], at[4]);
        if (task < begin || task >= end) continue;
        grads[image].forget(place);
        expect_close(params.grad_dtype, grads[image].get(place), exact[image][std::size_t(place)],
                     kUnits, image == 0 ? "gradient to x" : "gradient to y");
      }
      grads[image].expect_untouched();
    }
    if (sums) sums->expect_partial(params, begin, end);
  };
  run_in_parts(
      params, level.kernels->pncc_backward_scratch(params), edge, random,
      [&](std::int64_t begin, std::int64_t end, double* scratch) {
        level.kernels->pncc_backward(params, begin, end, scratch);
      },
      compare);
  images.expect_untouched();
  upstream.expect_untouched();
  if (sums) sums->expect_totals(level, params);
}

template <bool kSquared>
void forward(const cpu::Level& level) {
  Random random(3);
  for (const DType dtype : kDTypes)
    for (const Edge edge : kEdges)
      for (const Shape& shape : kShapes)
        for (const bool reduced : {false, true})
          check_forward(level, shape, dtype, kSquared, reduced, edge, &random);
}

template <bool kSquared>
void backward(const cpu::Level& level) {
  Random random(4);
  for (const DType dtype : kDTypes)
    for (const Edge edge : kEdges)
      for (const Shape& shape : kShapes)
        for (const unsigned wanted : {1u, 2u, 3u})
          check_backward(level, shape, dtype, kSquared,
                         random.one_in(3)   ? Incoming::kNone
                         : random.one_in(4) ? Incoming::kSums
                                            : Incoming::kScores,
                         wanted, edge, &random);
}

const Register tests[] = {{"pncc_forward", forward<false>},
                          {"pncc_backward", backward<false>},
                          {"lncc_forward", forward<true>},
                          {"lncc_backward", backward<true>}};

}  // namespace
}  // namespace geco::test
