// viops._C: collects each op's bind(), and tells what was built and what runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_level.h"
#include "common/cuda_info.h"
#include "common/tensor_view.h"
#include "common/threads.h"

namespace py = pybind11;

namespace viops {
#define VIOPS_OP(op)              \
  namespace op {                  \
  void bind(py::module_& module); \
  }
#include "ops.inc"
#undef VIOPS_OP
}  // namespace viops

PYBIND11_MODULE(_C, module) {
  using namespace viops;
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const TypeMismatch& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
  cpu_level();  // so that a VIOPS_CPU_LEVEL that this machine lacks is an error of loading

  module.def("cpu_level", [] { return name_of(cpu_level()); }, "The CPU level in use.");
  module.def(
      "cpu_levels",
      [] {
        std::vector<std::string> names;
        for (int level = 0; level <= static_cast<int>(highest_cpu_level()); ++level) {
          names.push_back(name_of(static_cast<CpuLevel>(level)));
        }
        return names;
      },
      "The levels that were built and that this machine has, lowest first.");
  module.def("set_cpu_level", [](const std::string& name) { set_cpu_level(name.c_str()); });
  module.def(
      "threads",
      [] {
        py::dict threads;
        threads["runtime"] = openmp_runtime();
        threads["max_threads"] = max_threads();
        return threads;
      },
      "The OpenMP runtime in use and how many threads a loop may take.");
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = VIOPS_COMPILER;
        info["cuda_architectures"] = cuda_architectures();
        info["cuda_version"] = cuda_version().empty() ? py::none() : py::object(py::str(cuda_version()));
        info["cuda_reason"] = cuda_reason().empty() ? py::none() : py::object(py::str(cuda_reason()));
        return info;
      },
      "What this extension was built with.");
  module.def(
      "cuda_devices", [] { return cuda_devices(); },
      "How many CUDA devices the CUDA part sees; RuntimeError with the reason where it cannot look.");

#define VIOPS_OP(op) op::bind(module);
#include "ops.inc"
#undef VIOPS_OP
}
