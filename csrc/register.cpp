// Kernels for the operators whose schemas geco_fast/_registry.py defines: one line each.
#include "ops/geco_update.h"
#include "ops/lstm_gates.h"
#include "ops/pncc.h"

STABLE_TORCH_LIBRARY_IMPL(geco_fast, CPU, m) {
  m.impl("geco_update", TORCH_BOX(&geco::geco_update_cpu));
  m.impl("lstm_gates", TORCH_BOX(&geco::lstm_gates_cpu));
  m.impl("lstm_gates_backward", TORCH_BOX(&geco::lstm_gates_backward_cpu));
  m.impl("lncc", TORCH_BOX(&geco::lncc_cpu));
  m.impl("lncc_backward", TORCH_BOX(&geco::lncc_backward_cpu));
  m.impl("pncc", TORCH_BOX(&geco::pncc_cpu));
  m.impl("pncc_backward", TORCH_BOX(&geco::pncc_backward_cpu));
}
