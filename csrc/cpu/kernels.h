// The CPU kernels of one instruction-set level, and the choice among levels.
// A kernel serves the elements [begin, end) of its index space, so a caller can share them out.
#pragma once

#include <cstdint>

#include "include/geco_update.h"
#include "include/lstm_gates.h"
#include "include/pncc.h"

namespace geco::cpu {

struct Kernels {
  void (*geco_update_step)(const geco_update::Params&);
  void (*lstm_gates_forward)(const lstm_gates::Forward&, std::int64_t begin, std::int64_t end);
  void (*lstm_gates_backward)(const lstm_gates::Backward&, std::int64_t begin, std::int64_t end);
  // Scratch memory is the caller's, of as many doubles as are asked for.
  std::int64_t (*pncc_forward_scratch)(const pncc::Forward&);
  std::int64_t (*pncc_backward_scratch)(const pncc::Backward&);
  void (*pncc_forward)(const pncc::Forward&, std::int64_t begin, std::int64_t end, double* scratch);
  void (*pncc_backward)(const pncc::Backward&, std::int64_t begin, std::int64_t end,
                        double* scratch);
  void (*pncc_finish)(const pncc::Forward&);
};

struct Level {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

// From the least to the most capable; the first runs everywhere.
const Level* levels(int* count);

// The level in use: the most capable one that this CPU supports, unless another was chosen.
const Level& active();

// False if the name is unknown or this CPU lacks the instructions.
bool choose(const char* name);

}  // namespace geco::cpu
