#include "include/equilibrium_map.h"

#include "strided.h"

namespace geco::test {
namespace {

using equilibrium_map::kPad;

struct Shape {
  std::int64_t n, m, d;
};
// Single ones, odd numbers, every remainder of dimensions and vectors, chunks that end early, few
// and many dimensions, more than a run and a group of runs, several slots.
constexpr Shape kShapes[] = {{1, 1, 1},   {1, 5, 2},   {7, 1, 3},    {9, 16, 17},  {33, 17, 1},
                             {37, 40, 2}, {19, 33, 3}, {16, 31, 16}, {67, 9, 18},  {65, 19, 17},
                             {5, 18, 39}, {3, 2, 197}, {1100, 5, 3}, {1061, 3, 17}};

// What an exponential may lose is counted in units of its argument, hence the generous terms.
constexpr double kUnits = 8;

equilibrium_map::Vector vector(const Placed& placed) { return {placed.data(), placed.stride(0)}; }

void add(Exact* sum, long double value, long double terms) {
  sum->value += value;
  sum->terms += terms;
}

// The operands, and the map by its definition.
struct Problem {
  const Shape s;
  const DType dtype;
  const Edge edge;
  const bool has_prior;
  Random& random;
  const DType wide = compute_dtype(dtype);
  const Space rows{1, {s.n}}, vectors{1, {s.m}}, data{2, {s.n, s.d}}, centres{2, {s.m, s.d}};
  const double beta = double(s.d) * (random.one_in(3) ? 0.1 : random.one_in(2) ? 0.6 : 5);
  Placed x = input(data, dtype), psi = input(centres, dtype), prior = input(vectors, dtype);
  std::vector<long double> log_prior, cost, weight;  // the last two are [n][m]
  std::vector<Exact> z, mass, f;

  Placed input(const Space& space, DType type) const {
    Placed placed(space, type, true, edge, random);
    placed.fill_normal(1, random);
    placed.remember();
    return placed;
  }
  // A result's memory, filled for backward with the exact values.
  Placed result(const Space& space, DType type, const std::vector<Exact>& exact) const {
    Placed placed(space, type, false, edge, random);
    for (std::size_t i = 0; i < exact.size(); ++i)
      encode(type, double(exact[i].value), placed.at(std::int64_t(i)));
    placed.remember();
    return placed;
  }

  void solve() {
    // A vector without a prior is moved all the same.
    if (s.m > 1 && prior.stride(0) != 0) encode(dtype, -HUGE_VAL, prior.at(random.below(s.m)));
    prior.remember();
    for (std::int64_t a = 0; a < s.m; ++a)
      log_prior.push_back(has_prior ? prior.get(a) : -std::log((long double)(s.m)));
    for (std::int64_t i = 0; i < s.n; ++i) {
      Exact row{};
      for (std::int64_t a = 0; a < s.m; ++a) {
        long double distance = 0;
        for (std::int64_t k = 0; k < s.d; ++k)
          distance += std::pow((long double)(x.get(i * s.d + k)) - psi.get(a * s.d + k), 2);
        cost.push_back(distance / beta);
        const long double given = log_prior[std::size_t(a)], p = std::exp(given - cost.back());
        if (p > 0) add(&row, p, p * (cost.back() + std::fabs(given)));
      }
      const long double log = std::log(row.value);
      z.push_back({log, 1 + std::fabs(log) + row.terms / row.value});
    }
    weight.resize(cost.size());
    for (std::int64_t a = 0; a < s.m; ++a) {
      Exact column{};
      std::vector<Exact> means(std::size_t(s.d));
      for (std::int64_t i = 0; i < s.n; ++i) {
        const std::size_t pair = std::size_t(i * s.m + a);
        const Exact& row = z[std::size_t(i)];
        const long double share = weight[pair] = std::exp(-cost[pair] - row.value);
        const long double terms = share * (cost[pair] + row.terms);
        add(&column, share, terms);
        for (std::int64_t k = 0; k < s.d; ++k)
          add(&means[std::size_t(k)], share * x.get(i * s.d + k),
              terms * std::fabs(x.get(i * s.d + k)));
      }
      const long double log = std::log(column.value);
      mass.push_back({log, 1 + std::fabs(log) + column.terms / column.value});
      for (const Exact& sum : means)
        f.push_back({sum.value / column.value,
                     (sum.terms + std::fabs(sum.value) * mass.back().terms) / column.value});
      for (std::int64_t i = 0; i < s.n; ++i) weight[std::size_t(i * s.m + a)] /= column.value;
    }
  }

