#include "include/conv_lstm.h"

#include <algorithm>
#include <cstring>

#include "harness.h"

namespace geco::test {
namespace {

using conv_lstm::Geometry;
using conv_lstm::Image;
using conv_lstm::kGroup;
using conv_lstm::Planes;

constexpr std::int64_t kPanel = 2 * kGroup;
// How far a result may be off, relative to its size, both in the Frobenius norm.
constexpr long double kBound = 2e-5L;

// Output channels are `out` for each of the gates, or for the one block of a convolution.
struct Shape {
  int kernel, outputs;
  std::int64_t height, width, batch, first, second, out;
};
// Every form, one tile and many, tiles that stick out, whole groups and parts of one, panels that
// are half full, more than 64 output slots, more tiles than a panel has columns.
constexpr Shape kConvolutions[] = {
    {3, 4, 1, 1, 1, 1, 0, 1},   {3, 6, 1, 1, 3, 5, 0, 17},  {5, 4, 1, 1, 1, 33, 0, 5},
    {7, 2, 1, 1, 3, 16, 0, 1},  {3, 4, 3, 5, 3, 33, 0, 1},  {3, 6, 3, 5, 1, 17, 0, 16},
    {5, 4, 3, 5, 1, 1, 0, 33},  {7, 2, 3, 5, 3, 5, 0, 33},  {3, 4, 8, 8, 1, 16, 0, 65},
    {3, 6, 8, 8, 3, 1, 0, 33},  {5, 4, 8, 8, 3, 17, 0, 17}, {7, 2, 8, 8, 1, 17, 0, 5},
    {3, 4, 13, 9, 3, 5, 0, 5},  {3, 6, 13, 9, 1, 33, 0, 1}, {5, 4, 13, 9, 1, 5, 0, 81},
    {7, 2, 13, 9, 1, 16, 0, 16}};
// The same of two sources, the first of which may be absent.
constexpr Shape kSteps[] = {
    {3, 4, 1, 1, 3, 16, 33, 33}, {3, 6, 1, 1, 1, 33, 1, 1},  {5, 4, 1, 1, 1, 0, 1, 1},
    {7, 2, 1, 1, 3, 1, 5, 5},    {3, 4, 3, 5, 1, 5, 16, 16}, {3, 6, 3, 5, 1, 0, 5, 5},
    {5, 4, 3, 5, 3, 1, 17, 17},  {7, 2, 3, 5, 3, 0, 16, 16}, {3, 6, 8, 8, 3, 17, 1, 1},
    {5, 4, 8, 8, 1, 33, 5, 5},   {7, 2, 8, 8, 1, 5, 17, 17}, {3, 4, 13, 9, 3, 0, 17, 17},
    {3, 6, 13, 9, 1, 1, 16, 16}, {5, 4, 13, 9, 3, 17, 5, 5}, {7, 2, 13, 9, 1, 0, 5, 5}};

Geometry geometry_of(const Shape& s) {
  Geometry g{};
  g.batch = s.batch;
  g.height = s.height;
  g.width = s.width;
  g.kernel = s.kernel;
  g.outputs = s.outputs;
  g.tiles_y = (s.height + s.outputs - 1) / s.outputs;
  g.tiles_x = (s.width + s.outputs - 1) / s.outputs;
  g.in[0] = {s.first, 1};
  g.in[1] = {s.second, 1};
  g.out = {s.out, s.second > 0 ? 4 : 1};
  return g;
}

std::int64_t pixels_of(const Geometry& g) { return g.batch * g.height * g.width; }
std::int64_t taps_of(const Geometry& g) { return std::int64_t(g.kernel) * g.kernel; }
std::int64_t points_of(const Geometry& g) { return std::int64_t(g.points()) * g.points(); }
std::int64_t tiles_of(const Geometry& g) { return g.batch * g.tiles_per_image(); }
std::int64_t in_channels(const Geometry& g) { return g.in[0].channels + g.in[1].channels; }
std::int64_t out_channels(const Geometry& g) { return g.out.channels * g.out.blocks; }

using Values = std::vector<float>;        // of a weight, a bias, or [pixels, channels]
using Exacts = std::vector<long double>;  // what they should be

Values normal(std::int64_t count, double scale, Random* random) {
  Values values(std::size_t(count), 0.0f);
  for (float& value : values) value = float(scale * random->normal());
  return values;
}

// Floats at a guard page, NaN where no values are given.
class Floats {
 public:
  Floats(std::int64_t count, Edge edge) : memory_(std::size_t(count) * sizeof(float), edge) {}
  Floats(const Values& values, Edge edge) : Floats(std::int64_t(values.size()), edge) {
    std::copy(values.begin(), values.end(), data());
  }
  float* data() const { return reinterpret_cast<float*>(memory_.data()); }
  float* end() const { return data() + memory_.bytes() / sizeof(float); }
  Values values() const { return Values(data(), end()); }

