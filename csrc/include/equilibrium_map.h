// Fixed-point map of reconstruction vectors psi [m, d] under data x [n, d]:
//   H_ia = |x_i - psi_a|^2,  Z_i = log sum_b exp(log_prior_b - H_ib / beta)
//   t_ia = -H_ia / beta - Z_i,  log_mass_a = log sum_i exp(t_ia)
//   F_a  = sum_i w_ia x_i  with  w_ia = exp(t_ia - log_mass_a)
#pragma once

#include <algorithm>
#include <cstdint>

#include "include/numeric.h"
#include "include/strided.h"

namespace geco::equilibrium_map {

// Vectors are padded to this many: a multiple of every instruction set's lanes.
constexpr std::int64_t kPad = 16;
constexpr std::int64_t kMaxChunk = 64;
// Up to this many dimensions a chunk is short, and gradients of its rows stay near the core.
constexpr std::int64_t kNarrow = 16;

using geco::Matrix;
struct Vector {
  void* data;
  std::int64_t step;
};

// Where the work is done. The data are cut into `slots` runs of whole chunks, by the sizes alone:
// each slot has sums of its own, so results do not depend on the threads. Offsets are in bytes from
// the start of the scratch memory, or of a slot's part of it.
struct Plan {
  std::int64_t padded, chunk, slots, slot_rows;
  // Packed [padded / lanes][d][lanes] or [padded], of the arithmetic's type.
  std::int64_t psi, grad_mapped, means, log_prior, log_mass, prior_mass;
  std::int64_t first_slot, slot_bytes;
  // Sums in float64, [padded / lanes][d][lanes], [padded] and [1].
  std::int64_t sums, masses, beta_sum;
  // Of the arithmetic's type: [padded], two [padded / lanes][chunk][lanes], both again in groups of
  // rows or, of few dimensions, the rows' gradients [chunk][d][lanes], and [chunk][d].
  std::int64_t shifts, tile, second_tile, by_rows, rows;
  std::int64_t bytes;
};

inline Plan make_plan(std::int64_t n, std::int64_t m, std::int64_t d, std::int64_t element_size,
                      bool backward) {
  constexpr std::int64_t kGroup = 8;
  const auto round_up = [](std::int64_t value, std::int64_t to) {
    return (value + to - 1) / to * to;
  };
  Plan plan{};
  plan.padded = round_up(m, kPad);
  // Few dimensions: the tiles stay near the core. Many: sums and vectors are read once a chunk.
  const std::int64_t wanted = d <= kNarrow ? 16 : kMaxChunk;
  const std::int64_t fits = (std::int64_t(1) << 18) / std::max<std::int64_t>(1, plan.padded);
  plan.chunk = std::clamp(fits / kGroup * kGroup, kGroup, wanted);
  plan.chunk = std::min(plan.chunk, round_up(std::max<std::int64_t>(n, 1), kGroup));

  std::int64_t end = 0;
  const auto place = [&](std::int64_t count, std::int64_t size) {
    const std::int64_t offset = end;
    end += round_up(count * size, 64);
    return offset;
  };
  const std::int64_t matrix = plan.padded * d;
  plan.sums = place(matrix, 8);
  plan.masses = place(plan.padded, 8);
  plan.beta_sum = place(1, 8);
  plan.shifts = place(backward ? 0 : plan.padded, element_size);
  plan.tile = place(plan.padded * plan.chunk, element_size);
  plan.second_tile = place(backward ? plan.padded * plan.chunk : 0, element_size);
  plan.by_rows = place(!backward      ? 0
                       : d <= kNarrow ? plan.chunk * d * kPad
                                      : 2 * plan.padded * plan.chunk,
                       element_size);
  plan.rows = place(plan.chunk * d, element_size);
  plan.slot_bytes = end;

  constexpr std::int64_t kSlotRows = 512, kMostSlots = 32, kFewestSlots = 4;
  constexpr std::int64_t kSlotMemory = std::int64_t(1) << 26;
  const std::int64_t most = std::clamp(kSlotMemory / std::max<std::int64_t>(1, plan.slot_bytes),
                                       kFewestSlots, kMostSlots);
  const std::int64_t slots = std::clamp<std::int64_t>(n / kSlotRows, 1, most);
  plan.slot_rows = round_up(std::max<std::int64_t>(1, (n + slots - 1) / slots), plan.chunk);
  plan.slots = std::max<std::int64_t>(1, (n + plan.slot_rows - 1) / plan.slot_rows);

  end = 0;
  plan.psi = place(matrix, element_size);
  plan.grad_mapped = place(backward ? matrix : 0, element_size);
  plan.means = place(backward ? matrix : 0, element_size);
  plan.log_prior = place(plan.padded, element_size);
  plan.log_mass = place(plan.padded, element_size);
  plan.prior_mass = place(plan.padded, element_size);
  plan.first_slot = end;
  plan.bytes = end + plan.slots * plan.slot_bytes;
  return plan;
}

// x, psi, log_prior and their gradients are of `dtype`; the rest is of the arithmetic's type.
struct Operands {
  DType dtype;
  std::int64_t n, m, d;
  double beta;
  Matrix x, psi;
  Vector log_prior;
  Matrix mapped;
  Vector log_normaliser, log_mass;
  Plan plan;
  char* scratch;
};

struct Forward : Operands {};

// Gradients that are absent stand for zeros, those to be written for ones that nobody wants.
struct Backward : Operands {
  Matrix grad_mapped;
  Vector grad_log_normaliser;
  Matrix grad_x, grad_psi;
  Vector grad_log_prior;
  double* grad_beta;
};

constexpr int kVectorsOfBlock = 64;

// The same on a GPU, where beta is a number in its memory, the data are cut into `splits` runs of
// `split_rows`, each with sums of its own in float64, and what there is of scratch memory is named.
struct OnDevice {
  DType dtype;
  std::int64_t n, m, d;
  const void* beta;
  DType beta_dtype;
  Matrix x, psi;
  Vector log_prior;
  double uniform;  // the logarithm of each prior without it
  Matrix mapped;
  void *log_normaliser, *log_mass;  // dense
  std::int64_t splits, split_rows;
};

struct ForwardOnDevice : OnDevice {
  double *bounds, *masses;  // [splits, m]
  double* means;            // [splits, m, d]
};

// Scratch for gradients that nobody wants is absent, too.
struct BackwardOnDevice : OnDevice {
  Matrix grad_mapped;
  Vector grad_log_normaliser;
  Matrix grad_x, grad_psi;
  Vector grad_log_prior;
  void* grad_beta;
  void* rest;          // [n], of the arithmetic's type
  void* sums;          // [n, d], of the arithmetic's type: gradients to x of the vectors so far
  double* psi_sums;    // [splits, m, d]
  double* prior_sums;  // [splits, m]
  double* beta_sums;   // [splits, blocks of vectors]
};

}  // namespace geco::equilibrium_map