  void describe(const Placed& mapped, const Placed& normaliser, const Placed& log_mass,
                bool backward, equilibrium_map::Operands* to) const {
    *to = {dtype, s.n, s.m, s.d, beta, matrix(x), matrix(psi)};
    if (has_prior) to->log_prior = vector(prior);
    to->mapped = matrix(mapped);
    to->log_normaliser = vector(normaliser);
    to->log_mass = vector(log_mass);
    to->plan = equilibrium_map::make_plan(s.n, s.m, s.d, std::int64_t(size_of(wide)), backward);
  }

  // Slots go last to first: one that writes past its own memory spoils what is done.
  template <class Params, class Kernel>
  void run(Params* params, Kernel pack, Kernel work, Kernel finish) const {
    const Guarded scratch(std::size_t(params->plan.bytes), edge);
    params->scratch = reinterpret_cast<char*>(scratch.data());
    const std::int64_t groups = params->plan.padded / kPad, middle = random.below(groups + 1);
    pack(*params, middle, groups);
    pack(*params, 0, middle);
    for (std::int64_t slot = params->plan.slots; slot-- > 0;) work(*params, slot, slot + 1);
    finish(*params, middle, groups);
    finish(*params, 0, middle);
    for (const Placed* placed : {&x, &psi, &prior}) placed->expect_untouched();
  }
};

void check_forward(const cpu::Level& level, const Problem& p) {
  Placed mapped = p.result(p.centres, p.wide, {}), normaliser = p.result(p.rows, p.wide, {});
  Placed log_mass = p.result(p.vectors, p.wide, {});
  equilibrium_map::Forward params{};
  p.describe(mapped, normaliser, log_mass, false, &params);
  const cpu::Kernels& kernels = *level.kernels;
  p.run(&params, kernels.equilibrium_map_forward_pack, kernels.equilibrium_map_forward,
        kernels.equilibrium_map_forward_finish);
  expect_all(p.wide, &mapped, p.f, kUnits, "mapped");
  expect_all(p.wide, &normaliser, p.z, kUnits, "log normaliser");
  expect_all(p.wide, &log_mass, p.mass, kUnits, "log mass");
}

struct Gradients {
  std::vector<Exact> x, psi, beta, prior;
};

// See docs/ops/equilibrium_map.md. The terms carry the relative error of each weight.
Gradients gradients(const Problem& p, const Placed* to_mapped, const Placed* to_normaliser) {
  const auto [n, m, d] = p.s;
  Gradients to{std::vector<Exact>(std::size_t(n * d)), std::vector<Exact>(std::size_t(m * d)),
               std::vector<Exact>(1), std::vector<Exact>(std::size_t(m))};
  for (std::int64_t i = 0; i < n; ++i) {
    const long double given = to_normaliser ? to_normaliser->get(i) : 0;
    std::vector<Exact> w, prior, e(std::size_t(m), Exact{});
    Exact rest{given, std::fabs(given)};
    const long double row_size = std::fabs(p.z[std::size_t(i)].value);
    long double row_loss = 0;
    for (std::int64_t a = 0; a < m; ++a) {
      const std::size_t j = std::size_t(a), pair = std::size_t(i * m + a);
      const long double weight = p.weight[pair], log_mass = p.mass[j].value;
      const long double loss = 1 + p.cost[pair] + row_size + std::fabs(log_mass);
      w.push_back({weight, weight * loss});
      const long double share = std::exp(p.log_prior[j] + log_mass) * weight;
      prior.push_back({share, share > 0 ? share * (loss + std::fabs(p.log_prior[j])) : 0});
      row_loss += prior[j].terms;
      for (std::int64_t k = 0; to_mapped && k < d; ++k) {
        const long double grad = to_mapped->get(a * d + k), x = p.x.get(i * d + k);
        const long double mean = p.f[std::size_t(a * d + k)].value;
        add(&e[j], weight * grad * (x - mean),
            w[j].terms * std::fabs(grad) * (std::fabs(x) + std::fabs(mean)));
      }
      add(&rest, -e[j].value, e[j].terms);
    }
    for (std::int64_t a = 0; a < m; ++a) {
      const std::size_t j = std::size_t(a);
      const Exact through{rest.value * prior[j].value,
                          rest.terms * (prior[j].terms + prior[j].value * row_loss)};
      const long double q = 2 / p.beta * (e[j].value + through.value);
      const long double q_terms = 2 / p.beta * (e[j].terms + through.terms);
      const long double half = p.cost[std::size_t(i * m + a)] / 2;
      add(&to.prior[j], through.value, through.terms);
      add(&to.beta[0], q * half, q_terms * half);
      for (std::int64_t k = 0; k < d; ++k) {
        const long double difference = (long double)(p.x.get(i * d + k)) - p.psi.get(a * d + k);
        const long double grad = to_mapped ? to_mapped->get(a * d + k) : 0;
        const long double pull = q * difference, terms = q_terms * std::fabs(difference);
        add(&to.psi[std::size_t(a * d + k)], pull, terms);
        add(&to.x[std::size_t(i * d + k)], w[j].value * grad - pull,
            w[j].terms * std::fabs(grad) + terms);
      }
    }
  }
  return to;
}

void check_backward(const cpu::Level& level, const Problem& p) {
  const unsigned given = unsigned(p.random.below(4));  // 1 for G, 2 for k
  const Placed to_mapped = p.input(p.centres, p.wide), to_normaliser = p.input(p.rows, p.wide);
  const Gradients exact =
      gradients(p, given & 1 ? &to_mapped : nullptr, given & 2 ? &to_normaliser : nullptr);
  const Placed mapped = p.result(p.centres, p.wide, p.f);
  const Placed normaliser = p.result(p.rows, p.wide, p.z);
  const Placed log_mass = p.result(p.vectors, p.wide, p.mass);
  for (const unsigned wanted : {1u, 2u, 4u, 8u, 15u}) {  // x, psi, beta, log_prior, all
    Placed x = p.result(p.data, p.dtype, {}), psi = p.result(p.centres, p.dtype, {});
    Placed prior = p.result(p.vectors, p.dtype, {}), beta = p.result({1, {1}}, DType::kFloat64, {});
    equilibrium_map::Backward params{};
    p.describe(mapped, normaliser, log_mass, true, &params);
    if (given & 1) params.grad_mapped = matrix(to_mapped);
    if (given & 2) params.grad_log_normaliser = vector(to_normaliser);
    if (wanted & 1) params.grad_x = matrix(x);
    if (wanted & 2) params.grad_psi = matrix(psi);
    if (wanted & 4) params.grad_beta = static_cast<double*>(beta.data());
    if (wanted & 8) params.grad_log_prior = vector(prior);
    const cpu::Kernels& kernels = *level.kernels;
    p.run(&params, kernels.equilibrium_map_backward_pack, kernels.equilibrium_map_backward,
          kernels.equilibrium_map_backward_finish);
    if (wanted & 1) expect_all(p.dtype, &x, exact.x, kUnits, "gradient to x");
    if (wanted & 2) expect_all(p.dtype, &psi, exact.psi, kUnits, "gradient to psi");
    if (wanted & 4) expect_all(p.wide, &beta, exact.beta, kUnits, "gradient to beta");
    if (wanted & 8) expect_all(p.dtype, &prior, exact.prior, kUnits, "gradient to log_prior");
  }
  for (const Placed* placed : {&mapped, &normaliser, &log_mass, &to_mapped, &to_normaliser})
    placed->expect_untouched();
}

template <void (*kCheck)(const cpu::Level&, const Problem&)>
void each_problem(const cpu::Level& level) {
  Random random(5);
  for (const DType dtype : kDTypes)
    for (const Edge edge : kEdges)
      for (const Shape& shape : kShapes)
        for (const bool has_prior : {false, true}) {
          Problem problem{shape, dtype, edge, has_prior, random};
          problem.solve();
          kCheck(level, problem);
        }
}

const Register tests[] = {{"equilibrium_map_forward", each_problem<check_forward>},
                          {"equilibrium_map_backward", each_problem<check_backward>}};

}  // namespace
}  // namespace geco::test