 private:
  Guarded memory_;
};

bool is_poison(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits == 0xffffffffu;
}
const float kPoison = [] {
  const std::uint32_t bits = 0xffffffffu;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}();

void expect_poison(const float* begin, const float* end, const char* what) {
  expect(std::all_of(begin, end, is_poison), "write to what isn't its own",
         [&] { return std::string(what) + ": memory in between has changed"; });
}

// How an image lies in memory: pixels, rows and images in order or not, and gaps among them, which
// are NaN. Those of an input may all be one.
class Layout {
 public:
  Layout(const Geometry& g, std::int64_t channels, bool input, Random* random)
      : channels_(channels), size_{g.batch, g.height, g.width} {
    int order[3] = {2, 1, 0};
    if (random->one_in(3))
      for (int d = 2; d > 0; --d) std::swap(order[d], order[random->below(d + 1)]);
    std::int64_t next = channels, last = 0;
    for (const int d : order) {
      if (input && random->one_in(8)) continue;
      if (random->one_in(2)) next += random->below(20);
      step_[d] = next;
      last += next * (size_[d] - 1);
      next *= size_[d];
    }
    if (channels > 0) extent_ = last + channels;
  }

  std::int64_t channels() const { return channels_; }
  std::int64_t pixels() const { return size_[0] * size_[1] * size_[2]; }
  std::int64_t extent() const { return extent_; }
  std::int64_t offset(std::int64_t pixel) const {
    return pixel % size_[2] * step_[2] + pixel / size_[2] % size_[1] * step_[1] +
           pixel / size_[2] / size_[1] * step_[0];
  }
  Image image(float* data) const {
    return {channels_ > 0 ? data : nullptr, channels_, {step_[0], step_[1], step_[2]}};
  }

 private:
  std::int64_t channels_, size_[3], step_[3] = {}, extent_ = 0;
};

// An image to read, with gaps that are NaN.
struct Input {
  Layout layout;
  Values content;

  Input(const Geometry& g, std::int64_t channels, Random* random)
      : layout(g, channels, true, random), content(std::size_t(layout.extent()), kPoison) {
    for (std::int64_t pixel = 0; pixel < layout.pixels(); ++pixel)
      for (std::int64_t c = 0; c < channels; ++c)
        content[std::size_t(layout.offset(pixel) + c)] = float(random->normal());
  }
  long double get(std::int64_t pixel, std::int64_t channel) const {
    return content[std::size_t(layout.offset(pixel) + channel)];
  }
};

class PlacedInput {
 public:
  PlacedInput(const Input& input, Edge edge) : input_(input), memory_(input.content, edge) {}
  ~PlacedInput() {
    const std::size_t bytes = input_.content.size() * sizeof(float);
    expect(bytes == 0 || std::memcmp(memory_.data(), input_.content.data(), bytes) == 0,
           "write to an input", [] { return std::string("an image has changed"); });
  }
  Image image() const { return input_.layout.image(memory_.data()); }

 private:
  const Input& input_;
  Floats memory_;
};

// An image to write, NaN or, to be added to, zeros.
class Output {
 public:
  Output(const Layout& layout, bool zeros, Edge edge)
      : layout_(layout), memory_(layout.extent(), edge) {
    if (zeros) each([](float* value) { *value = 0; });
  }
  Image image() const { return layout_.image(memory_.data()); }
  // Everything that was written, once.
  Values take() {
    Values values;
    each([&](float* value) {
      values.push_back(*value);
      *value = kPoison;
    });
    expect_poison(memory_.data(), memory_.end(), "an image");
    return values;
  }

