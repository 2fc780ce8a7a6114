// Chooses the instruction-set level at run time.
#include <atomic>
#include <cstring>

#include "cpu/kernels.h"

namespace geco::cpu {

extern const Kernels kKernels_baseline;
#if defined(__x86_64__)
extern const Kernels kKernels_avx2;
extern const Kernels kKernels_avx512;
#endif

namespace {

const Level kLevels[] = {
    {"baseline", [] { return true; }, &kKernels_baseline},
#if defined(__x86_64__)
    {"avx2",
     [] {
       return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c"));
     },
     &kKernels_avx2},
    {"avx512",
     [] {
       return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
     },
     &kKernels_avx512},
#endif
};
constexpr int kCount = int(sizeof(kLevels) / sizeof(kLevels[0]));

const Level* best() {
  const Level* found = &kLevels[0];
  for (const Level& level : kLevels)
    if (level.supported()) found = &level;
  return found;
}

std::atomic<const Level*>& current() {
  static std::atomic<const Level*> level{best()};
  return level;
}

}  // namespace

const Level* levels(int* count) {
  *count = kCount;
  return kLevels;
}

const Level& active() { return *current().load(std::memory_order_relaxed); }

bool choose(const char* name) {
  for (const Level& level : kLevels) {
    if (std::strcmp(level.name, name) != 0 || !level.supported()) continue;
    current().store(&level, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace geco::cpu
