// A clean kernel and the same with one fault planted, run by name: `faults NAME THREADS BLOCKS`,
// the last two the orders that threads and blocks run in. Prints the sums of 4 blocks of 64 numbers
// as bits.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "cuda/common.cuh"

namespace {

using geco::cuda::read;
using geco::cuda::shared_memory;
using geco::cuda::write;

constexpr int kSize = 64, kBlocks = 4;

enum class Fault {
  kNone,
  kGlobalBounds,
  kSharedBounds,
  kBarrierMissing,
  kBarrierDiverged,
  kSharedUninitialised,
  kBlockOrder,
  kMaskDiverged,
  kMaskForeign,
  kMisaligned,
};

const char* const kNames[] = {"none",
                              "global-bounds",
                              "shared-bounds",
                              "barrier-missing",
                              "barrier-diverged",
                              "shared-uninitialised",
                              "block-order",
                              "mask-diverged",
                              "mask-foreign",
                              "misaligned"};

template <Fault kFault>
__global__ void sum_kernel(const float* x, float* sums) {
  const int thread = int(threadIdx.x), block = int(blockIdx.x);
  float* const tile = shared_memory<float>();
  const int shift = kFault == Fault::kGlobalBounds && block == kBlocks - 1 ? 1 : 0;
  const float own = read(x + block * kSize + thread + shift);
  if (kFault == Fault::kMisaligned)
    write(reinterpret_cast<geco::cuda::Pack<float, 4>*>(sums + 1), {});
  if (kFault != Fault::kSharedUninitialised || thread != 5)
    tile[thread + (kFault == Fault::kSharedBounds ? 1 : 0)] = own;
  if (kFault == Fault::kBarrierDiverged && thread >= 32) return;
  if (kFault != Fault::kBarrierMissing) __syncthreads();
  // Each warp adds what the other one read.
  float sum = tile[(thread + 32) % kSize];
  unsigned mask = ~0u;
  if (kFault == Fault::kMaskForeign) mask = 0xffff;
  if (kFault == Fault::kMaskDiverged && thread % 32 >= 16) return;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(mask, sum, distance);
  __syncthreads();
  if (thread % 32 == 0) tile[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    float total = tile[0] + tile[1];
    if (kFault == Fault::kBlockOrder) total += 1e-3f * read(sums + (block + 1) % kBlocks);
    write(sums + block, total);
  }
}

template <int kFirst = 0>
bool run(const std::string& name, const float* x, float* sums) {
  if constexpr (kFirst < int(std::size(kNames))) {
    if (name != kNames[kFirst]) return run<kFirst + 1>(name, x, sums);
    geco::cuda::launch(sum_kernel<Fault(kFirst)>, kBlocks, kSize, kSize * sizeof(float), nullptr, x,
                       sums);
    return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  using geco::emulation::Order;
  if (argc != 4) return 2;
  geco::emulation::set_order(Order(std::atoi(argv[2])), Order(std::atoi(argv[3])));
  const std::unique_ptr<float[]> x(new float[kBlocks * kSize]);
  for (int k = 0; k < kBlocks * kSize; ++k) x[std::size_t(k)] = 1.0f / float(1 + k);
  alignas(16) float sums[8] = {1, 2, 3, 4};
  geco::emulation::reset_traffic(true);
  if (!run(argv[1], x.get(), sums)) return 2;
  for (int k = 0; k < kBlocks; ++k) {
    unsigned bits;
    std::memcpy(&bits, &sums[k], sizeof bits);
    std::printf("%08x ", bits);
  }
  const geco::emulation::Traffic moved = geco::emulation::traffic();
  std::printf("%d %d %d %d\n", int(moved.loaded), int(moved.stored), int(moved.sectors),
              int(moved.least_sectors));
}