 private:
  template <class Visit>
  void each(Visit visit) const {
    for (std::int64_t pixel = 0; pixel < layout_.pixels(); ++pixel)
      for (std::int64_t c = 0; c < layout_.channels(); ++c)
        visit(memory_.data() + layout_.offset(pixel) + c);
  }

  const Layout& layout_;
  Floats memory_;
};

// Tiles at the points, with room for more of them than there are and gaps among panels and planes.
class Workspace {
 public:
  Workspace(const Geometry& g, std::int64_t panels, std::int64_t tiles, Edge edge, Random* random)
      : panels_(panels),
        points_(points_of(g)),
        panel_step_((tiles + random->below(2)) * kPanel),
        plane_step_((panels * panel_step_) + random->below(2) * kPanel),
        memory_((points_ - 1) * plane_step_ + (panels - 1) * panel_step_ + tiles * kPanel, edge) {}
  Planes planes() const { return {memory_.data(), panel_step_, plane_step_}; }
  // Nothing but so many tiles may have been written.
  void expect_only(std::int64_t tiles) const {
    for (std::int64_t point = 0; point < points_; ++point)
      for (std::int64_t panel = 0; panel < panels_; ++panel) {
        const float* from = memory_.data() + point * plane_step_ + panel * panel_step_;
        const float* next = panel + 1 < panels_   ? from + panel_step_
                            : point + 1 < points_ ? memory_.data() + (point + 1) * plane_step_
                                                  : memory_.end();
        expect_poison(from + tiles * kPanel, next, "tiles");
      }
  }

 private:
  std::int64_t panels_, points_, panel_step_, plane_step_;
  Floats memory_;
};

// Runs all tasks at once at the one edge, and the later ones first at the other.
template <class Run>
void share_out(std::int64_t tasks, Edge edge, Random* random, Run run) {
  const std::int64_t middle = edge == Edge::kEnd ? 0 : random->below(tasks + 1);
  run(middle, tasks);
  run(0, middle);
}

// Calls visit(output pixel, input pixel, tap) for each pair that a tap connects.
template <class Visit>
void each_tap(const Geometry& g, Visit visit) {
  for (std::int64_t pixel = 0; pixel < pixels_of(g); ++pixel)
    for (std::int64_t tap = 0; tap < taps_of(g); ++tap) {
      const std::int64_t down = tap / g.kernel - g.kernel / 2,
                         right = tap % g.kernel - g.kernel / 2;
      const std::int64_t y = pixel / g.width % g.height + down, x = pixel % g.width + right;
      if (y < 0 || y >= g.height || x < 0 || x >= g.width) continue;
      visit(pixel, pixel + down * g.width + right, tap);
    }
}

// The operands of a convolution, or of a step.
struct Problem {
  const Geometry g;
  const Input source[2];
  const Values weight, bias;

  Problem(const Shape& shape, Random* random)
      : g(geometry_of(shape)),
        source{Input(g, g.in[0].channels, random), Input(g, g.in[1].channels, random)},
        weight(normal(out_channels(g) * in_channels(g) * taps_of(g),
                      1.5 / std::sqrt(double(in_channels(g) * taps_of(g))), random)),
        bias(normal(out_channels(g), 1, random)) {}

