// Fixed-point map of reconstruction vectors on the CPU, forward and backward, in one pass over the
// data each. Lanes are vectors psi_a, so all sums over the data stay in their lanes; a chunk of
// rows x_i meets a tile of vectors, and each loaded vector serves several rows. Distances are sums
// of squared differences: |x|^2 + |psi|^2 - 2 x.psi would cancel where beta is small. Forward keeps
// a bound on log m_ia for each vector, as attention keeps a running maximum. It rises only when it
// is e^32 too low, so no sum is rescaled more than once while it still counts. Backward needs one
// exponential for each pair: the row's softmax is w_ia exp(log_prior_a + log_mass_a). Gradients use
// differences x_i - psi_a, too, so data far from zero cost no accuracy. Sums over the data are kept
// in float64 beyond a chunk.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/simd.h"
#include "include/equilibrium_map.h"

namespace geco::cpu {
namespace {

namespace em = equilibrium_map;

// Rows that share a loaded vector, and dimensions that share a loaded weight.
constexpr int kEmRows = kVectorBytes == 64 ? 4 : 2;
constexpr int kEmColumns = 4;
// Dimensions are summed in runs, and runs in groups: one long sum would lose more than PyTorch's
// pairwise ones.
constexpr std::int64_t kEmRun = 8, kEmRunGroup = 160;
// Rows summed in one run.
constexpr std::int64_t kEmRowRun = 16;

inline VecF32 maximum(VecF32 a, VecF32 b) {
#if defined(__AVX512F__)
  return bit_cast<VecF32>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecF32>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#elif defined(__SSE2__)
  return bit_cast<VecF32>(_mm_max_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}
inline VecF64 maximum(VecF64 a, VecF64 b) { return a > b ? a : b; }

// exp(x) for x <= 80 or NaN; below the bound, where it would be less than 2e-38, zero.
template <class T>
inline Vec<T> exp_not_above(Vec<T> x) {
  constexpr T kLow = -kSigmoidBound<T>;
  Vec<T> em1, scale;
  // The maximum's second operand passes NaN.
  exp_parts<T, 1>(maximum(broadcast<T>(kLow), x), &em1, &scale);
  return zero_below(x, kLow, em1 * scale + scale);
}

// 16 bytes of a vector.
template <class T>
struct PartOf;
template <>
struct PartOf<float> {
  using type = float __attribute__((vector_size(16)));
};
template <>
struct PartOf<double> {
  using type = double __attribute__((vector_size(16)));
};

// join(lanes...) pairwise, by halves.
template <class T, class Join>
inline T join_lanes(Vec<T> x, Join join) {
  using Part = typename PartOf<T>::type;
  constexpr int kParts = kVectorBytes / 16, kWidth = 16 / int(sizeof(T));
  Part parts[kParts];
  std::memcpy(parts, &x, sizeof(x));
  for (int count = kParts / 2; count > 0; count /= 2)
    for (int k = 0; k < count; ++k) parts[k] = join(parts[k], parts[k + count]);
  T joined = join(parts[0][0], parts[0][kWidth / 2]);
  if constexpr (kWidth == 4) joined = join(joined, join(parts[0][1], parts[0][3]));
  return joined;
}
template <class T>
inline T sum_of_lanes(Vec<T> x) {
  return join_lanes<T>(x, [](auto a, auto b) { return a + b; });
}
template <class T>
inline T max_of_lanes(Vec<T> x) {
  return join_lanes<T>(x, [](auto a, auto b) { return a > b ? a : b; });
}

template <class T>
inline bool any_above(Vec<T> a, Vec<T> b) {
  bool any = false;
  T x[kLanes<T>], y[kLanes<T>];
  store(x, a);
  store(y, b);
  for (int lane = 0; lane < kLanes<T>; ++lane) any |= x[lane] > y[lane];
  return any;
}

// Adds a vector, or a multiple of it, to as many sums in float64.
inline void add_to(double* sums, VecF64 x, double factor) { store(sums, load(sums) + x * factor); }
inline void add_to(double* sums, VecF32 x, double factor) {
  using Half = float __attribute__((vector_size(kVectorBytes / 2)));
  Half halves[2];
  std::memcpy(halves, &x, sizeof(x));
  for (int k = 0; k < 2; ++k)
    add_to(sums + k * kLanes<double>, __builtin_convertvector(halves[k], VecF64), factor);
}

template <class T>
inline T* at(char* base, std::int64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}

template <class Storage>
inline auto element(const em::Matrix& matrix, std::int64_t i, std::int64_t j) {
  const auto* data = static_cast<const Storage*>(matrix.data);
  return load(data + i * matrix.row + j * matrix.column, 1)[0];
}
template <class Storage>
inline auto element(const em::Vector& vector, std::int64_t i) {
  return load(static_cast<const Storage*>(vector.data) + i * vector.step, 1)[0];
}
template <class Storage, class T>
inline void set_element(const em::Matrix& matrix, std::int64_t i, std::int64_t j, T value) {
  auto* data = static_cast<Storage*>(matrix.data);
  store(data + i * matrix.row + j * matrix.column, broadcast<T>(value), 1);
}
template <class Storage, class T>
inline void set_element(const em::Vector& vector, std::int64_t i, T value) {
  store(static_cast<Storage*>(vector.data) + i * vector.step, broadcast<T>(value), 1);
}

// The chunk's rows, one after the other; the last is repeated to fill a group.
template <class Storage, class T>
void pack_rows(const em::Operands& p, std::int64_t first, std::int64_t count, std::int64_t filled,
               T* to) {
  for (std::int64_t r = 0; r < filled; ++r, to += p.d) {
    const std::int64_t i = first + (r < count ? r : count - 1);
    std::int64_t k = 0;
    if (p.x.column == 1) {
      const Storage* from = static_cast<const Storage*>(p.x.data) + i * p.x.row;
      for (; k + kLanes<T> <= p.d; k += kLanes<T>) store(to + k, load(from + k));
    }
    for (; k < p.d; ++k) to[k] = element<Storage>(p.x, i, k);
  }
}

// -H / beta. Where products are fused, as H hi + H lo, which is as exact as a division; H lo stays
// finite. Elsewhere the rounding of H hi would come on top.
#if defined(__FMA__)
template <class T>
struct Cooling {
  T high, low;
  explicit Cooling(double beta) {
    constexpr double kMost = kLargest<T>;
    const double inverse = -1 / beta;
    high = T(inverse > kMost ? kMost : inverse < -kMost ? -kMost : inverse);
    const double rest =
        sizeof(T) == 8 ? std::fma(inverse, beta, 1.0) / -beta : inverse - double(high);
    low = is_finite(rest) && is_finite(inverse) ? T(rest) : T(0);
  }
  Vec<T> operator()(Vec<T> h) const {
    // The minimum of the two; a NaN may end as one bound or the other, the first product keeps it.
    const Vec<T> bounded = -maximum(-h, broadcast<T>(-kLargest<T>));
    return h * high + bounded * low;
  }
};
#else
template <class T>
struct Cooling {
  T divisor;
  explicit Cooling(double beta) {
    constexpr T kLeast = sizeof(T) == 4 ? T(__FLT_MIN__) : T(__DBL_MIN__);
    divisor = -larger(T(beta), kLeast);
  }
  Vec<T> operator()(Vec<T> h) const { return h / divisor; }
};
#endif

// Squared distances of `rows` rows to V vectors, and with kDot the products G_a . (x_i - F_a): as a
// difference of two products its error would be the same for all data, and add up.
// Tiles are [V][chunk][lanes].
template <class T, int V, bool kDot>
void distances(const T* psi, const T* g, const T* means, const T* x, std::int64_t d,
               std::int64_t rows, std::int64_t chunk, T* h, T* dot) {
  constexpr int L = kLanes<T>;
  constexpr int kRows = kEmRows;
  const auto clear = [](auto& sums) {
    for (auto& row : sums)
      for (auto& sum : row) sum = Vec<T>{};
  };
  std::int64_t first = 0;
  do {
    const std::int64_t last = smaller(first + kEmRunGroup, d);
    for (std::int64_t r = 0; r < rows; r += kRows) {
      Vec<T> group[kRows][V], group_product[kDot ? kRows : 1][V];
      clear(group);
      clear(group_product);
      for (std::int64_t begin = first; begin < last; begin += kEmRun) {
        const std::int64_t end = smaller(begin + kEmRun, last);
        Vec<T> sum[kRows][V], product[kDot ? kRows : 1][V];
        clear(sum);
        clear(product);
        for (std::int64_t k = begin; k < end; ++k) {
          Vec<T> centre[V], slope[V], mean[V];
          for (int v = 0; v < V; ++v) {
            centre[v] = load(psi + (v * d + k) * L);
            if constexpr (kDot) slope[v] = load(g + (v * d + k) * L);
            if constexpr (kDot) mean[v] = load(means + (v * d + k) * L);
          }
          for (int j = 0; j < kRows; ++j) {
            const T value = x[(r + j) * d + k];
            for (int v = 0; v < V; ++v) {
              const Vec<T> difference = value - centre[v];
              sum[j][v] += difference * difference;
              if constexpr (kDot) product[j][v] += slope[v] * (value - mean[v]);
            }
          }
        }
        for (int j = 0; j < kRows; ++j)
          for (int v = 0; v < V; ++v) {
            group[j][v] += sum[j][v];
            if constexpr (kDot) group_product[j][v] += product[j][v];
          }
      }
      for (int j = 0; j < kRows; ++j)
        for (int v = 0; v < V; ++v) {
          const std::int64_t to = (v * chunk + r + j) * L;
          store(h + to, first == 0 ? group[j][v] : load(h + to) + group[j][v]);
          if constexpr (kDot)
            store(dot + to,
                  first == 0 ? group_product[j][v] : load(dot + to) + group_product[j][v]);
        }
    }
    first = last;
  } while (first < d);
}

// Adds factor * sum_r weight[r] (x[r][k] - psi[k]), or with kPlain sum_r weight[r] x[r][k], to the
// sums of one block of vectors for K dimensions.
template <class T, int V, int K, bool kPlain>
void accumulate(const T* weights, const T* psi, const T* x, std::int64_t d, std::int64_t rows,
                std::int64_t chunk, double factor, double* sums) {
  constexpr int L = kLanes<T>;
  Vec<T> total[K][V], centre[K][V];
  for (int k = 0; k < K; ++k)
    for (int v = 0; v < V; ++v) total[k][v] = Vec<T>{};
  if constexpr (!kPlain)
    for (int k = 0; k < K; ++k)
      for (int v = 0; v < V; ++v) centre[k][v] = load(psi + (v * d + k) * L);
  for (std::int64_t begin = 0; begin < rows; begin += kEmRowRun) {
    const std::int64_t end = begin + kEmRowRun < rows ? begin + kEmRowRun : rows;
    Vec<T> run[K][V];
    for (int k = 0; k < K; ++k)
      for (int v = 0; v < V; ++v) run[k][v] = Vec<T>{};
    for (std::int64_t r = begin; r < end; ++r)
      for (int v = 0; v < V; ++v) {
        const Vec<T> weight = load(weights + (v * chunk + r) * L);
        for (int k = 0; k < K; ++k) {
          const T value = x[r * d + k];
          if constexpr (kPlain)
            run[k][v] += weight * value;
          else
            run[k][v] += weight * (value - centre[k][v]);
        }
      }
    for (int k = 0; k < K; ++k)
      for (int v = 0; v < V; ++v) total[k][v] += run[k][v];
  }
  for (int k = 0; k < K; ++k)
    for (int v = 0; v < V; ++v) add_to(sums + (v * d + k) * L, total[k][v], factor);
}

template <class T, int V, bool kPlain>
void accumulate_all(const T* weights, const T* psi, const T* x, std::int64_t d, std::int64_t rows,
                    std::int64_t chunk, double factor, double* sums) {
  constexpr int L = kLanes<T>;
  std::int64_t k = 0;
  for (; k + 4 <= d; k += 4)
    accumulate<T, V, 4, kPlain>(weights, psi + k * L, x + k, d, rows, chunk, factor, sums + k * L);
  for (; k + 2 <= d; k += 2)
    accumulate<T, V, 2, kPlain>(weights, psi + k * L, x + k, d, rows, chunk, factor, sums + k * L);
  for (; k < d; ++k)
    accumulate<T, V, 1, kPlain>(weights, psi + k * L, x + k, d, rows, chunk, factor, sums + k * L);
}

// sum_a w_ra G_a + dl_ra (x_r - psi_a) for R rows and K dimensions, over all vectors. The weights
// are those of these rows alone, [blocks][w, dl][R][lanes].
template <class T, int R, int K>
void row_gradients(const T* weights, const T* psi, const T* g, const T* x, std::int64_t d,
                   std::int64_t blocks, T (*out)[K]) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[R][K];
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) sum[r][k] = Vec<T>{};
  for (std::int64_t block = 0; block < blocks; ++block, weights += 2 * R * L) {
    for (int k = 0; k < K; ++k) {
      const Vec<T> grad = load(g + (block * d + k) * L), centre = load(psi + (block * d + k) * L);
      for (int r = 0; r < R; ++r) {
        sum[r][k] += load(weights + r * L) * grad;
        sum[r][k] += load(weights + (R + r) * L) * (x[r * d + k] - centre);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) out[r][k] = sum_of_lanes<T>(sum[r][k]);
}

// Adds the same for one block of vectors to sums [rows][d] of vectors: few dimensions stay in the
// first-level cache.
template <class T>
void add_row_gradients(const T* w, const T* dl, const T* psi, const T* g, const T* x,
                       std::int64_t d, std::int64_t rows, T* sums) {
  constexpr int L = kLanes<T>;
  for (std::int64_t r = 0; r < rows; ++r) {
    const Vec<T> weight = load(w + r * L), slope = load(dl + r * L);
    for (std::int64_t k = 0; k < d; ++k) {
      T* to = sums + (r * d + k) * L;
      const Vec<T> pulled = load(to) + weight * load(g + k * L);
      store(to, pulled + slope * (x[r * d + k] - load(psi + k * L)));
    }
  }
}

template <class T>
struct Place {
  const em::Plan& plan;
  char* shared;
  std::int64_t d;

  T* array(std::int64_t offset) const { return at<T>(shared, offset); }
  char* slot(std::int64_t s) const { return shared + plan.first_slot + s * plan.slot_bytes; }
};

// Packs blocks [begin, end) of the vectors and what belongs to each of them. What pads the last
// block is the last vector again, with a prior and a weight of zero.
template <class Storage>
void pack_vectors(const em::Operands& p, const em::Backward* backward, std::int64_t begin,
                  std::int64_t end) {
  using T = typename Compute<Storage>::type;
  constexpr int L = kLanes<T>;
  const Place<T> place{p.plan, p.scratch, p.d};
  T* psi = place.array(p.plan.psi);
  T* log_prior = place.array(p.plan.log_prior);
  const bool slopes = backward != nullptr && backward->grad_mapped.data != nullptr;
  const T uniform = T(-std::log(double(p.m)));
  for (std::int64_t a = begin * L; a < end * L; ++a) {
    const bool real = a < p.m;
    const std::int64_t from = real ? a : p.m - 1;
    const std::int64_t base = a / L * p.d * L + a % L;
    for (std::int64_t k = 0; k < p.d; ++k) psi[base + k * L] = element<Storage>(p.psi, from, k);
    log_prior[a] = !real                         ? -kInfinity<T>
                   : p.log_prior.data == nullptr ? uniform
                                                 : T(element<Storage>(p.log_prior, a));
    if (backward == nullptr) continue;
    // The map's own gradient goes by the weights over the data. Without it only each point's
    // softmax is wanted: its prior stands in for the mass, which other points' NaN would enter.
    const bool counts = real && (slopes || log_prior[a] != -kInfinity<T>);
    const T log_mass = slopes ? element<T>(p.log_mass, from) : -log_prior[a];
    place.array(p.plan.log_mass)[a] = counts ? log_mass : kInfinity<T>;
    place.array(p.plan.prior_mass)[a] = !counts ? T(0)
                                        : slopes
                                            ? T(std::exp(double(log_prior[a]) + double(log_mass)))
                                            : T(1);
    T* grad_mapped = place.array(p.plan.grad_mapped);
    T* means = place.array(p.plan.means);
    for (std::int64_t k = 0; slopes && k < p.d; ++k)
      means[base + k * L] = element<T>(p.mapped, from, k);
    for (std::int64_t k = 0; k < p.d; ++k)
      grad_mapped[base + k * L] =
          real && slopes ? T(element<T>(backward->grad_mapped, a, k)) : T(0);
  }
}

// Calls body(block, width) for two blocks at a time, then one, with the width as a constant.
template <class Body>
inline void for_each_group(std::int64_t blocks, Body body) {
  std::int64_t block = 0;
  for (; block + 2 <= blocks; block += 2) body(block, std::integral_constant<int, 2>{});
  if (block < blocks) body(block, std::integral_constant<int, 1>{});
}

template <class Storage>
void equilibrium_map_forward_slot(const em::Forward& p, std::int64_t s) {
  using T = typename Compute<Storage>::type;
  constexpr int L = kLanes<T>;
  constexpr T kSlack = 32;
  const em::Plan& plan = p.plan;
  const Place<T> place{plan, p.scratch, p.d};
  const T* psi = place.array(plan.psi);
  const T* log_prior = place.array(plan.log_prior);
  char* slot = place.slot(s);
  double* sums = at<double>(slot, plan.sums);
  double* masses = at<double>(slot, plan.masses);
  T* shifts = at<T>(slot, plan.shifts);
  T* tile = at<T>(slot, plan.tile);
  T* x = at<T>(slot, plan.rows);
  const std::int64_t blocks = plan.padded / L, chunk = plan.chunk, d = p.d;
  const Cooling<T> cool(p.beta);

  fill(sums, plan.padded * d, 0.0);
  fill(masses, plan.padded, 0.0);
  fill(shifts, plan.padded, -kInfinity<T>);

  const std::int64_t last = smaller(p.n, (s + 1) * plan.slot_rows);
  for (std::int64_t first = s * plan.slot_rows; first < last; first += chunk) {
    const std::int64_t rows = smaller(chunk, last - first);
    const std::int64_t filled = (rows + kEmRows - 1) / kEmRows * kEmRows;
    pack_rows<Storage>(p, first, rows, filled, x);

    Vec<T> most[em::kMaxChunk], sum[em::kMaxChunk];
    for (std::int64_t r = 0; r < rows; ++r) {
      most[r] = broadcast<T>(-kInfinity<T>);
      sum[r] = Vec<T>{};
    }
    for_each_group(blocks, [&](std::int64_t block, auto width) {
      constexpr int V = decltype(width)::value;
      T* h = tile + block * chunk * L;
      distances<T, V, false>(psi + block * d * L, nullptr, nullptr, x, d, filled, chunk, h,
                             nullptr);
      for (int v = 0; v < V; ++v) {
        const Vec<T> prior = load(log_prior + (block + v) * L);
        for (std::int64_t r = 0; r < rows; ++r) {
          T* to = h + (v * chunk + r) * L;
          const Vec<T> likelihood = cool(load(to));
          store(to, likelihood);
          most[r] = maximum(likelihood + prior, most[r]);
        }
      }
    });
    T normaliser[em::kMaxChunk], top[em::kMaxChunk];
    for (std::int64_t r = 0; r < rows; ++r) {
      top[r] = max_of_lanes<T>(most[r]);
      normaliser[r] = is_finite(top[r]) ? top[r] : T(0);
    }
    for (std::int64_t block = 0; block < blocks; ++block) {
      const Vec<T> prior = load(log_prior + block * L);
      const T* likelihood = tile + block * chunk * L;
      for (std::int64_t r = 0; r < rows; ++r)
        sum[r] += exp_not_above<T>(load(likelihood + r * L) + prior - normaliser[r]);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const T total = sum_of_lanes<T>(sum[r]);
      normaliser[r] =
          top[r] == kInfinity<T> ? kInfinity<T> : normaliser[r] + T(std::log(double(total)));
      set_element<T>(p.log_normaliser, first + r, normaliser[r]);
    }

    for_each_group(blocks, [&](std::int64_t block, auto width) {
      constexpr int V = decltype(width)::value;
      T* weights = tile + block * chunk * L;
      for (int v = 0; v < V; ++v) {
        T* w = weights + v * chunk * L;
        T* shift = shifts + (block + v) * L;
        Vec<T> highest = broadcast<T>(-kInfinity<T>);
        for (std::int64_t r = 0; r < rows; ++r)
          highest = maximum(load(w + r * L) - normaliser[r], highest);
        if (any_above<T>(highest, load(shift) + kSlack)) {
          T wanted[L];
          store(wanted, highest);
          for (int lane = 0; lane < L; ++lane) {
            if (!(wanted[lane] > shift[lane] + kSlack)) continue;
            const double factor = std::exp(double(shift[lane]) - double(wanted[lane]));
            shift[lane] = wanted[lane];
            masses[(block + v) * L + lane] *= factor;
            double* sums_of = sums + (block + v) * d * L + lane;
            for (std::int64_t k = 0; k < d; ++k) sums_of[k * L] *= factor;
          }
        }
        const Vec<T> given = load(shift);
        const Vec<T> bound = given == broadcast<T>(-kInfinity<T>) ? Vec<T>{} : given;
        Vec<T> mass = {};
        for (std::int64_t r = 0; r < rows; ++r) {
          const Vec<T> weight = exp_not_above<T>(load(w + r * L) - normaliser[r] - bound);
          store(w + r * L, weight);
          mass += weight;
        }
        add_to(masses + (block + v) * L, mass, 1);
      }
      accumulate_all<T, V, true>(weights, psi, x, d, rows, chunk, 1, sums + block * d * L);
    });
  }
}

// Joins the slots' sums for blocks [begin, end) of the vectors, in the slots' order.
template <class Storage>
void equilibrium_map_forward_join(const em::Forward& p, std::int64_t begin, std::int64_t end) {
  using T = typename Compute<Storage>::type;
  constexpr int L = kLanes<T>;
  const em::Plan& plan = p.plan;
  const Place<T> place{plan, p.scratch, p.d};
  double* joined = at<double>(place.slot(0), plan.sums);
  for (std::int64_t block = begin; block < end; ++block) {
    T bound[L];
    double mass[L] = {};
    for (int lane = 0; lane < L; ++lane) {
      bound[lane] = -kInfinity<T>;
      for (std::int64_t s = 0; s < plan.slots; ++s)
        bound[lane] = larger(bound[lane], at<T>(place.slot(s), plan.shifts)[block * L + lane]);
    }
    double* total = joined + block * p.d * L;
    for (std::int64_t s = 0; s < plan.slots; ++s) {
      double factor[L];
      const T* shift = at<T>(place.slot(s), plan.shifts) + block * L;
      const double* masses = at<double>(place.slot(s), plan.masses) + block * L;
      for (int lane = 0; lane < L; ++lane) {
        factor[lane] =
            shift[lane] == bound[lane] ? 1.0 : std::exp(double(shift[lane]) - double(bound[lane]));
        mass[lane] += factor[lane] * masses[lane];
      }
      const double* sums = at<double>(place.slot(s), plan.sums) + block * p.d * L;
      for (std::int64_t k = 0; k < p.d; ++k)
        for (int lane = 0; lane < L; ++lane)
          total[k * L + lane] =
              (s == 0 ? 0.0 : total[k * L + lane]) + factor[lane] * sums[k * L + lane];
    }
    for (int lane = 0; lane < L && block * L + lane < p.m; ++lane) {
      const std::int64_t a = block * L + lane;
      const double known = bound[lane] == -kInfinity<T> ? 0.0 : double(bound[lane]);
      set_element<T>(p.log_mass, a, T(known + std::log(mass[lane])));
      for (std::int64_t k = 0; k < p.d; ++k)
        set_element<T>(p.mapped, a, k, p.n == 0 ? T(0) : T(total[k * L + lane] / mass[lane]));
    }
  }
}

template <class Storage>
void equilibrium_map_backward_slot(const em::Backward& p, std::int64_t s) {
  using T = typename Compute<Storage>::type;
  constexpr int L = kLanes<T>;
  const em::Plan& plan = p.plan;
  const Place<T> place{plan, p.scratch, p.d};
  const T* psi = place.array(plan.psi);
  const T* grad_mapped = place.array(plan.grad_mapped);
  const T* log_mass = place.array(plan.log_mass);
  const T* prior_mass = place.array(plan.prior_mass);
  const T* means = place.array(plan.means);
  char* slot = place.slot(s);
  double* sums = at<double>(slot, plan.sums);
  double* priors = at<double>(slot, plan.masses);
  double* beta_sum = at<double>(slot, plan.beta_sum);
  T* first_tile = at<T>(slot, plan.tile);
  T* second_tile = at<T>(slot, plan.second_tile);
  T* by_rows = at<T>(slot, plan.by_rows);
  T* x = at<T>(slot, plan.rows);
  const std::int64_t blocks = plan.padded / L, chunk = plan.chunk, d = p.d;
  const Cooling<T> cool(p.beta);
  const T steepness = T(-2 / p.beta);
  const bool mapped = p.grad_mapped.data != nullptr;
  const bool wants_beta = p.grad_beta != nullptr, wants_psi = p.grad_psi.data != nullptr;
  const bool wants_x = p.grad_x.data != nullptr, narrow = d <= em::kNarrow;
  const bool wants_prior = p.grad_log_prior.data != nullptr;

  fill(sums, wants_psi ? plan.padded * d : 0, 0.0);
  fill(priors, plan.padded, 0.0);
  *beta_sum = 0;

  const std::int64_t last = smaller(p.n, (s + 1) * plan.slot_rows);
  for (std::int64_t first = s * plan.slot_rows; first < last; first += chunk) {
    const std::int64_t rows = smaller(chunk, last - first);
    const std::int64_t filled = (rows + kEmRows - 1) / kEmRows * kEmRows;
    pack_rows<Storage>(p, first, rows, filled, x);
    T normaliser[em::kMaxChunk];
    Vec<T> shares[em::kMaxChunk], priors_of[em::kMaxChunk];
    Vec<T> heats[em::kMaxChunk], prior_heats[em::kMaxChunk];
    for (std::int64_t r = 0; r < rows; ++r) {
      normaliser[r] = element<T>(p.log_normaliser, first + r);
      shares[r] = priors_of[r] = heats[r] = prior_heats[r] = Vec<T>{};
    }

    // w_ia, and E_ia = w_ia G_a . (x_i - F_a), the gradient of log w_ia.
    for_each_group(blocks, [&](std::int64_t block, auto width) {
      constexpr int V = decltype(width)::value;
      T* h = first_tile + block * chunk * L;
      T* dot = second_tile + block * chunk * L;
      const T* centres = psi + block * d * L;
      if (mapped)
        distances<T, V, true>(centres, grad_mapped + block * d * L, means + block * d * L, x, d,
                              filled, chunk, h, dot);
      else
        distances<T, V, false>(centres, nullptr, nullptr, x, d, filled, chunk, h, nullptr);
      for (int v = 0; v < V; ++v) {
        const Vec<T> mass = load(log_mass + (block + v) * L);
        const Vec<T> prior = load(prior_mass + (block + v) * L);
        for (std::int64_t r = 0; r < rows; ++r) {
          const std::int64_t j = (v * chunk + r) * L;
          const Vec<T> heat = load(h + j);
          const Vec<T> w = exp_not_above<T>(cool(heat) - normaliser[r] - mass);
          const Vec<T> share = mapped ? w * load(dot + j) : Vec<T>{};
          store(h + j, w);
          store(dot + j, share);
          shares[r] += share;
          priors_of[r] += w * prior;
          if (wants_beta) {
            heats[r] += share * heat;
            prior_heats[r] += w * prior * heat;
          }
        }
      }
    });
    T rest[em::kMaxChunk];
    double heat = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      const T given = p.grad_log_normaliser.data == nullptr
                          ? T(0)
                          : T(element<T>(p.grad_log_normaliser, first + r));
      rest[r] = given - (mapped ? sum_of_lanes<T>(shares[r]) : T(0));
      // The row's softmax sums to one only as exactly as its normaliser was rounded.
      const T whole = sum_of_lanes<T>(priors_of[r]);
      if (whole > 0) rest[r] /= whole;
      if (wants_beta)
        heat += double(sum_of_lanes<T>(heats[r])) +
                double(rest[r]) * double(sum_of_lanes<T>(prior_heats[r]));
    }
    *beta_sum += heat;
    if (!wants_psi && !wants_prior && !wants_x) continue;

    // Q_ia = E_ia + t_i p_ia, times -2 / beta.
    if (narrow) fill(by_rows, rows * d * L, T(0));
    for_each_group(blocks, [&](std::int64_t block, auto width) {
      constexpr int V = decltype(width)::value;
      const T* w = first_tile + block * chunk * L;
      T* slopes = second_tile + block * chunk * L;
      for (int v = 0; v < V; ++v) {
        const Vec<T> prior = load(prior_mass + (block + v) * L);
        Vec<T> total = {};
        for (std::int64_t r = 0; r < rows; ++r) {
          const std::int64_t j = (v * chunk + r) * L;
          const Vec<T> through_prior = load(w + j) * prior * rest[r];
          const Vec<T> slope = (load(slopes + j) + through_prior) * steepness;
          total += through_prior;
          store(slopes + j, slope);
          if (wants_x && !narrow) {
            T* of_row =
                by_rows + ((r / kEmRows * blocks + block + v) * 2 * kEmRows + r % kEmRows) * L;
            store(of_row, load(w + j));
            store(of_row + kEmRows * L, slope);
          }
        }
        if (wants_prior) add_to(priors + (block + v) * L, total, 1);
      }
      for (int v = 0; wants_x && narrow && v < V; ++v)
        add_row_gradients<T>(w + v * chunk * L, slopes + v * chunk * L, psi + (block + v) * d * L,
                             grad_mapped + (block + v) * d * L, x, d, rows, by_rows);
      if (wants_psi)
        accumulate_all<T, V, false>(slopes, psi + block * d * L, x, d, rows, chunk, -1,
                                    sums + block * d * L);
    });
    if (!wants_x) continue;
    if (narrow) {
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t k = 0; k < d; ++k)
          set_element<Storage>(p.grad_x, first + r, k,
                               sum_of_lanes<T>(load(by_rows + (r * d + k) * L)));
      continue;
    }
    const auto write = [&]<int K>(std::int64_t k, std::integral_constant<int, K>) {
      for (std::int64_t r = 0; r < rows; r += kEmRows) {
        T out[kEmRows][K];
        row_gradients<T, kEmRows, K>(by_rows + r * blocks * 2 * L, psi + k * L, grad_mapped + k * L,
                                     x + r * d + k, d, blocks, out);
        for (std::int64_t j = 0; j < kEmRows && r + j < rows; ++j)
          for (int c = 0; c < K; ++c)
            set_element<Storage>(p.grad_x, first + r + j, k + c, out[j][c]);
      }
    };
    std::int64_t k = 0;
    for (; k + kEmColumns <= d; k += kEmColumns)
      write(k, std::integral_constant<int, kEmColumns>{});
    for (; k + 2 <= d; k += 2) write(k, std::integral_constant<int, 2>{});
    for (; k < d; ++k) write(k, std::integral_constant<int, 1>{});
  }
}

template <class Storage>
void equilibrium_map_backward_join(const em::Backward& p, std::int64_t begin, std::int64_t end) {
  using T = typename Compute<Storage>::type;
  constexpr int L = kLanes<T>;
  const em::Plan& plan = p.plan;
  const Place<T> place{plan, p.scratch, p.d};
  for (std::int64_t block = begin; block < end; ++block) {
    for (std::int64_t k = 0; p.grad_psi.data != nullptr && k < p.d; ++k) {
      double total[L] = {};
      for (std::int64_t s = 0; s < plan.slots; ++s) {
        const double* sums = at<double>(place.slot(s), plan.sums) + (block * p.d + k) * L;
        for (int lane = 0; lane < L; ++lane) total[lane] += sums[lane];
      }
      for (int lane = 0; lane < L && block * L + lane < p.m; ++lane)
        set_element<Storage>(p.grad_psi, block * L + lane, k, T(total[lane]));
    }
    for (int lane = 0; p.grad_log_prior.data != nullptr && lane < L && block * L + lane < p.m;
         ++lane) {
      double total = 0;
      for (std::int64_t s = 0; s < plan.slots; ++s)
        total += at<double>(place.slot(s), plan.masses)[block * L + lane];
      set_element<Storage>(p.grad_log_prior, block * L + lane, T(total));
    }
  }
  if (begin == 0 && p.grad_beta != nullptr) {
    *p.grad_beta = 0;
    for (std::int64_t s = 0; s < plan.slots; ++s)
      *p.grad_beta += *at<double>(place.slot(s), plan.beta_sum) / p.beta / p.beta;
  }
}

// Vectors [begin, end) in units of kPad are packed, or joined; between the two, slots are worked
// on.
template <class Storage>
constexpr std::int64_t kEmBlocks = em::kPad / kLanes<typename Compute<Storage>::type>;

void equilibrium_map_forward_pack(const em::Forward& params, std::int64_t begin, std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    pack_vectors<Storage>(params, nullptr, begin * kEmBlocks<Storage>, end * kEmBlocks<Storage>);
  });
}
void equilibrium_map_forward(const em::Forward& params, std::int64_t begin, std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    for (std::int64_t s = begin; s < end; ++s) equilibrium_map_forward_slot<Storage>(params, s);
  });
}
void equilibrium_map_forward_finish(const em::Forward& params, std::int64_t begin,
                                    std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    equilibrium_map_forward_join<Storage>(params, begin * kEmBlocks<Storage>,
                                          end * kEmBlocks<Storage>);
  });
}

void equilibrium_map_backward_pack(const em::Backward& params, std::int64_t begin,
                                   std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    pack_vectors<Storage>(params, &params, begin * kEmBlocks<Storage>, end * kEmBlocks<Storage>);
  });
}
void equilibrium_map_backward(const em::Backward& params, std::int64_t begin, std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    for (std::int64_t s = begin; s < end; ++s) equilibrium_map_backward_slot<Storage>(params, s);
  });
}
void equilibrium_map_backward_finish(const em::Backward& params, std::int64_t begin,
                                     std::int64_t end) {
  visit_storage(params.dtype, [&]<class Storage>(Storage*) {
    equilibrium_map_backward_join<Storage>(params, begin * kEmBlocks<Storage>,
                                           end * kEmBlocks<Storage>);
  });
}

}  // namespace
}  // namespace geco::cpu
