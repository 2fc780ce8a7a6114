// The Python side of the library: what it was built with and which instructions it uses.
// The operators themselves are registered with torch in register.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  int count = 0;
  const geco::cpu::Level* levels = geco::cpu::levels(&count);
  for (int k = 0; k < count; ++k)
    if (levels[k].supported()) names.emplace_back(levels[k].name);
  return names;
}

void set_instruction_set(const std::string& name) {
  if (geco::cpu::choose(name.c_str())) return;
  std::string known;
  for (const std::string& each : instruction_sets()) known += (known.empty() ? "" : ", ") + each;
  throw std::invalid_argument("name must be an instruction set this CPU has (" + known +
                              "), got '" + name + "'");
}

// Operations per second of this thread, over at least that many seconds.
double fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  const py::gil_scoped_release release;
  const auto run = geco::cpu::active().kernels->multiply_adds;
  constexpr std::int64_t kRounds = 1 << 16;
  float sink[] = {0.999f, 0.001f, 0.0f};
  run(kRounds, sink);
  const Clock::time_point start = Clock::now();
  double operations = 0, elapsed = 0;
  while (elapsed < seconds) {
    operations += double(run(kRounds, sink));
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return operations / elapsed;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cxx"] = long(__cplusplus);
  info["torch_target"] = GECO_TORCH_TARGET;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler, C++ standard and oldest torch this library runs on.");
  m.def("instruction_sets", &instruction_sets, "Instruction sets this CPU has, least first.");
  m.def("instruction_set", [] { return geco::cpu::active().name; }, "The instruction set in use.");
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"),
        "Use another instruction set for all later calls of this process.");
  m.def("fma_peak", &fma_peak, py::arg("seconds"),
        "Measure float32 operations per second of this thread: multiply-adds on registers.");
}