  // Of both sources together.
  long double input(std::int64_t pixel, std::int64_t c) const {
    return c < g.in[0].channels ? source[0].get(pixel, c)
                                : source[1].get(pixel, c - g.in[0].channels);
  }
  std::size_t place(std::int64_t out, std::int64_t in, std::int64_t tap) const {
    return std::size_t((out * in_channels(g) + in) * taps_of(g) + tap);
  }
  // [pixels, out]
  Exacts convolution() const {
    const std::int64_t in = in_channels(g), out = out_channels(g);
    Exacts result(std::size_t(pixels_of(g) * out), 0);
    each_tap(g, [&](std::int64_t to, std::int64_t from, std::int64_t tap) {
      for (std::int64_t c = 0; c < in; ++c) {
        const long double value = input(from, c);
        for (std::int64_t o = 0; o < out; ++o)
          result[std::size_t(to * out + o)] += weight[place(o, c, tap)] * value;
      }
    });
    return result;
  }
  // All tiles at once, an image after the other, or a part of one.
  std::int64_t part(int choice, Random* random) const {
    const std::int64_t image = g.tiles_per_image();
    return choice == 0 ? tiles_of(g) : choice == 1 ? image : 1 + random->below(image);
  }
  // What stands for pixels outside of the image.
  Values zeros() const {
    const std::int64_t most =
        std::max({g.in[0].channels, g.in[1].channels, out_channels(g)}) + kGroup;
    return Values(std::size_t(most), 0.0f);
  }
  std::string name() const {
    std::string text =
        "kernel " + std::to_string(g.kernel) + ", outputs " + std::to_string(g.outputs) + ", image";
    for (const std::int64_t size : {g.batch, g.height, g.width}) text += " " + std::to_string(size);
    return text + ", channels " + std::to_string(g.in[0].channels) + " and " +
           std::to_string(g.in[1].channels) + " to " + std::to_string(out_channels(g));
  }
  // NaN never passes.
  void expect_near(const Values& got, const Exacts& exact, const char* what) const {
    long double off = 0, size = 0;
    for (std::size_t k = 0; k < exact.size(); ++k) {
      off += (got[k] - exact[k]) * (got[k] - exact[k]);
      size += exact[k] * exact[k];
    }
    expect(got.size() == exact.size() && std::sqrt(off) <= kBound * std::sqrt(size), what,
           [&] { return name() + ": off by " + number(double(std::sqrt(off / size))); });
  }
  void expect_same(const Values& got, const Values& before, const char* what) const {
    const bool same = got.size() == before.size() &&
                      std::memcmp(got.data(), before.data(), got.size() * sizeof(float)) == 0;
    expect(same, what, [&] { return name() + ": depends on how tasks are shared out"; });
  }
};

struct Transformed {
  Floats weight, transformed, transposed;

