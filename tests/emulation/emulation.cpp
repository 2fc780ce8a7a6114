#include "emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace geco::emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 256 * 1024;
constexpr std::size_t kMostThreads = 1024;
constexpr std::int64_t kSector = 32;

[[noreturn]] void fail(const char* what, unsigned count = 0) {
  std::fprintf(stderr, "emulation: block (%u, %u, %u), thread %u: ", blockIdx.x, blockIdx.y,
               blockIdx.z, threadIdx.x);
  std::fprintf(stderr, what, count);
  std::fputc('\n', stderr);
  std::abort();
}

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;
  State state;
  uint3 index;
  // What it waits for in its warp, and what it brought.
  unsigned mask;
  int source;
  std::size_t bytes;
  alignas(16) unsigned char value[16];
  // How often it came to each line.
  std::map<int, int> visits;
};

struct Access {
  unsigned warp;
  int line, visit;
  bool is_store;
  std::uintptr_t address;
  std::size_t bytes;
};

std::vector<Thread> threads;
Thread* running = nullptr;
std::size_t count = 0;
ucontext_t scheduler;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_size = 0;
Body entry = nullptr;
void* entry_closure = nullptr;
unsigned char* shared = nullptr;

Order thread_order = Order::kForward, block_order = Order::kForward;
std::mt19937 generator{1};
bool is_counting = false;
Traffic counted{};
std::vector<Access> accesses;

void arrived(void* fake_stack, const void** bottom, std::size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
#else
  (void)fake_stack, (void)bottom, (void)size;
#endif
}

void leaving(void** fake_stack, const void* bottom, std::size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
#else
  (void)fake_stack, (void)bottom, (void)size;
#endif
}

// Back to the scheduler; returns when the thread is resumed.
void yield(State state) {
  Thread& thread = *running;
  thread.state = state;
  const bool is_last = state == State::kDone;
  leaving(is_last ? nullptr : &thread.fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&thread.context, &scheduler);
  arrived(thread.fake_stack, nullptr, nullptr);
}

void start() {
  arrived(nullptr, &scheduler_stack, &scheduler_stack_size);
  entry(entry_closure);
  yield(State::kDone);
}

void resume(Thread& thread) {
  running = &thread;
  threadIdx = thread.index;
  void* fake_stack = nullptr;
  leaving(&fake_stack, thread.stack.get(), kStack);
  swapcontext(&scheduler, &thread.context);
  arrived(fake_stack, nullptr, nullptr);
}

// Lets the lanes go on that wait for one another in a warp and have all come.
bool release_warp(std::size_t first) {
  const std::size_t lanes = std::min<std::size_t>(kWarp, count - first);
  for (std::size_t k = 0; k < lanes; ++k) {
    const Thread& thread = threads[first + k];
    if (thread.state != State::kInWarp) continue;
    const unsigned mask = thread.mask;
    running = &threads[first + k];
    threadIdx = thread.index;
    if (!(mask >> k & 1)) fail("its lane is not in the mask that it waits with");
    bool is_whole = true;
    for (std::size_t n = 0; n < kWarp; ++n) {
      if (!(mask >> n & 1)) continue;
      if (n >= lanes || threads[first + n].state == State::kDone)
        fail("waits for lane %u, which will not come", unsigned(n));
      const Thread& other = threads[first + n];
      is_whole &= other.state == State::kInWarp && other.mask == mask;
    }
    if (!is_whole) continue;
    unsigned char values[kWarp][16];
    for (std::size_t n = 0; n < lanes; ++n)
      std::memcpy(values[n], threads[first + n].value, sizeof values[n]);
    for (std::size_t n = 0; n < lanes; ++n) {
      if (!(mask >> n & 1)) continue;
      Thread& each = threads[first + n];
      running = &each;
      threadIdx = each.index;
      if (!(mask >> each.source & 1))
        fail("reads from lane %u, which is not in the mask", unsigned(each.source));
      std::memcpy(each.value, values[each.source], sizeof each.value);
      each.state = State::kReady;
    }
    return true;
  }
  return false;
}

bool release_block() {
  const auto is = [](State state) {
    return std::count_if(threads.begin(), threads.begin() + std::ptrdiff_t(count),
                         [state](const Thread& t) { return t.state == state; });
  };
  const std::ptrdiff_t waiting = is(State::kAtBarrier);
  if (waiting == 0) return false;
  if (std::size_t(waiting) != count) {
    if (is(State::kReady) || is(State::kInWarp)) return false;
    fail("a barrier that %u threads of the block never reach", unsigned(count - waiting));
  }
  for (std::size_t k = 0; k < count; ++k) threads[k].state = State::kReady;
  return true;
}

std::vector<std::size_t> in_order(std::size_t size, Order order) {
  std::vector<std::size_t> found(size);
  std::iota(found.begin(), found.end(), 0);
  if (order == Order::kReverse) std::reverse(found.begin(), found.end());
  if (order == Order::kShuffled) std::shuffle(found.begin(), found.end(), generator);
  return found;
}

