// My op for Python: the checks that guard memory, then the kernels.
#include "common/python_tensor.h"
#include "my_op/my_op.h"

namespace viops::my_op {
namespace {

const CpuKernels& kernels() {
  static const CpuKernels* const by_level[kCpuLevels] = VIOPS_KERNELS_BY_LEVEL;
  return *by_level[static_cast<int>(cpu_level())];
}

// in and out [B, N, C] of one floating dtype.
void check(const TensorView& in, const TensorView& out) {
  in.check_on_cpu();
  out.check_on_cpu();
  in.check_rank(3, "B, N, C");
  in.check_floating();
  out.check_shape({in.shape[0], in.shape[1], in.shape[2]}, "B, N, C");
  out.check_same_dtype(in);
  out.check_contiguous();
}

void forward(py::handle x_, double scale, py::handle y_) {
  const TensorArgument x("x", x_), y("y", y_);
  check(x, y);
  py::gil_scoped_release released;
  kernels().forward(x, scale, y);
}

void backward(py::handle grad_y_, double scale, py::handle grad_x_) {
  const TensorArgument grad_y("grad_y", grad_y_), grad_x("grad_x", grad_x_);
  check(grad_y, grad_x);
  py::gil_scoped_release released;
  kernels().backward(grad_y, scale, grad_x);
}

}  // namespace

void bind(py::module_& module) {
  module.def("my_op_forward", &forward);
  module.def("my_op_backward", &backward);
}

}  // namespace viops::my_op