  Transformed(const cpu::Kernels& kernels, const Problem& p, bool backward, Edge edge,
              Random* random)
      : weight(p.weight, edge),
        transformed(points_of(p.g) * p.g.weight_step(), edge),
        transposed(backward ? points_of(p.g) * p.g.transposed_step() : 0, edge) {
    share_out(p.g.out.groups(), edge, random, [&](std::int64_t begin, std::int64_t end) {
      kernels.winograd_weight({p.g, weight.data(), transformed.data()}, begin, end);
    });
    share_out(
        backward ? p.g.in_groups() : 0, edge, random, [&](std::int64_t begin, std::int64_t end) {
          kernels.winograd_weight_transposed({p.g, weight.data(), transposed.data()}, begin, end);
        });
    expect(weight.values() == p.weight, "write to an input",
           [] { return std::string("the weight has changed"); });
  }
};

void expect_finite(std::int32_t not_finite) {
  expect(not_finite == 0, "finite values", [] { return std::string("are said not to be"); });
}

// Products and what follows, of all tiles; `params` has the operands.
void run_forward(const cpu::Kernels& kernels, const Problem& p, conv_lstm::Forward params,
                 std::int64_t part, Edge edge, Random* random) {
  const Geometry& g = p.g;
  const Transformed weight(kernels, p, false, edge, random);
  const PlacedInput first(p.source[0], edge), second(p.source[1], edge);
  const Floats zeros(p.zeros(), edge);
  params.geometry = g;
  params.transformed = weight.transformed.data();
  std::int32_t not_finite = 0;
  params.not_finite = &not_finite;
  for (std::int64_t begin = 0; begin < tiles_of(g); begin += part) {
    const Workspace inputs(g, g.in_panels(), part, edge, random);
    const conv_lstm::Tiles tiles{
        g, {first.image(), second.image()}, zeros.data(), begin, inputs.planes()};
    params.first = begin;
    params.count = std::min(part, tiles_of(g) - begin);
    params.block = 1 + random->below(params.count);
    params.inputs = inputs.planes();
    share_out(params.count, edge, random,
              [&](std::int64_t from, std::int64_t to) { kernels.winograd_input(tiles, from, to); });
    share_out(params.tasks(), edge, random, [&](std::int64_t from, std::int64_t to) {
      const Floats scratch(kernels.winograd_forward_scratch(params), edge);
      kernels.winograd_forward(params, from, to, scratch.data());
    });
    inputs.expect_only(params.count);
  }
  expect_finite(not_finite);
}

void convolution_forward(const cpu::Level& level) {
  Random random(6);
  for (const Shape& shape : kConvolutions) {
    const Problem p(shape, &random);
    const std::int64_t out = out_channels(p.g);
    Exacts exact[2] = {p.convolution(), {}};  // without and with the bias
    for (const long double value : exact[0])
      exact[1].push_back(value + p.bias[exact[1].size() % std::size_t(out)]);
    Values before[2];
    for (int choice = 0; choice < 6; ++choice) {
      const bool biased = choice % 2;
      for (const Edge edge : kEdges) {
        const Layout layout(p.g, out, false, &random);
        const Floats bias(p.bias, edge);
        Output result(layout, false, edge);
        conv_lstm::Forward params{};
        if (biased) params.bias = bias.data();
        params.result = result.image();
        run_forward(*level.kernels, p, params, p.part(choice / 2, &random), edge, &random);
        const Values got = result.take();
        p.expect_near(got, exact[biased], "convolution");
        Values& first = before[biased];
        if (first.empty()) first = got;
        p.expect_same(got, first, "convolution");
      }
    }
  }
}

long double sigmoid(long double x) { return 1 / (1 + std::exp(-x)); }

void step_forward(const cpu::Level& level) {
  constexpr double kForgetBias = 0.75;
  enum { kProjection = 1, kGates = 2, kBias = 4 };
  Random random(7);
  for (const Shape& shape : kSteps) {
    const Problem p(shape, &random);
    const Exacts convolution = p.convolution();
    const std::int64_t channels = p.g.out.channels, out = 4 * channels;
    const Input projection(p.g, out, &random), c(p.g, channels, &random);
    for (unsigned options = 0; options < 8; ++options) {
      Exacts u = convolution, h_next, c_next;
      for (std::int64_t pixel = 0; pixel < pixels_of(p.g); ++pixel) {
        long double* at = u.data() + pixel * out;
        for (std::int64_t k = 0; k < out; ++k) {
          if (options & kBias) at[k] += p.bias[std::size_t(k)];
          if (options & kProjection) at[k] += projection.get(pixel, k);
        }
        for (std::int64_t k = 0; k < channels; ++k, ++at) {
          c_next.push_back(sigmoid(at[channels] + kForgetBias) * c.get(pixel, k) +
                           sigmoid(at[0]) * std::tanh(at[2 * channels]));
          h_next.push_back(sigmoid(at[3 * channels]) * std::tanh(c_next.back()));
        }
      }
      Values before[3];
      for (const Edge edge : kEdges) {
        const Layout hidden(p.g, channels, false, &random), cell(p.g, channels, false, &random);
        const Layout wide(p.g, out, false, &random);
        const PlacedInput placed_c(c, edge), placed_projection(projection, edge);
        const Floats bias(p.bias, edge);
        Output placed[] = {Output(hidden, false, edge), Output(cell, false, edge),
                           Output(wide, false, edge)};
        conv_lstm::Forward params{};
        params.forget_bias = kForgetBias;
        params.c = placed_c.image();
        params.h_next = placed[0].image();
        params.c_next = placed[1].image();
        if (options & kGates) params.gates = placed[2].image();
        if (options & kProjection) params.projection = placed_projection.image();
        if (options & kBias) params.bias = bias.data();
        run_forward(*level.kernels, p, params, p.part(int(options % 3), &random), edge, &random);
        const Exacts* const exact[] = {&h_next, &c_next, &u};
        const char* const names[] = {"h_next", "c_next", "gates"};
        for (int k = 0; k < (options & kGates ? 3 : 2); ++k) {
          const Values got = placed[k].take();
          p.expect_near(got, *exact[k], names[k]);
          if (edge == kEdges[0]) before[k] = got;
          p.expect_same(got, before[k], names[k]);
        }
      }
    }
  }
}

// Gradients to both sources, [pixels, channels], to the weight and to the bias.
struct Gradients {
  Exacts source[2], weight, bias;

