// Multiply-adds on registers, in as many independent chains as hide their latency: the arithmetic
// peak that benchmarks measure kernels against.
#pragma once

#include "cpu/simd.h"

namespace geco::cpu {
namespace {

std::int64_t multiply_adds(std::int64_t rounds, float* sink) {
  // With two constants they fill half of AVX-512's registers and most of the others'.
  constexpr int kChains = 12;
  // Read from memory, so that the compiler knows no values; the chains stay finite.
  const VecF32 factor = broadcast(sink[0]), term = broadcast(sink[1]);
  VecF32 chain[kChains];
  for (int k = 0; k < kChains; ++k) chain[k] = broadcast(float(k));
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int k = 0; k < kChains; ++k) chain[k] = chain[k] * factor + term;
  }
  VecF32 sum{};
  for (int k = 0; k < kChains; ++k) sum += chain[k];
  sink[2] = sum[0];
  return 2 * rounds * kChains * kLanes<float>;
}

}  // namespace
}  // namespace geco::cpu
