// CUDA kernels on the CPU, for tests. Blocks run one after another; a block's threads are fibers of
// one thread of the processor, which switch where they wait for one another. So an access out of
// bounds is the sanitizers' to find, in shared memory too, which is a fresh allocation of exactly
// the bytes asked for, filled with 0xff (NaN). Threads and blocks run in a chosen order: what
// depends on it is a race. Whatever is wrong ends the process with one line that says what.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime.h"

namespace geco::emulation {

enum class Order : int { kForward, kReverse, kShuffled };

// Global memory in all launches since `reset_traffic`: bytes that the accesses of warps loaded and
// stored, each once where lanes share it, sectors of 32 bytes that they touched, and the fewest
// that as many bytes fill.
struct Traffic {
  std::int64_t loaded, stored, sectors, least_sectors;
};

void set_order(Order threads, Order blocks);
void reset_traffic(bool counting);
Traffic traffic();

// One access of the running thread to global memory, made at a line of its kernel.
void touch(const void* address, std::size_t bytes, int line, bool is_store);

// The running block's dynamic shared memory.
void* shared_memory();

using Body = void (*)(void* closure);
void run(dim3 grid, dim3 block, std::size_t shared_bytes, Body body, void* closure);

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
            const Arguments&... arguments) {
  auto body = [&] { kernel(arguments...); };
  run(
      grid, block, shared_bytes, [](void* closure) { (*static_cast<decltype(body)*>(closure))(); },
      &body);
}

}  // namespace geco::emulation