  Gradients(const Problem& p, const Input& grad)
      : weight(p.weight.size(), 0), bias(p.bias.size(), 0) {
    const Geometry& g = p.g;
    const std::int64_t first = g.in[0].channels, second = g.in[1].channels;
    const std::int64_t out = out_channels(g);
    source[0].resize(std::size_t(pixels_of(g) * first));
    source[1].resize(std::size_t(pixels_of(g) * second));
    each_tap(g, [&](std::int64_t to, std::int64_t from, std::int64_t tap) {
      for (std::int64_t c = 0; c < first + second; ++c) {
        const long double value = p.input(from, c);
        long double sum = 0;
        for (std::int64_t o = 0; o < out; ++o) {
          const std::size_t place = p.place(o, c, tap);
          const long double given = grad.get(to, o);
          sum += p.weight[place] * given;
          weight[place] += value * given;
        }
        (c < first ? source[0][std::size_t(from * first + c)]
                   : source[1][std::size_t(from * second + c - first)]) += sum;
      }
    });
    for (std::int64_t pixel = 0; pixel < pixels_of(g); ++pixel)
      for (std::int64_t o = 0; o < out; ++o) bias[std::size_t(o)] += grad.get(pixel, o);
  }
};

enum Wanted { kFirst = 1, kSecond = 2, kWeight = 4, kBias = 8 };

// Adds the gradients of all tiles up, as they are wanted.
void run_backward(const cpu::Kernels& kernels, const Problem& p, const Transformed& weight,
                  const Input& grad, unsigned wanted, std::int64_t part, Edge edge, Random* random,
                  const Image* grad_image, float* grad_transformed, float* grad_bias) {
  const Geometry& g = p.g;
  const PlacedInput upstream(grad, edge), first(p.source[0], edge), second(p.source[1], edge);
  const Floats zeros(p.zeros(), edge);
  for (std::int64_t begin = 0; begin < tiles_of(g); begin += part) {
    const std::int64_t count = std::min(part, tiles_of(g) - begin);
    const Workspace grads(g, g.out_panels(), part, edge, random);
    const Workspace inputs(g, g.in_panels(), part, edge, random);
    const conv_lstm::Tiles from_grad{
        g, {upstream.image(), {}}, zeros.data(), begin, grads.planes()};
    const conv_lstm::Tiles from_inputs{
        g, {first.image(), second.image()}, zeros.data(), begin, inputs.planes()};
    share_out(count, edge, random, [&](std::int64_t from, std::int64_t to) {
      kernels.winograd_gradient(from_grad, from, to);
    });
    if (wanted & (kFirst | kSecond)) {
      const std::int64_t images = 1 + random->below(g.batch);
      const std::int64_t share = std::min(count, images * g.tiles_per_image());
      std::int32_t not_finite = 0;
      conv_lstm::BackwardInput params{g,
                                      begin,
                                      count,
                                      share,
                                      1 + random->below(share),
                                      grads.planes(),
                                      weight.transposed.data(),
                                      {},
                                      &not_finite};
      for (int k = 0; k < 2; ++k)
        if (wanted >> k & 1) params.grad_image[k] = grad_image[k];
      share_out(params.tasks(), edge, random, [&](std::int64_t from, std::int64_t to) {
        const Floats scratch(kernels.winograd_backward_input_scratch(params), edge);
        kernels.winograd_backward_input(params, from, to, scratch.data());
      });
      expect_finite(not_finite);
    }
    if (wanted & kWeight)
      share_out(count, edge, random, [&](std::int64_t from, std::int64_t to) {
        kernels.winograd_input(from_inputs, from, to);
      });
    if (wanted & (kWeight | kBias)) {
      const conv_lstm::BackwardWeight params{g,
                                             count,
                                             inputs.planes(),
                                             grads.planes(),
                                             (count + 1) / 2,
                                             begin > 0,
                                             begin > 0,
                                             wanted & kWeight ? grad_transformed : nullptr,
                                             wanted & kBias ? grad_bias : nullptr};
      share_out(points_of(g) * g.out_panels(), edge, random,
                [&](std::int64_t from, std::int64_t to) {
                  kernels.winograd_backward_weight(params, from, to);
                });
    }
    grads.expect_only(count);
    inputs.expect_only(wanted & kWeight ? count : 0);
  }
}

void check_backward(const cpu::Level& level, const Shape& shape, Random* random) {
  const cpu::Kernels& kernels = *level.kernels;
  const Problem p(shape, random);
  const Geometry& g = p.g;
  const Input grad(g, out_channels(g), random);
  const Gradients exact(p, grad);
  // Each alone, and all but one source or both; each with another choice of parts.
  constexpr unsigned kChoices[] = {15, 15, 15, kFirst | kWeight, kSecond | kBias, kWeight, kBias};
  Values before[2], weight_before, bias_before;
  int choice = 0;
  for (unsigned wanted : kChoices) {
    for (int k = 0; k < 2; ++k)
      if (g.in[k].channels == 0) wanted &= ~(1u << k);
    const std::int64_t part = p.part(choice++ % 3, random);
    for (const Edge edge : kEdges) {
      const Transformed weight(kernels, p, true, edge, random);
      const Layout layouts[] = {Layout(g, g.in[0].channels, false, random),
                                Layout(g, g.in[1].channels, false, random)};
      Output to_source[] = {Output(layouts[0], true, edge), Output(layouts[1], true, edge)};
      const Image images[] = {to_source[0].image(), to_source[1].image()};
      const Floats to_transformed(points_of(g) * g.weight_step(), edge);
      const Floats to_weight(std::int64_t(p.weight.size()), edge);
      const Floats to_bias(std::int64_t(p.bias.size()), edge);
      run_backward(kernels, p, weight, grad, wanted, part, edge, random, images,
                   to_transformed.data(), to_bias.data());
      for (int k = 0; k < 2; ++k) {
        const Values got = to_source[k].take();
        if (!(wanted >> k & 1)) {
          expect(std::all_of(got.begin(), got.end(), [](float x) { return x == 0; }),
                 "a gradient that isn't wanted", [&] { return p.name(); });
          continue;
        }
        p.expect_near(got, exact.source[k], k == 0 ? "gradient to x" : "gradient to h");
        if (before[k].empty()) before[k] = got;
        p.expect_same(got, before[k], "gradient to a source");
      }
      if (wanted & kWeight) {
        const conv_lstm::Weight params{g, to_weight.data(), to_transformed.data()};
        share_out(g.out.groups(), edge, random, [&](std::int64_t begin, std::int64_t end) {
          kernels.winograd_weight_backward(params, begin, end);
        });
        const Values got = to_weight.values();
        p.expect_near(got, exact.weight, "gradient to the weight");
        // Parts are summed before they are added.
        if (edge == kEdges[0]) weight_before = got;
        p.expect_same(got, weight_before, "gradient to the weight");
      }
      if (wanted & kBias) {
        const Values got = to_bias.values();
        p.expect_near(got, exact.bias, "gradient to the bias");
        // What its sum has lost is forgotten from one part to the next.
        if (edge == kEdges[0]) bias_before = got;
        p.expect_same(got, bias_before, "gradient to the bias");
      }
    }
  }
}

template <const auto& kShapes>
void backward(const cpu::Level& level) {
  Random random(8);
  for (const Shape& shape : kShapes) check_backward(level, shape, &random);
}

const Register tests[] = {{"conv2d_forward", convolution_forward},
                          {"conv2d_backward", backward<kConvolutions>},
                          {"conv_lstm_step_forward", step_forward},
                          {"conv_lstm_step_backward", backward<kSteps>}};

}  // namespace
}  // namespace geco::test
