#include "include/coupling_mlp.h"

#include "strided.h"

namespace geco::test {
namespace {

using namespace coupling_mlp;

constexpr DType kWide[] = {DType::kFloat32, DType::kFloat64};
constexpr Activation kActivations[] = {Activation::kRelu, Activation::kLeakyRelu, Activation::kTanh,
                                       Activation::kElu, Activation::kSilu};

struct Net {
  std::int64_t batch;
  std::vector<std::int64_t> widths;
};
// Single ones, one to four layers, panels that end early and don't, one block of rows and several,
// more tiles than are made at once.
const Net kNets[] = {{1, {1, 1}},   {3, {4, 5, 2}},    {13, {33, 65, 7}}, {70, {5, 31, 32, 64, 3}},
                     {33, {40, 2}}, {131, {6, 34, 5}}, {5, {200, 190, 1}}};

// Sums are a few hundred terms long, most roundings small beside them all.
constexpr double kUnits = 8;

long double sigmoid(long double u) { return 1 / (1 + std::exp(-u)); }

Exact value(Activation activation, Exact u) {
  long double y = u.value;
  switch (activation) {
    case Activation::kRelu:
      y = y > 0 ? y : 0;
      break;
    case Activation::kLeakyRelu:
      y = y > 0 ? y : y / 100;
      break;
    case Activation::kTanh:
      y = std::tanh(y);
      break;
    case Activation::kElu:
      y = y > 0 ? y : std::expm1(y);
      break;
    case Activation::kSilu:
      y *= sigmoid(y);
      break;
  }
  return {y, std::fabs(y) + 1.1L * u.terms};
}

// Of what is kept: y for the first two, u for the others.
Exact derivative(Activation activation, long double kept) {
  const auto of_itself = [](long double d) { return Exact{d, std::fabs(d)}; };
  const long double q = sigmoid(kept), part = q * kept * (1 - q);
  switch (activation) {
    case Activation::kRelu:
      return of_itself(kept > 0 ? 1 : 0);
    case Activation::kLeakyRelu:
      return of_itself(kept > 0 ? 1 : 0.01L);
    case Activation::kTanh:
      return of_itself(1 / (std::cosh(kept) * std::cosh(kept)));
    case Activation::kElu:
      return of_itself(kept > 0 ? 1 : std::exp(kept));
    case Activation::kSilu:
      return {q + part, q + std::fabs(part)};
  }
  return {};
}

void add_product(Exact* sum, Exact a, long double b) {
  sum->value += a.value * b;
  sum->terms += a.terms * std::fabs(b);
}

// A layer's values in blocks of rows and panels.
class Values {
 public:
  Values(const Batch& batch, std::int64_t width, DType dtype, Edge edge)
      : batch_(batch),
        width_(width),
        dtype_(dtype),
        memory_(std::size_t(batch.size * padded(width)) * size_of(dtype), edge) {}
  void* data() const { return memory_.data(); }
  unsigned char* at(std::int64_t row, std::int64_t column) const {
    std::int64_t block = 0;
    while (batch_.first(block + 1) <= row) ++block;
    const std::int64_t first = batch_.first(block), rows = batch_.first(block + 1) - first;
    const std::int64_t place = first * padded(width_) + column / kPanel * rows * kPanel +
                               (row - first) * kPanel + column % kPanel;
    return memory_.data() + place * std::int64_t(size_of(dtype_));
  }
  double get(std::int64_t row, std::int64_t column) const {
    return decode(dtype_, at(row, column));
  }
  void fill_normal(Random& random) const {
    for (std::int64_t row = 0; row < batch_.size; ++row)
      for (std::int64_t column = 0; column < width_; ++column)
        encode(dtype_, random.normal(), at(row, column));
  }

 private:
  Batch batch_;
  std::int64_t width_;
  DType dtype_;
  Guarded memory_;
};

struct Problem {
  const Net& net;
  const DType dtype;
  const Activation activation;
  const Edge edge;
  Random& random;
  const Batch batch{net.batch};
  const std::int64_t count = std::int64_t(net.widths.size()) - 1;
  const std::size_t element = size_of(dtype);
  Placed x = input(batch.size, width(0));
  std::vector<Placed> weights, biases;
  std::vector<Layer> layers;
  std::vector<Guarded> memory;

  std::int64_t width(std::int64_t l) const { return net.widths[std::size_t(l)]; }
  Placed input(std::int64_t rows, std::int64_t columns) const {
    Placed placed({2, {rows, columns}}, dtype, true, edge, random);
    placed.fill_normal(1, random);
    placed.remember();
    return placed;
  }
  Placed output(std::int64_t rows, std::int64_t columns) const {
    Placed placed({2, {rows, columns}}, dtype, false, edge, random);
    placed.remember();
    return placed;
  }
  void* room(std::int64_t elements) {
    return memory.emplace_back(std::size_t(elements) * element, edge).data();
  }
  double weight(std::int64_t l, std::int64_t out, std::int64_t in) const {
    return weights[std::size_t(l)].get(out * width(l) + in);
  }

