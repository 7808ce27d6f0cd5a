// Batch channel norm for Python: the checks that guard memory, then the kernels.
#include <string>

#include "batch_channel_norm/batch_channel_norm.h"
#include "common/cuda_call.h"
#include "common/python_tensor.h"

namespace viops::batch_channel_norm {
namespace {

const CpuKernels& kernels() {
  static const CpuKernels* const by_level[kCpuLevels] = VIOPS_KERNELS_BY_LEVEL;
  return *by_level[static_cast<int>(cpu_level())];
}

// What all other tensors have to fit: x [B, C, S], with G groups.
struct Sizes {
  const TensorView& x;
  int64_t batch, channels, places, groups;
  DType wide;  // A

  Sizes(const TensorView& x, const TensorView& weight) : x(x) {
    x.check_rank(3, "B, C, S");
    x.check_floating();
    weight.check_rank(1, "G");
    batch = x.shape[0], channels = x.shape[1], places = x.shape[2], groups = weight.shape[0];
    wide = x.dtype == DType::float64 ? DType::float64 : DType::float32;
    if (channels < 1) throw std::invalid_argument("x: expected C of at least 1");
    if (groups < 1 || channels % groups) {
      throw std::invalid_argument("weight: expected [G], G a divisor of C = " + std::to_string(channels) +
                                  ", got G = " + std::to_string(groups));
    }
  }

  // A tensor like x, x included: contiguous, or contiguous as [B, S, C] where x is.
  void check_values(const TensorView& view) const {
    view.check_shape({batch, channels, places}, "B, C, S");
    view.check_same_dtype(x);
    if (batch * channels * places == 0) return;
    const bool channels_last = is_channels_last(x);
    const int64_t wanted[] = {channels * places, channels_last ? 1 : places, channels_last ? channels : 1};
    for (int axis = 0; axis < 3; ++axis) {
      if (view.shape[axis] == 1 || view.stride[axis] == wanted[axis]) continue;
      throw std::invalid_argument(
          std::string(view.name) + ": expected a tensor that is contiguous as " +
          (channels_last ? "[B, S, C], and so as [B, C, S] is x," : "[B, C, S], or x and all as [B, S, C],") +
          " got a stride of " + std::to_string(view.stride[axis]) + " along axis " + std::to_string(axis));
    }
  }

  void check_small(const TensorView& view, std::initializer_list<int64_t> shape, const char* axes) const {
    view.check_shape(shape, axes);
    view.check_dtype(wide);
    view.check_contiguous();
  }
  void check_of_channels(std::initializer_list<const TensorView*> views) const {
    for (const TensorView* view : views) check_small(*view, {channels}, "C");
  }

