// Weight standardization for Python: the checks that guard memory, then the kernels.
#include <initializer_list>

#include "common/python_tensor.h"
#include "weight_standardization/weight_standardization.h"

namespace viops::weight_standardization {
namespace {

const CpuKernels& kernels() {
  static const CpuKernels* const by_level[kCpuLevels] = VIOPS_KERNELS_BY_LEVEL;
  return *by_level[static_cast<int>(cpu_level())];
}

// [O, K] of a floating dtype.
void check_weight(const TensorView& weight) {
  weight.check_on_cpu();
  weight.check_rank(2, "O, K");
  weight.check_floating();
  weight.check_contiguous();
}

// [O, K] of weight's dtype.
void check_like_weight(const TensorView& view, const TensorView& weight) {
  view.check_on_cpu();
  view.check_shape({weight.shape[0], weight.shape[1]}, "O, K");
  view.check_same_dtype(weight);
  view.check_contiguous();
}

// Each [O] of the dtype of weight's sums, or null.
void check_of_filters(std::initializer_list<const TensorView*> views, const TensorView& weight) {
  for (const TensorView* view : views) {
    if (!view) continue;
    view->check_on_cpu();
    view->check_shape({weight.shape[0]}, "O");
    view->check_dtype(weight.dtype == DType::float64 ? DType::float64 : DType::float32);
    view->check_contiguous();
  }
}

void forward(py::handle weight_, py::handle gain_, double eps, bool unbiased, bool eps_inside,
             py::handle out_, py::handle mean_, py::handle factor_) {
  const TensorArgument weight("weight", weight_), out("out", out_);
  const OptionalArgument gain("gain", gain_), mean("mean", mean_), factor("factor", factor_);
  check_weight(weight);
  check_like_weight(out, weight);
  check_of_filters({gain.get(), mean.get(), factor.get()}, weight);
  if ((mean.get() == nullptr) != (factor.get() == nullptr)) {
    throw std::invalid_argument("mean: expected a tensor where factor is one, and None where it is None");
  }
  py::gil_scoped_release released;
  kernels().forward(weight, gain.get(), {eps, unbiased, eps_inside}, out, mean.get(), factor.get());
}

void backward(py::handle grad_out_, py::handle weight_, py::handle gain_, py::handle mean_,
              py::handle factor_, double eps, bool unbiased, bool eps_inside, py::handle grad_weight_,
              py::handle grad_gain_) {
  const TensorArgument grad_out("grad_out", grad_out_), weight("weight", weight_), mean("mean", mean_),
      factor("factor", factor_), grad_weight("grad_weight", grad_weight_);
  const OptionalArgument gain("gain", gain_), grad_gain("grad_gain", grad_gain_);
  check_weight(weight);
  check_like_weight(grad_out, weight);
  check_like_weight(grad_weight, weight);
  check_of_filters({gain.get(), &mean, &factor, grad_gain.get()}, weight);
  py::gil_scoped_release released;
  kernels().backward(grad_out, weight, gain.get(), mean, factor, {eps, unbiased, eps_inside}, grad_weight,
                     grad_gain.get());
}

}  // namespace

void bind(py::module_& module) {
  module.def("standardize_weight_forward", &forward);
  module.def("standardize_weight_backward", &backward);
}

}  // namespace viops::weight_standardization
