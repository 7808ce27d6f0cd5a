// viops._C's functions of the ops that have CUDA sources, on tensors of the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_level.h"
#include "common/tensor_view.h"
#include "executor.h"

namespace py = pybind11;

namespace viops {
#define VIOPS_OP(op)              \
  namespace op {                  \
  void bind(py::module_& module); \
  }
#include "ops.inc"
#undef VIOPS_OP
// bind.cpp asks for it, and comes to no kernel by it.
CpuLevel cpu_level() { throw std::runtime_error("a build for tests, without CPU kernels"); }

}  // namespace viops

PYBIND11_MODULE(_C_cuda_on_host, module) {
  using namespace viops;
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const TypeMismatch& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
  module.def(
      "set_thread_order",
      [](const std::string& order, uint64_t seed) {
        using on_host::Order;
        if (order != "forward" && order != "reverse" && order != "random") {
          throw std::invalid_argument("order: expected forward, reverse or random, got " + order);
        }
        on_host::settings().order = order == "forward"   ? Order::forward
                                    : order == "reverse" ? Order::reverse
                                                         : Order::random;
        on_host::settings().seed = seed;
      },
      py::arg("order"), py::arg("seed") = 0, "The order in which threads and blocks run from now on.");
  module.def("build_info", [] {
    py::dict info;
    info["cuda_architectures"] = std::vector<std::string>{"host"};
    return info;
  });
#define VIOPS_OP(op) op::bind(module);
#include "ops.inc"
#undef VIOPS_OP
}