  void check(const Parameters& parameters) const {
    check_of_channels({&parameters.bn_weight, &parameters.bn_bias});
    check_small(parameters.weight, {groups}, "G");
    check_small(parameters.bias, {groups}, "G");
  }
  void check(const Statistics& statistics) const {
    check_of_channels({&statistics.shift, &statistics.mean, &statistics.var});
    check_small(statistics.plane_mean, {batch, channels}, "B, C");
    check_small(statistics.plane_square, {batch, channels}, "B, C");
    check_small(statistics.group_mean, {batch, groups}, "B, G");
    check_small(statistics.group_rstd, {batch, groups}, "B, G");
  }
  // Where it is needed.
  void check_scratch(const CudaCall& cuda, const TensorView* scratch) const {
    if (!cuda) return;
    if (!scratch) throw TypeMismatch("scratch: expected a tensor [P, 2, B, C] on CUDA, got None");
    scratch->check_rank(4, "P, 2, B, C");
    check_small(*scratch, {scratch->shape[0], 2, batch, channels}, "P, 2, B, C");
    if (scratch->shape[0] < 3) throw std::invalid_argument("scratch: expected P of at least 3");
  }
};

Mode check_mode(int mode, const TensorView* mean, const TensorView* var, const TensorView* speed) {
  if (mode < 0 || mode > 2) {
    throw std::invalid_argument("mode: expected 0, 1 or 2, got " + std::to_string(mode));
  }
  const Mode checked = static_cast<Mode>(mode);
  const auto check = [](const char* name, const TensorView* view, bool wanted) {
    if ((view != nullptr) == wanted) return;
    throw std::invalid_argument(
        std::string(name) + ": expected " +
        (wanted ? "a tensor in this mode, got None" : "None in this mode, got a tensor"));
  };
  check("mean", mean, checked != Mode::of_batch);
  check("var", var, checked != Mode::of_batch);
  check("speed", speed, checked == Mode::estimate);
  return checked;
}

void forward(py::handle x_, py::handle residual_, py::handle given_mean_, py::handle given_var_,
             py::handle speed_, py::handle bn_weight_, py::handle bn_bias_, py::handle weight_,
             py::handle bias_, double eps, bool relu, int mode_, py::handle y_, py::handle shift_,
             py::handle plane_mean_, py::handle plane_square_, py::handle mean_, py::handle var_,
             py::handle group_mean_, py::handle group_rstd_, py::handle scratch_) {
  const TensorArgument x("x", x_);
  const OptionalArgument residual("residual", residual_), given_mean("mean", given_mean_),
      given_var("var", given_var_), speed("speed", speed_);
  const TensorArgument bn_weight("bn_weight", bn_weight_), bn_bias("bn_bias", bn_bias_);
  const TensorArgument weight("weight", weight_), bias("bias", bias_), y("y", y_), shift("shift", shift_);
  const TensorArgument plane_mean("plane_mean", plane_mean_), plane_square("plane_square", plane_square_);
  const TensorArgument mean("mean_out", mean_), var("var_out", var_);
  const TensorArgument group_mean("group_mean", group_mean_), group_rstd("group_rstd", group_rstd_);
  const OptionalArgument scratch("scratch", scratch_);
  const CudaCall cuda({&x, residual.get(), given_mean.get(), given_var.get(), speed.get(), &bn_weight,
                       &bn_bias, &weight, &bias, &y, &shift, &plane_mean, &plane_square, &mean, &var,
                       &group_mean, &group_rstd, scratch.get()});
  const Sizes sizes(x, weight);
  const Parameters parameters = {bn_weight, bn_bias, weight, bias, eps, relu};
  const Statistics statistics = {shift, plane_mean, plane_square, mean, var, group_mean, group_rstd};
  const Mode mode = check_mode(mode_, given_mean.get(), given_var.get(), speed.get());
  sizes.check_values(x);
  sizes.check_values(y);
  if (residual.get()) sizes.check_values(*residual.get());
  if (mode != Mode::of_batch) sizes.check_of_channels({given_mean.get(), given_var.get()});
  if (mode == Mode::estimate) sizes.check_small(*speed.get(), {1}, "1");
  sizes.check(parameters);
  sizes.check(statistics);
  sizes.check_scratch(cuda, scratch.get());
  py::gil_scoped_release released;
  if (cuda) {
    return cuda_kernels.forward(x, residual.get(), given_mean.get(), given_var.get(), speed.get(), parameters,
                                mode, y, statistics, *scratch.get(), cuda.stream());
  }
  kernels().forward(x, residual.get(), given_mean.get(), given_var.get(), speed.get(), parameters, mode, y,
                    statistics);
}

void backward(py::handle grad_y_, py::handle x_, py::handle residual_, py::handle shift_,
              py::handle plane_mean_, py::handle plane_square_, py::handle mean_, py::handle var_,
              py::handle bn_weight_, py::handle bn_bias_, py::handle weight_, py::handle bias_,
              py::handle group_mean_, py::handle group_rstd_, double eps, bool relu, int64_t count,
              py::handle totals_, py::handle grad_x_, py::handle grad_residual_, py::handle grad_bn_weight_,
              py::handle grad_bn_bias_, py::handle grad_weight_, py::handle grad_bias_, py::handle scratch_) {
  const TensorArgument grad_y("grad_y", grad_y_), x("x", x_);
  const OptionalArgument residual("residual", residual_), totals("totals", totals_);
  const TensorArgument shift("shift", shift_), plane_mean("plane_mean", plane_mean_),
      plane_square("plane_square", plane_square_), mean("mean", mean_), var("var", var_);
  const TensorArgument bn_weight("bn_weight", bn_weight_), bn_bias("bn_bias", bn_bias_);
  const TensorArgument weight("weight", weight_), bias("bias", bias_);
  const TensorArgument group_mean("group_mean", group_mean_), group_rstd("group_rstd", group_rstd_);
  const TensorArgument grad_x("grad_x", grad_x_);
  const OptionalArgument grad_residual("grad_residual", grad_residual_), scratch("scratch", scratch_);
  const TensorArgument grad_bn_weight("grad_bn_weight", grad_bn_weight_),
      grad_bn_bias("grad_bn_bias", grad_bn_bias_);
  const TensorArgument grad_weight("grad_weight", grad_weight_), grad_bias("grad_bias", grad_bias_);
  const CudaCall cuda({&grad_y,
                       &x,
                       residual.get(),
                       &shift,
                       &plane_mean,
                       &plane_square,
                       &mean,
                       &var,
                       &bn_weight,
                       &bn_bias,
                       &weight,
                       &bias,
                       &group_mean,
                       &group_rstd,
                       totals.get(),
                       &grad_x,
                       grad_residual.get(),
                       &grad_bn_weight,
                       &grad_bn_bias,
                       &grad_weight,
                       &grad_bias,
                       scratch.get()});
  const Sizes sizes(x, weight);
  const Parameters parameters = {bn_weight, bn_bias, weight, bias, eps, relu};
  const Statistics statistics = {shift, plane_mean, plane_square, mean, var, group_mean, group_rstd};
  const Gradients gradients = {grad_x,       grad_residual.get(), grad_bn_weight,
                               grad_bn_bias, grad_weight,         grad_bias};
  if (count < 0) {
    throw std::invalid_argument("count: expected 0 or more values, got " + std::to_string(count));
  }
  for (const TensorView* view :
       {static_cast<const TensorView*>(&x), static_cast<const TensorView*>(&grad_y),
        static_cast<const TensorView*>(&grad_x), static_cast<const TensorView*>(residual.get()),
        static_cast<const TensorView*>(grad_residual.get())}) {
    if (view) sizes.check_values(*view);
  }
  sizes.check(parameters);
  sizes.check(statistics);
  sizes.check_of_channels({&grad_bn_weight, &grad_bn_bias});
  sizes.check_small(grad_weight, {sizes.groups}, "G");
  sizes.check_small(grad_bias, {sizes.groups}, "G");
  if (totals.get()) sizes.check_small(*totals.get(), {2, sizes.channels}, "2, C");
  sizes.check_scratch(cuda, scratch.get());
  py::gil_scoped_release released;
  if (cuda) {
    return cuda_kernels.backward(grad_y, x, residual.get(), parameters, statistics, count, totals.get(),
                                 gradients, *scratch.get(), cuda.stream());
  }
  kernels().backward(grad_y, x, residual.get(), parameters, statistics, count, totals.get(), gradients);
}

}  // namespace

void bind(py::module_& module) {
  using py::arg;
  module.def("batch_channel_norm_forward", &forward, arg("x"), arg("residual"), arg("mean"), arg("var"),
             arg("speed"), arg("bn_weight"), arg("bn_bias"), arg("weight"), arg("bias"), arg("eps"),
             arg("relu"), arg("mode"), arg("y"), arg("shift"), arg("plane_mean"), arg("plane_square"),
             arg("mean_out"), arg("var_out"), arg("group_mean"), arg("group_rstd"),
             arg("scratch") = py::none());
  module.def("batch_channel_norm_backward", &backward, arg("grad_y"), arg("x"), arg("residual"), arg("shift"),
             arg("plane_mean"), arg("plane_square"), arg("mean"), arg("var"), arg("bn_weight"),
             arg("bn_bias"), arg("weight"), arg("bias"), arg("group_mean"), arg("group_rstd"), arg("eps"),
             arg("relu"), arg("count"), arg("totals"), arg("grad_x"), arg("grad_residual"),
             arg("grad_bn_weight"), arg("grad_bn_bias"), arg("grad_weight"), arg("grad_bias"),
             arg("scratch") = py::none());
}

}  // namespace viops::batch_channel_norm
