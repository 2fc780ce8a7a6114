#include "cpu/level.h"

namespace geco::cpu {
extern const Kernels kKernels_avx512;
const Kernels kKernels_avx512 = kKernels;
}  // namespace geco::cpu
