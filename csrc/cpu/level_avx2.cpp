#include "cpu/level.h"

namespace geco::cpu {
extern const Kernels kKernels_avx2;
const Kernels kKernels_avx2 = kKernels;
}  // namespace geco::cpu
