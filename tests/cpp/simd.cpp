// The vectors' primitives; compiled once for each instruction-set level, named by GECO_LEVEL.
#include "cpu/simd.h"

#include "harness.h"

namespace geco::test {
namespace {

using namespace geco::cpu;

using OfDouble = std::function<double(double)>;
using OfLongDouble = std::function<long double(long double)>;

bool same(double a, double b) {
  return (a == b && std::signbit(a) == std::signbit(b)) || (std::isnan(a) && std::isnan(b));
}

template <class T>
Vec<T> all(double x) {
  Vec<T> vector;
  for (int j = 0; j < kLanes<T>; ++j) vector[j] = T(x);
  return vector;
}
template <class T>
double last(Vec<T> x) {
  return double(x[kLanes<T> - 1]);
}

// Holds a function to so many roundings of its exact value over a range, near zero in steps of
// magnitude.
void check_function(const char* name, DType dtype, double low, double high, double units,
                    const OfDouble& function, const OfLongDouble& formula) {
  std::vector<double> arguments;
  for (int k = 0; k <= 4000; ++k) arguments.push_back(low + (high - low) * k / 4000);
  for (double tiny = 1e-30; tiny < high; tiny *= 7) arguments.push_back(tiny);
  for (double tiny = 1e-30; tiny < -low; tiny *= 7) arguments.push_back(-tiny);
  for (double x : arguments) {
    if (dtype == DType::kFloat32) x = float(x);
    const double got = function(x);
    const long double exact = formula(x);
    expect(std::fabs(got - exact) <= units * epsilon(dtype) * std::fabs(exact), name, [&] {
      return "of " + number(x) + " is " + number(got) + " instead of " + number(double(exact));
    });
  }
}

template <class Storage>
void check_memory(DType dtype) {
  constexpr int kAll = kLanes<typename Compute<Storage>::type>;
  const std::size_t bytes = sizeof(Storage);
  for (const Edge edge : kEdges)
    for (int count = 1; count <= kAll; ++count) {
      const Guarded from(count * bytes, edge), to(count * bytes, edge);
      for (int j = 0; j < count; ++j) encode(dtype, j - 3.5, from.data() + j * bytes);
      const Storage* source = reinterpret_cast<const Storage*>(from.data());
      Storage* target = reinterpret_cast<Storage*>(to.data());
      const auto check = [&](auto x) {
        for (int j = 0; j < kAll; ++j)
          expect(x[j] == (j < count ? j - 3.5 : 0), "load", [&] { return number(x[j]); });
        for (int j = 0; j < count; ++j) {
          const double stored = decode(dtype, to.data() + j * bytes);
          expect(stored == j - 3.5, "store", [&] { return number(stored); });
          encode(dtype, NAN, to.data() + j * bytes);
        }
      };
      const auto tail = load(source, count);
      store(target, tail, count);
      check(tail);
      if (count < kAll) continue;
      const auto whole = load(source);
      store(target, whole);
      check(whole);
    }
}

void loads_and_stores(const Level&) {
  check_memory<float>(DType::kFloat32);
  check_memory<double>(DType::kFloat64);
  check_memory<BFloat16>(DType::kBFloat16);
  check_memory<Float16>(DType::kFloat16);
}

template <class Storage>
void check_narrow(DType dtype, float x) {
  const std::uint16_t bits = Memory<Storage>::narrow(all<float>(x))[kLanes<float> - 1];
  std::uint16_t wanted_bits;
  encode(dtype, x, &wanted_bits);
  const double got = decode(dtype, &bits), wanted = decode(dtype, &wanted_bits);
  expect(same(got, wanted), "narrow", [&] { return number(x) + " became " + number(got); });
}

template <class Storage>
void check_conversions(DType dtype) {
  for (unsigned each = 0; each < 0x10000; ++each) {
    const std::uint16_t bits = std::uint16_t(each), after = std::uint16_t(each + 1);
    const double value = decode(dtype, &bits), next = decode(dtype, &after);
    const double widened = Memory<Storage>::widen(VecU16{} + bits)[0];
    expect(same(widened, value), "widen",
           [&] { return number(value) + " became " + number(widened); });
    // The number itself, where rounding turns, and the neighbours of both.
    const float turn =
        std::isfinite(next) ? float((value + next) / 2) : float(value * 1.00048828125);
    for (const float x : {float(value), turn}) {
      check_narrow<Storage>(dtype, x);
      check_narrow<Storage>(dtype, std::nextafter(x, INFINITY));
      check_narrow<Storage>(dtype, std::nextafter(x, -INFINITY));
    }
  }
  Random random(3);
  for (int k = 0; k < 100000; ++k)
    check_narrow<Storage>(dtype, bit_cast<float>(std::uint32_t(random.bits())));
}

void conversions(const Level&) {
  check_conversions<BFloat16>(DType::kBFloat16);
  check_conversions<Float16>(DType::kFloat16);
}

template <class T>
void check_functions(DType dtype) {
  const T reach = kSigmoidBound<T>, paired = kPairedSigmoidBound<T>;
  const auto check = [&](const char* name, double low, double high, double units,
                         const OfDouble& function, const OfLongDouble& formula) {
    check_function(name, dtype, low, high, units, function, formula);
  };
  check(
      "exp_parts", -reach, reach, 3,
      [](double x) {
        Vec<T> em1, scale;
        exp_parts<T, 1>(all<T>(x), &em1, &scale);
        return last<T>(em1 * scale + scale);
      },
      [](long double x) { return std::exp(x); });
  check(
      "exp_parts of -2x", -reach / 2, reach / 2, 3,
      [](double x) {
        Vec<T> em1, scale;
        exp_parts<T, -2>(all<T>(x), &em1, &scale);
        return last<T>(em1 * scale + scale);
      },
      [](long double x) { return std::exp(-2 * x); });
  check(
      "sigmoid", -paired, reach, 4,
      [](double x) {
        return last<T>(reciprocal(T(1) + sigmoid_exp<T>(all<T>(x), kSigmoidBound<T>)));
      },
      [](long double x) { return 1 / (1 + std::exp(-x)); });
  check(
      "tanh", -30, 30, 4,
      [](double x) {
        const TanhParts<T> parts = tanh_parts<T>(all<T>(x));
        return last<T>(parts.numerator * reciprocal(parts.denominator));
      },
      [](long double x) { return std::tanh(x); });
  check(
      "derivative of tanh", -kTanhBound<T>, kTanhBound<T>, 6,
      [](double x) {
        const TanhParts<T> parts = tanh_parts<T>(all<T>(x));
        return last<T>(parts.derivative(reciprocal(parts.denominator)));
      },
      [](long double x) { return 1 / (std::cosh(x) * std::cosh(x)); });
  check(
      "reciprocal", 1e-30, 1e30, 1.5, [](double x) { return last<T>(reciprocal(all<T>(x))); },
      [](long double x) { return 1 / x; });
}

template <class T>
void check_special_values() {
  const auto held = [](double x) { return last<T>(clamp(all<T>(x), T(-2), T(3))); };
  const double pairs[][2] = {
      {held(NAN), NAN},
      {held(INFINITY), 3},
      {held(-INFINITY), -2},
      {held(2.5), 2.5},
      {held(-2), -2},
      {last<T>(zero_below(all<T>(NAN), T(0), all<T>(5))), 5},
      {last<T>(zero_below(all<T>(0), T(0), all<T>(5))), 5},
      {last<T>(zero_below(all<T>(-1), T(0), all<T>(NAN))), 0},
      {last<T>(tanh_parts<T>(all<T>(NAN)).numerator), NAN},
      {last<T>(sigmoid_exp<T>(all<T>(NAN), T(5))), NAN},
  };
  for (const auto& [got, wanted] : pairs)
    expect(same(got, wanted), "special value",
           [got = got, wanted = wanted] { return number(got) + " instead of " + number(wanted); });
}

void functions(const Level&) {
  check_functions<float>(DType::kFloat32);
  check_functions<double>(DType::kFloat64);
  check_special_values<float>();
  check_special_values<double>();
}

template <class T>
void check_walk() {
  for (std::int64_t count = 0; count <= 5 * kLanes<T>; ++count) {
    std::vector<int> heads(count), tails(count);
    const auto mark = [](std::vector<int>& seen, std::int64_t j, auto... tail) {
      const int counts[] = {kLanes<T>, tail...};
      for (int k = 0; k < counts[sizeof...(tail)]; ++k) ++seen.at(j + k);
      return j;
    };
    T* const nothing[] = {nullptr, nullptr};
    for_each_vector<T>(
        count, Streams<T, 2>(nothing),
        [&](std::int64_t j, auto... n) { return mark(heads, j, n...); },
        [&](std::int64_t head, std::int64_t j, auto... n) {
          expect(head == j, "for_each_vector",
                 [] { return std::string("a tail got another vector's head"); });
          mark(tails, j, n...);
        });
    for (std::int64_t j = 0; j < count; ++j)
      expect(heads[j] == 1 && tails[j] == 1, "for_each_vector",
             [] { return std::string("an element was not visited once"); });
  }
}

void walks(const Level&) {
  check_walk<float>();
  check_walk<double>();
}

#define GECO_TEXT(x) #x
#define GECO_NAME(x) GECO_TEXT(x)
const Register tests[] = {{"loads_and_stores", loads_and_stores, GECO_NAME(GECO_LEVEL)},
                          {"conversions", conversions, GECO_NAME(GECO_LEVEL)},
                          {"functions", functions, GECO_NAME(GECO_LEVEL)},
                          {"walks", walks, GECO_NAME(GECO_LEVEL)}};

}  // namespace
}  // namespace geco::test
