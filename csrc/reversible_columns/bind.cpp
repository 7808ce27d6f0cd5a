// Reversible columns for Python: the checks that guard memory, then the kernels.
#include <algorithm>
#include <initializer_list>
#include <string>

#include "common/python_tensor.h"
#include "reversible_columns/reversible_columns.h"

namespace viops::reversible_columns {
namespace {

const CpuKernels& kernels() {
  static const CpuKernels* const by_level[kCpuLevels] = VIOPS_KERNELS_BY_LEVEL;
  return *by_level[static_cast<int>(cpu_level())];
}

std::string list(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// What all other tensors have to fit: features [B, C, ...]; without channels, of any rank.
struct Features {
  const TensorView& like;
  Sizes sizes;
  int64_t wanted[kMaxRank];  // strides

  explicit Features(const TensorView& like, bool has_channels = true) : like(like), sizes{1, 1, 1, false} {
    if (has_channels && like.rank < 2) {
      throw std::invalid_argument(std::string(like.name) + ": expected [B, C, ...], got shape " +
                                  list(like.shape, like.rank));
    }
    like.check_floating();
    if (like.rank > 0) sizes.batch = like.shape[0];
    if (like.rank > 1) sizes.channels = like.shape[1];
    for (int axis = 2; axis < like.rank; ++axis) sizes.places *= like.shape[axis];
    set_strides(1, sizes.places);
    if (!fits(like)) {
      set_strides(sizes.channels, 1);
      sizes.channels_last = true;
    }
    check(like);
    // one place: both layouts are the same, and rows of channels are longer
    sizes.channels_last |= sizes.places == 1;
    if (!has_channels) sizes = {1, 1, sizes.batch * sizes.channels * sizes.places, false};
  }

  // A tensor like that one, it included.
  void check(const TensorView& view) const {
    view.check_on_cpu();
    if (view.rank != like.rank || !std::equal(view.shape, view.shape + view.rank, like.shape)) {
      throw std::invalid_argument(std::string(view.name) + ": expected shape " + list(like.shape, like.rank) +
                                  ", as " + like.name + " has, got " + list(view.shape, view.rank));
    }
    if (fits(view)) return;
    throw std::invalid_argument(
        std::string(view.name) +
        ": expected a tensor contiguous as [B, C, ...] or as [B, ..., C], as all of a "
        "call, got strides " +
        list(view.stride, view.rank) + " for shape " + list(view.shape, view.rank));
  }
  void check_values(const TensorView& view) const {
    check(view);
    view.check_same_dtype(like);
  }
  void check_f(const TensorView& f) const {
    check(f);
    const bool is_half = f.dtype == DType::bfloat16 || f.dtype == DType::float16;
    if (!(is_half && like.dtype == DType::float32)) f.check_same_dtype(like);
  }
  void check_rest(const TensorView& view) const {
    check(view);
    view.check_dtype(DType::float32);
  }
  void check_alpha(const TensorView& view) const {
    view.check_on_cpu();
    view.check_same_dtype(like);
    int64_t count = 1;
    for (int axis = 0; axis < view.rank; ++axis) count *= view.shape[axis];
    if (count != sizes.channels) {
      throw std::invalid_argument(std::string(view.name) +
                                  ": expected C = " + std::to_string(sizes.channels) +
                                  " elements, got shape " + list(view.shape, view.rank));
    }
    view.check_contiguous();
  }

 private:
  void set_strides(int64_t of_last_place, int64_t of_channel) {
    if (like.rank > 0) wanted[0] = sizes.channels * sizes.places;
    if (like.rank > 1) wanted[1] = of_channel;
    for (int axis = like.rank - 1; axis > 1; --axis) {
      wanted[axis] = of_last_place;
      of_last_place *= like.shape[axis];
    }
  }
  bool fits(const TensorView& view) const {
    for (int axis = 0; axis < view.rank; ++axis) {
      if (view.shape[axis] == 0) return true;
    }
    for (int axis = 0; axis < view.rank; ++axis) {
      if (view.shape[axis] != 1 && view.stride[axis] != wanted[axis]) return false;
    }
    return true;
  }
};

// Features that have rests.
Features narrow_features(const TensorView& like, bool has_channels) {
  if (like.dtype == DType::float64) {
    throw TypeMismatch(std::string(like.name) +
                       ": expected float32, bfloat16 or float16, which have rests, got float64");
  }
  return Features(like, has_channels);
}

void require(const char* name, const TensorView* view) {
  if (!view) throw TypeMismatch(std::string(name) + ": expected a tensor in this call, got None");
}

void forward(py::handle f_, py::handle x_, py::handle alpha_, py::handle out_) {
  const TensorArgument f("f", f_), x("x", x_), alpha("alpha", alpha_), out("out", out_);
  const Features features(x);
  features.check_f(f);
  features.check_values(out);
  features.check_alpha(alpha);
  py::gil_scoped_release released;
  kernels().forward(features.sizes, f, x, alpha, out);
}

// With f, `values` is what the step gave; without, its x, or None where there is no grad_alpha.
void backward(py::handle grad_out_, py::handle values_, py::handle f_, py::handle alpha_, py::handle x_,
              py::handle grad_x_, py::handle grad_alpha_) {
  const TensorArgument grad_out("grad_out", grad_out_), alpha("alpha", alpha_);
  const OptionalArgument values("values", values_), f("f", f_), x("x", x_), grad_x("grad_x", grad_x_),
      grad_alpha("grad_alpha", grad_alpha_);
  const Features features(grad_out);
  for (const TensorView* view : {values.get(), x.get(), grad_x.get()}) {
    if (view) features.check_values(*view);
  }
  for (const TensorView* view : std::initializer_list<const TensorView*>{&alpha, grad_alpha.get()}) {
    if (view) features.check_alpha(*view);
  }
  if (grad_alpha.get() || f.get()) require("values", values.get());
  if (f.get()) {
    features.check_f(*f.get());
    require("x", x.get()), require("grad_x", grad_x.get()), require("grad_alpha", grad_alpha.get());
  }
  py::gil_scoped_release released;
  if (!f.get()) {
    return kernels().backward(features.sizes, grad_out, values.get(), alpha, grad_x.get(), grad_alpha.get());
  }
  kernels().rebuild(features.sizes, grad_out, *values.get(), *f.get(), alpha, *x.get(), *grad_x.get(),
                    *grad_alpha.get());
}

void forward_with_rest(py::handle f_, py::handle x_, py::handle x_rest_, py::handle alpha_, py::handle out_,
                       py::handle out_rest_) {
  const TensorArgument f("f", f_), x("x", x_), out("out", out_), out_rest("out_rest", out_rest_);
  const OptionalArgument x_rest("x_rest", x_rest_), alpha("alpha", alpha_);
  const Features features = narrow_features(x, alpha.get());
  features.check_f(f);
  features.check_values(out);
  features.check_rest(out_rest);
  if (x_rest.get()) features.check_rest(*x_rest.get());
  if (alpha.get()) features.check_alpha(*alpha.get());
  py::gil_scoped_release released;
  kernels().forward_with_rest(features.sizes, f, x, x_rest.get(), alpha.get(), out, out_rest);
}

// With grad_out both gradients are written, without none.
void backward_with_rest(py::handle grad_out_, py::handle out_, py::handle out_rest_, py::handle f_,
                        py::handle alpha_, py::handle x_, py::handle x_rest_, py::handle grad_x_,
                        py::handle grad_alpha_) {
  const TensorArgument out("out", out_), out_rest("out_rest", out_rest_), f("f", f_), x("x", x_);
  const OptionalArgument grad_out("grad_out", grad_out_), alpha("alpha", alpha_), x_rest("x_rest", x_rest_),
      grad_x("grad_x", grad_x_), grad_alpha("grad_alpha", grad_alpha_);
  const Features features = narrow_features(out, alpha.get());
  features.check_f(f);
  features.check_values(x);
  features.check_rest(out_rest);
  if (x_rest.get()) features.check_rest(*x_rest.get());
  if (alpha.get()) features.check_alpha(*alpha.get());
  if (grad_out.get() || grad_x.get() || grad_alpha.get()) {
    require("grad_out", grad_out.get()), require("alpha", alpha.get());
    require("grad_x", grad_x.get()), require("grad_alpha", grad_alpha.get());
    features.check_values(*grad_out.get());
    features.check_values(*grad_x.get());
    features.check_alpha(*grad_alpha.get());
  }
  py::gil_scoped_release released;
  kernels().rebuild_with_rest(features.sizes, grad_out.get(), out, out_rest, f, alpha.get(), x, x_rest.get(),
                              grad_x.get(), grad_alpha.get());
}

}  // namespace

void bind(py::module_& module) {
  module.def("reversible_step_forward", &forward);
  module.def("reversible_step_backward", &backward);
  module.def("reversible_step_with_rest_forward", &forward_with_rest);
  module.def("reversible_step_with_rest_backward", &backward_with_rest);
}

}  // namespace viops::reversible_columns
