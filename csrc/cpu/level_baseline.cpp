#include "cpu/level.h"

namespace geco::cpu {
extern const Kernels kKernels_baseline;
const Kernels kKernels_baseline = kKernels;
}  // namespace geco::cpu