void count_sectors() {
  const auto key = [](const Access& a) { return std::tuple(a.warp, a.line, a.visit, a.is_store); };
  std::sort(accesses.begin(), accesses.end(), [&](const Access& a, const Access& b) {
    return std::tuple(key(a), a.address) < std::tuple(key(b), b.address);
  });
  for (std::size_t k = 0; k < accesses.size();) {
    const auto group = key(accesses[k]);
    std::int64_t bytes = 0;
    std::uintptr_t end = 0, next_sector = 0;
    for (; k < accesses.size() && key(accesses[k]) == group; ++k) {
      // Lanes that read the same are served by one sector.
      const std::uintptr_t first = std::max(accesses[k].address, end);
      const std::uintptr_t last = accesses[k].address + accesses[k].bytes;
      if (last <= first) continue;
      bytes += std::int64_t(last - first);
      end = last;
      const std::uintptr_t from = std::max(first / kSector, next_sector);
      const std::uintptr_t to = (last - 1) / kSector + 1;
      if (to > from) {
        counted.sectors += std::int64_t(to - from);
        next_sector = to;
      }
    }
    (std::get<3>(group) ? counted.stored : counted.loaded) += bytes;
    counted.least_sectors += (bytes + kSector - 1) / kSector;
  }
  accesses.clear();
}

void run_block(dim3 block, std::size_t shared_bytes) {
  const std::unique_ptr<unsigned char[]> memory(new unsigned char[shared_bytes]);
  std::memset(memory.get(), 0xff, shared_bytes);
  shared = memory.get();
  for (std::size_t k = 0; k < count; ++k) {
    Thread& thread = threads[k];
    thread.state = State::kReady;
    thread.fake_stack = nullptr;
    thread.visits.clear();
    thread.index = {unsigned(k) % block.x, unsigned(k) / block.x % block.y,
                    unsigned(k) / block.x / block.y};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, start, 0);
  }
  const std::vector<std::size_t> order = in_order(count, thread_order);
  for (;;) {
    bool is_done = true, has_run = false;
    for (const std::size_t k : order) {
      if (threads[k].state == State::kReady) {
        resume(threads[k]);
        has_run = true;
      }
      is_done &= threads[k].state == State::kDone;
    }
    if (is_done) break;
    for (std::size_t first = 0; first < count; first += kWarp) has_run |= release_warp(first);
    if (!has_run && !release_block()) fail("threads wait for one another for ever");
  }
  if (is_counting) count_sectors();
}

}  // namespace

int lane() { return int((running - threads.data()) % kWarp); }

void wait_for_block() { yield(State::kAtBarrier); }

void wait_for_warp(unsigned mask) {
  unsigned char none = 0;
  exchange(mask, &none, sizeof none, lane());
}

void exchange(unsigned mask, void* value, std::size_t bytes, int source) {
  running->mask = mask;
  running->source = source;
  std::memcpy(running->value, value, bytes);
  yield(State::kInWarp);
  std::memcpy(value, running->value, bytes);
}

void* shared_memory() { return shared; }

void touch(const void* address, std::size_t bytes, int line, bool is_store) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  if (at % bytes != 0)
    fail("an address that is no multiple of the access's %u bytes", unsigned(bytes));
  if (!is_counting) return;
  const unsigned warp = unsigned((running - threads.data()) / kWarp);
  accesses.push_back({warp, line, running->visits[line]++, is_store, at, bytes});
}

void set_order(Order of_threads, Order of_blocks) {
  thread_order = of_threads;
  block_order = of_blocks;
  generator.seed(1);
}

void reset_traffic(bool counting) {
  is_counting = counting;
  counted = {};
}

Traffic traffic() { return counted; }

void run(dim3 grid, dim3 block, std::size_t shared_bytes, Body body, void* closure) {
  count = std::size_t(block.x) * block.y * block.z;
  if (count == 0 || count > kMostThreads) fail("a block of %u threads", unsigned(count));
  if (shared_bytes > 99 * 1024) fail("%u bytes of shared memory", unsigned(shared_bytes));
  if (threads.size() < count) threads.resize(count);
  gridDim = grid;
  blockDim = block;
  entry = body;
  entry_closure = closure;
  for (const std::size_t k : in_order(std::size_t(grid.x) * grid.y * grid.z, block_order)) {
    blockIdx = {unsigned(k % grid.x), unsigned(k / grid.x % grid.y), unsigned(k / grid.x / grid.y)};
    run_block(block, shared_bytes);
  }
}

}  // namespace geco::emulation

// For Python.
#define GECO_EXPORT extern "C" __attribute__((visibility("default")))

GECO_EXPORT void geco_emulation_set_order(int threads, int blocks) {
  geco::emulation::set_order(geco::emulation::Order(threads), geco::emulation::Order(blocks));
}

GECO_EXPORT void geco_emulation_reset_traffic() { geco::emulation::reset_traffic(true); }

GECO_EXPORT void geco_emulation_traffic(std::int64_t* loaded_stored_sectors_least) {
  const geco::emulation::Traffic moved = geco::emulation::traffic();
  std::memcpy(loaded_stored_sectors_least, &moved, sizeof moved);
}
