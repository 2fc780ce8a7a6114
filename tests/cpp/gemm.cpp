// Matrix products on panels; compiled once for each instruction-set level, named by GECO_LEVEL.
#include "cpu/gemm.h"

#include "harness.h"

namespace geco::test {
namespace {

using namespace geco::cpu;

// A sum's roundings are those of its terms in turn, most of them small beside all.
constexpr double kUnits = 4;

template <class T>
class Numbers {
 public:
  Numbers(std::int64_t count, Edge edge) : memory_(std::size_t(count) * sizeof(T), edge) {}
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }

 private:
  Guarded memory_;
};

// What the product has no use for stays NaN.
template <class T, Left kLeft, bool kAdd>
void check_product(std::int64_t rows, std::int64_t depth, int columns, Edge edge, Random& random) {
  constexpr DType kType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  constexpr bool kInRows = kLeft == Left::kRows;
  const std::int64_t step = (rows + random.below(3)) * kPanel, whole = depth / kPanel;
  const std::int64_t last = depth % kPanel > 0 ? rows * kPanel : 0;
  const Numbers<T> a(!kInRows    ? depth * kPanel
                     : last > 0  ? whole * step + last
                     : whole > 0 ? (whole - 1) * step + rows * kPanel
                                 : 0,
                     edge);
  const Numbers<T> b(depth * kPanel, edge), c(rows * kPanel, edge);
  const auto left = [&](std::int64_t r, std::int64_t k) -> T& {
    return a.data()[kInRows ? k / kPanel * step + r * kPanel + k % kPanel : k * kPanel + r];
  };
  for (std::int64_t k = 0; k < depth; ++k) {
    for (std::int64_t r = 0; r < rows; ++r) left(r, k) = T(random.normal());
    for (int j = 0; j < columns; ++j) b.data()[k * kPanel + j] = T(random.normal());
  }
  std::vector<Exact> exact;
  for (std::int64_t r = 0; r < rows; ++r)
    for (int j = 0; j < columns; ++j) {
      T& to = c.data()[r * kPanel + j];
      if (kAdd) to = T(random.normal());
      Exact sum{kAdd ? to : 0, kAdd ? std::fabs(to) : 0};
      for (std::int64_t k = 0; k < depth; ++k) {
        const long double product = (long double)(left(r, k)) * b.data()[k * kPanel + j];
        sum.value += product;
        sum.terms += std::fabs(product);
      }
      exact.push_back(sum);
    }
  gemm<T, kLeft, kAdd>(a.data(), step, b.data(), c.data(), rows, depth, columns,
                       {a.data(), b.data()});
  const int written = (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (std::int64_t r = 0; r < rows; ++r) {
    const T* got = c.data() + r * kPanel;
    for (int j = 0; j < columns; ++j)
      expect_close(kType, double(got[j]), exact[std::size_t(r * columns + j)], kUnits, "product");
    for (int j = written; j < kPanel; ++j)
      expect(std::isnan(got[j]), "product",
             [] { return std::string("a column beyond the last vector was written"); });
  }
}

template <class T, Left kLeft>
void check_products(std::int64_t most_rows) {
  Random random(11);
  const auto check = [&](std::int64_t rows, std::int64_t depth, int columns) {
    const Edge edge = kEdges[random.below(2)];
    if (random.one_in(2))
      check_product<T, kLeft, true>(rows, depth, columns, edge, random);
    else
      check_product<T, kLeft, false>(rows, depth, columns, edge, random);
  };
  for (std::int64_t rows = 1; rows <= most_rows; ++rows)
    for (int columns = 1; columns <= kPanel; ++columns) check(rows, random.below(101), columns);
  for (std::int64_t depth = 0; depth <= 100; ++depth)
    check(1 + random.below(most_rows), depth, 1 + int(random.below(kPanel)));
  // Sums in one, two and more parts.
  for (std::int64_t parts = 1; parts <= 4; ++parts)
    for (const int more : {0, 1, 32, 45, 300})
      check(1 + random.below(most_rows), parts * kLongestSum + more, 1 + int(random.below(kPanel)));
}

void products(const Level&) {
  check_products<float, Left::kRows>(40);
  check_products<double, Left::kRows>(40);
  // Rows are columns of a panel.
  check_products<float, Left::kColumns>(kPanel);
  check_products<double, Left::kColumns>(kPanel);
}

#define GECO_TEXT(x) #x
#define GECO_NAME(x) GECO_TEXT(x)
const Register tests[] = {{"gemm_products", products, GECO_NAME(GECO_LEVEL)}};

}  // namespace
}  // namespace geco::test