  void describe(Chain* chain) {
    for (std::int64_t l = 0; l < count; ++l) {
      weights.push_back(input(width(l + 1), width(l)));
      biases.push_back(input(1, width(l + 1)));
      layers.push_back(
          {.in = width(l), .own = width(l), .out = width(l + 1), .weight = matrix(weights.back())});
    }
    *chain = {dtype, activation, count, layers.data(), batch, matrix(x), {}};
  }

  // In two parts, the second first.
  template <class Params>
  void run(const Params& params, std::int64_t tasks,
           void (*kernel)(const Params&, std::int64_t, std::int64_t)) const {
    const std::int64_t middle = random.below(tasks + 1);
    kernel(params, middle, tasks);
    kernel(params, 0, middle);
  }
  template <class Params>
  void run(const Params& params, std::int64_t tasks,
           void (*kernel)(const Params&, std::int64_t, std::int64_t, void*)) const {
    const Guarded scratch(std::size_t(params.scratch()) * element, edge);
    const std::int64_t middle = random.below(tasks + 1);
    kernel(params, middle, tasks, scratch.data());
    kernel(params, 0, middle, scratch.data());
  }
  void expect_untouched() const {
    x.expect_untouched();
    for (const std::vector<Placed>* operands : {&weights, &biases})
      for (const Placed& operand : *operands) operand.expect_untouched();
  }
};

void check_forward(const cpu::Level& level, Problem& p) {
  Forward params{};
  p.describe(&params);
  std::int64_t tasks = 0;
  std::vector<bool> has_bias;
  std::vector<Values> hidden;
  const bool keeps = p.random.one_in(2);
  for (Layer& layer : p.layers) {
    has_bias.push_back(!p.random.one_in(3));
    if (has_bias.back()) layer.bias = matrix(p.biases[has_bias.size() - 1]);
    layer.packed = p.room(panels(layer.out) * (layer.in + 1) * kPanel);
    tasks += panels(layer.out);
    hidden.emplace_back(p.batch, layer.out, p.dtype, p.edge);
    if (keeps && &layer != &p.layers.back()) layer.hidden = hidden.back().data();
  }
  const Placed projection = p.input(p.batch.size, p.width(1));
  const bool has_projection = p.random.one_in(2);
  if (has_projection) params.projection = matrix(projection);
  Placed result = p.output(p.batch.size, p.width(p.count));
  params.result = matrix(result);
  p.run(params, tasks, level.kernels->coupling_mlp_forward_pack);
  p.run(params, p.batch.blocks(), level.kernels->coupling_mlp_forward);

  std::vector<Exact> last;
  for (std::int64_t row = 0; row < p.batch.size; ++row) {
    std::vector<Exact> y;
    for (std::int64_t j = 0; j < p.width(0); ++j) {
      const double x = p.x.get(row * p.width(0) + j);
      y.push_back({x, 0});
    }
    for (std::int64_t l = 0; l < p.count; ++l) {
      std::vector<Exact> next;
      for (std::int64_t i = 0; i < p.width(l + 1); ++i) {
        Exact u{};
        for (std::int64_t j = 0; j < p.width(l); ++j) {
          const Exact& each = y[std::size_t(j)];
          add_product(&u, {each.value, each.terms + std::fabs(each.value)}, p.weight(l, i, j));
        }
        const auto offset = [&](double each) {
          u.value += each;
          u.terms += std::fabs(each);
        };
        if (has_bias[std::size_t(l)]) offset(p.biases[std::size_t(l)].get(i));
        if (l == 0 && has_projection) offset(projection.get(row * p.width(1) + i));
        if (l + 1 == p.count) {
          last.push_back(u);
          continue;
        }
        next.push_back(value(p.activation, u));
        if (keeps)
          expect_close(p.dtype, hidden[std::size_t(l)].get(row, i),
                       keeps_input(p.activation) ? u : next.back(), kUnits, "hidden");
      }
      y = next;
    }
  }
  expect_all(p.dtype, &result, last, kUnits, "result");
  projection.expect_untouched();
  p.expect_untouched();
}

void check_backward(const cpu::Level& level, Problem& p) {
  Backward params{};
  p.describe(&params);
  const auto wants = [&] { return !p.random.one_in(3); };
  const bool wants_x = wants(), wants_projection = wants();
  const Placed grad = p.input(p.batch.size, p.width(p.count));
  Placed grad_x = p.output(p.batch.size, p.width(0));
  Placed grad_projection = p.output(p.batch.size, p.width(1));
  std::vector<Placed> grad_weights, grad_biases;
  std::vector<Values> hidden;
  params.grad = matrix(grad);
  if (wants_x) params.grad_x = matrix(grad_x);
  if (wants_projection) params.grad_projection = matrix(grad_projection);
  params.lowest = wants_x || wants_projection ? 0 : p.random.below(p.count);
  std::int64_t packings = 0, tiles = 0, biases = 0;
  for (std::int64_t l = 0; l < p.count; ++l) {
    Layer& layer = p.layers[std::size_t(l)];
    grad_weights.push_back(p.output(layer.out, layer.in));
    grad_biases.push_back(p.output(1, layer.out));
    hidden.emplace_back(p.batch, layer.out, p.dtype, p.edge);
    hidden.back().fill_normal(p.random);
    layer.hidden = hidden.back().data();
    if (l < params.lowest) continue;
    layer.grad = p.room(p.batch.size * padded(layer.out));
    if (l > params.lowest || wants_x) {
      layer.packed = p.room(panels(layer.in) * layer.out * kPanel);
      packings += panels(layer.in);
    }
    if (wants()) {
      layer.grad_weight = matrix(grad_weights.back());
      layer.input = l == 0 || keeps_input(p.activation) ? p.room(p.batch.size * padded(layer.in))
                                                        : p.layers[std::size_t(l) - 1].hidden;
      tiles += params.tiles(layer);
    }
    if (wants()) {
      layer.grad_bias = matrix(grad_biases.back());
      biases += panels(layer.out);
    }
  }
  p.run(params, packings, level.kernels->coupling_mlp_backward_pack);
  p.run(params, p.batch.blocks(), level.kernels->coupling_mlp_backward);
  p.run(params, tiles, level.kernels->coupling_mlp_backward_weight);
  p.run(params, biases, level.kernels->coupling_mlp_backward_bias);

  std::vector<Exact> d;
  for (std::int64_t i = 0; i < p.batch.size * p.width(p.count); ++i)
    d.push_back({grad.get(i), std::fabs(grad.get(i))});
  for (std::int64_t l = p.count - 1; l >= params.lowest; --l) {
    const Layer& layer = p.layers[std::size_t(l)];
    const auto each_d = [&](std::int64_t row, std::int64_t i) {
      return d[std::size_t(row * layer.out + i)];
    };
    const auto before = [&](std::int64_t row, std::int64_t j) {
      return hidden[std::size_t(l) - 1].get(row, j);
    };
    std::vector<Exact> sums, products, next;
    for (std::int64_t i = 0; i < layer.out; ++i) {
      Exact sum{};
      for (std::int64_t row = 0; row < p.batch.size; ++row) add_product(&sum, each_d(row, i), 1);
      sums.push_back(sum);
      for (std::int64_t j = 0; j < layer.in; ++j) {
        Exact product{};
        for (std::int64_t row = 0; row < p.batch.size; ++row) {
          long double y = l == 0 ? p.x.get(row * layer.in + j) : before(row, j);
          if (l > 0 && keeps_input(p.activation)) y = value(p.activation, {y, 0}).value;
          add_product(&product, each_d(row, i), y);
        }
        products.push_back(product);
      }
    }
    if (layer.grad_bias.data)
      expect_all(p.dtype, &grad_biases[std::size_t(l)], sums, kUnits, "bias");
    if (layer.grad_weight.data)
      expect_all(p.dtype, &grad_weights[std::size_t(l)], products, kUnits, "weight");
    for (std::int64_t row = 0; row < p.batch.size; ++row)
      for (std::int64_t j = 0; j < layer.in; ++j) {
        Exact sum{};
        for (std::int64_t i = 0; i < layer.out; ++i)
          add_product(&sum, each_d(row, i), p.weight(l, i, j));
        if (l > 0) {
          const Exact slope = derivative(p.activation, before(row, j));
          sum = {sum.value * slope.value, sum.terms * slope.terms};
        }
        next.push_back(sum);
      }
    if (l == 0 && wants_projection)
      expect_all(p.dtype, &grad_projection, d, kUnits, "context_projection");
    if (l == 0 && wants_x) expect_all(p.dtype, &grad_x, next, kUnits, "x");
    d = next;
  }
  grad.expect_untouched();
  p.expect_untouched();
}

template <void (*kCheck)(const cpu::Level&, Problem&)>
void each_problem(const cpu::Level& level) {
  Random random(7);
  for (const DType dtype : kWide)
    for (const Edge edge : kEdges)
      for (const Activation activation : kActivations)
        for (const Net& net : kNets)
          for (int repeat = 0; repeat < 2; ++repeat) {
            Problem problem{net, dtype, activation, edge, random};
            kCheck(level, problem);
          }
}

const Register tests[] = {{"coupling_mlp_forward", each_problem<check_forward>},
                          {"coupling_mlp_backward", each_problem<check_backward>}};

}  // namespace
}  // namespace geco::test
