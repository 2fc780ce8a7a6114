// The Python side of the library: what it was built with and which instructions it uses.
// The operators themselves are registered with torch in register.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
}
