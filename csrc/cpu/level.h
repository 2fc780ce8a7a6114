// Gathers the kernels of one instruction-set level. Each level_*.cpp includes this once, names its
// table and is compiled with that level's flags; no other file may include the kernels.
#pragma once

#include "cpu/geco_update.h"
#include "cpu/kernels.h"
#include "cpu/lstm_gates.h"
#include "cpu/pncc.h"

namespace geco::cpu {
namespace {

constexpr Kernels kKernels = {
    .geco_update_step = geco_update_step,
    .lstm_gates_forward = lstm_gates_forward,
    .lstm_gates_backward = lstm_gates_backward,
    .pncc_forward_scratch = pncc_forward_scratch,
    .pncc_backward_scratch = pncc_backward_scratch,
    .pncc_forward = pncc_forward,
    .pncc_backward = pncc_backward,
    .pncc_finish = pncc_finish,
};

}  // namespace
}  // namespace geco::cpu
