// Mix-shift for Python: the checks that guard memory, then the kernels.
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "common/cuda_call.h"
#include "common/python_tensor.h"
#include "mix_shift/mix_shift.h"

namespace viops::mix_shift {
namespace {

using Integers = std::vector<int64_t>;

const CpuKernels& kernels() {
  static const CpuKernels* const by_level[kCpuLevels] = VIOPS_KERNELS_BY_LEVEL;
  return *by_level[static_cast<int>(cpu_level())];
}

DType wide_of(const TensorView& x) { return x.dtype == DType::float64 ? DType::float64 : DType::float32; }

// x [B, C, H, W] of a floating dtype, any strides.
void check_images(const TensorView& x) {
  x.check_rank(4, "B, C, H, W");
  x.check_floating();
  if (x.shape[1] < 1 || x.shape[2] < 1 || x.shape[3] < 1) {
    throw std::invalid_argument(std::string(x.name) + ": expected C, H and W of at least 1");
  }
}

void check_like(const TensorView& view, const TensorView& x) {
  view.check_shape({x.shape[0], x.shape[1], x.shape[2], x.shape[3]}, "B, C, H, W");
  view.check_same_dtype(x);
}

bool has_strides(const TensorView& view, const int64_t (&stride)[4]) {
  for (int axis = 0; axis < 4; ++axis) {
    if (view.shape[axis] == 0) return true;
  }
  for (int axis = 0; axis < 4; ++axis) {
    if (view.shape[axis] != 1 && view.stride[axis] != stride[axis]) return false;
  }
  return true;
}

// An output: contiguous or channels_last.
void check_dense(const TensorView& view, bool channels_last_only) {
  const int64_t channels = view.shape[1], height = view.shape[2], width = view.shape[3];
  const int64_t last[4] = {height * width * channels, 1, width * channels, channels};
  const int64_t first[4] = {channels * height * width, height * width, width, 1};
  if (has_strides(view, last) || (!channels_last_only && has_strides(view, first))) return;
  throw std::invalid_argument(std::string(view.name) + ": expected a tensor that is " +
                              (channels_last_only ? "channels_last" : "contiguous or channels_last"));
}

void check_vectors(std::initializer_list<const TensorView*> views, int64_t size, const char* axis,
                   DType dtype) {
  for (const TensorView* view : views) {
    if (!view) continue;
    view->check_shape({size}, axis);
    view->check_dtype(dtype);
    view->check_contiguous();
  }
}

Groups groups_of(const TensorView& x, const Integers& kernel, const Integers& shift) {
  Groups groups = {};
  groups.count = static_cast<int64_t>(kernel.size());
  groups.channels = x.shape[1];
  if (kernel.empty() || kernel.size() > kMaxGroups) {
    throw std::invalid_argument("kernels: expected one for each of 1 to " + std::to_string(kMaxGroups) +
                                " groups, got " + std::to_string(kernel.size()));
  }
  if (shift.size() != kernel.size()) {
    throw std::invalid_argument("shifts: expected " + std::to_string(kernel.size()) + ", as kernels, got " +
                                std::to_string(shift.size()));
  }
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t k = kernel[g], size = groups.end(g) - groups.begin(g);
    if (k < 1 || k % 2 == 0 || k > INT16_MAX) {
      throw std::invalid_argument("kernels: expected odd numbers from 1 to 32767, got " + std::to_string(k));
    }
    if (size < 1) {
      throw std::invalid_argument("kernels: " + std::to_string(groups.channels) + " channels are no " +
                                  std::to_string(groups.count) + " groups of the same size");
    }
    groups.kernel[g] = k;
    groups.shift[g] = shift[g];
    groups.offset[g + 1] = groups.offset[g] + size * k * k;
  }
  return groups;
}

void check_weights(const Groups& groups, std::initializer_list<const TensorView*> views, DType dtype) {
  check_vectors(views, groups.offset[groups.count], "K", dtype);
}

// [P, size] of sums, on CUDA.
const TensorView& checked_scratch(const TensorView* scratch, int64_t size, const char* axes, DType dtype) {
  if (!scratch) throw TypeMismatch("scratch: expected a tensor on CUDA, got None");
  scratch->check_rank(2, axes);
  scratch->check_shape({scratch->shape[0], size}, axes);
  scratch->check_dtype(dtype);
  scratch->check_contiguous();
  if (scratch->shape[0] < 1) throw std::invalid_argument("scratch: expected P of at least 1");
  return *scratch;
}

void forward(py::handle x_, py::handle weight_lr_, py::handle weight_td_, py::handle bias_,
             const Integers& kernel, const Integers& shift, py::handle norm_weight_, py::handle norm_bias_,
             double eps, py::handle y_) {
  const TensorArgument x("x", x_), weight_lr("weight_lr", weight_lr_), y("y", y_);
  const OptionalArgument weight_td("weight_td", weight_td_), bias("bias", bias_),
      norm_weight("norm_weight", norm_weight_), norm_bias("norm_bias", norm_bias_);
  const CudaCall cuda({&x, &weight_lr, weight_td.get(), bias.get(), norm_weight.get(), norm_bias.get(), &y});
  check_images(x);
  const Groups groups = groups_of(x, kernel, shift);
  check_like(y, x);
  check_dense(y, norm_weight.get() != nullptr);
  check_weights(groups, {&weight_lr, weight_td.get()}, wide_of(x));
  check_vectors({bias.get(), norm_weight.get(), norm_bias.get()}, groups.channels, "C", wide_of(x));
  if (norm_bias.get() && !norm_weight.get()) {
    throw std::invalid_argument("norm_bias: expected None where norm_weight is None, got a tensor");
  }
  const Weights weights = {weight_lr, weight_td.get(), bias.get()};
  const Norm norm = {norm_weight.get() ? *norm_weight.get() : x, norm_bias.get(), eps};
  const Norm* const wanted = norm_weight.get() ? &norm : nullptr;
  py::gil_scoped_release released;
  if (cuda) return cuda_kernels.forward(x, weights, groups, wanted, y, cuda.stream());
  kernels().forward(x, weights, groups, wanted, y);
}

void norm_backward(py::handle grad_y_, py::handle x_, py::handle weight_lr_, py::handle weight_td_,
                   py::handle bias_, const Integers& kernel, const Integers& shift, py::handle norm_weight_,
                   double eps, py::handle grad_u_, py::handle grad_norm_weight_, py::handle grad_norm_bias_,
                   py::handle scratch_) {
  const TensorArgument grad_y("grad_y", grad_y_), x("x", x_), weight_lr("weight_lr", weight_lr_),
      norm_weight("norm_weight", norm_weight_), grad_u("grad_u", grad_u_),
      grad_norm_weight("grad_norm_weight", grad_norm_weight_),
      grad_norm_bias("grad_norm_bias", grad_norm_bias_);
  const OptionalArgument weight_td("weight_td", weight_td_), bias("bias", bias_),
      scratch("scratch", scratch_);
  const CudaCall cuda({&grad_y, &x, &weight_lr, weight_td.get(), bias.get(), &norm_weight, &grad_u,
                       &grad_norm_weight, &grad_norm_bias, scratch.get()});
  check_images(x);
  const Groups groups = groups_of(x, kernel, shift);
  check_like(grad_y, x);
  check_like(grad_u, x);
  check_dense(grad_u, true);
  check_weights(groups, {&weight_lr, weight_td.get()}, wide_of(x));
  check_vectors({bias.get(), &norm_weight, &grad_norm_weight, &grad_norm_bias}, groups.channels, "C",
                wide_of(x));
  const Weights weights = {weight_lr, weight_td.get(), bias.get()};
  const Norm norm = {norm_weight, nullptr, eps};
  const TensorView* const sums =
      cuda ? &checked_scratch(scratch.get(), 2 * groups.channels, "P, 2 C", wide_of(x)) : nullptr;
  py::gil_scoped_release released;
  if (cuda) {
    return cuda_kernels.norm_backward(grad_y, x, weights, groups, norm, grad_u, grad_norm_weight,
                                      grad_norm_bias, *sums, cuda.stream());
  }
  kernels().norm_backward(grad_y, x, weights, groups, norm, grad_u, grad_norm_weight, grad_norm_bias);
}

void input_gradient(py::handle grad_u_, py::handle weight_lr_, py::handle weight_td_, const Integers& kernel,
                    const Integers& shift, py::handle grad_x_) {
  const TensorArgument grad_u("grad_u", grad_u_), weight_lr("weight_lr", weight_lr_),
      grad_x("grad_x", grad_x_);
  const OptionalArgument weight_td("weight_td", weight_td_);
  const CudaCall cuda({&grad_u, &weight_lr, weight_td.get(), &grad_x});
  check_images(grad_u);
  const Groups groups = groups_of(grad_u, kernel, shift);
  check_like(grad_x, grad_u);
  check_dense(grad_x, false);
  check_weights(groups, {&weight_lr, weight_td.get()}, wide_of(grad_u));
  const Weights weights = {weight_lr, weight_td.get(), nullptr};
  py::gil_scoped_release released;
  if (cuda) return cuda_kernels.input_gradient(grad_u, weights, groups, grad_x, cuda.stream());
  kernels().input_gradient(grad_u, weights, groups, grad_x);
}

void weight_gradient(py::handle grad_u_, py::handle x_, const Integers& kernel, const Integers& shift,
                     py::handle grad_lr_, py::handle grad_td_, py::handle grad_bias_, py::handle scratch_) {
  const TensorArgument grad_u("grad_u", grad_u_), x("x", x_), grad_lr("grad_lr", grad_lr_);
  const OptionalArgument grad_td("grad_td", grad_td_), grad_bias("grad_bias", grad_bias_),
      scratch("scratch", scratch_);
  const CudaCall cuda({&grad_u, &x, &grad_lr, grad_td.get(), grad_bias.get(), scratch.get()});
  check_images(x);
  const Groups groups = groups_of(x, kernel, shift);
  check_like(grad_u, x);
  check_weights(groups, {&grad_lr, grad_td.get()}, wide_of(x));
  check_vectors({grad_bias.get()}, groups.channels, "C", wide_of(x));
  const int64_t size = 2 * groups.offset[groups.count] + groups.channels;
  const TensorView* const sums =
      cuda ? &checked_scratch(scratch.get(), size, "P, 2 K + C", wide_of(x)) : nullptr;
  py::gil_scoped_release released;
  if (cuda) {
    return cuda_kernels.weight_gradient(grad_u, x, groups, grad_lr, grad_td.get(), grad_bias.get(), *sums,
                                        cuda.stream());
  }
  kernels().weight_gradient(grad_u, x, groups, grad_lr, grad_td.get(), grad_bias.get());
}

}  // namespace

void bind(py::module_& module) {
  using py::arg;
  module.def("mix_shift_forward", &forward);
  module.def("mix_shift_norm_backward", &norm_backward, arg("grad_y"), arg("x"), arg("weight_lr"),
             arg("weight_td"), arg("bias"), arg("kernels"), arg("shifts"), arg("norm_weight"), arg("eps"),
             arg("grad_u"), arg("grad_norm_weight"), arg("grad_norm_bias"), arg("scratch") = py::none());
  module.def("mix_shift_input_gradient", &input_gradient);
  module.def("mix_shift_weight_gradient", &weight_gradient, arg("grad_u"), arg("x"), arg("kernels"),
             arg("shifts"), arg("grad_lr"), arg("grad_td"), arg("grad_bias"), arg("scratch") = py::none());
}

}  // namespace viops::mix_shift
