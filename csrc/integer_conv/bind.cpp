// INT16 integer convolutions for Python: the checks that guard memory, then the kernels.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <string>

#include "common/cuda_call.h"
#include "common/python_tensor.h"
#include "integer_conv/integer_conv.h"

namespace viops::integer_conv {
namespace {

using Pair = std::array<int64_t, 2>;

const CpuKernels& kernels() {
  static const CpuKernels* const by_level[kCpuLevels] = VIOPS_KERNELS_BY_LEVEL;
  return *by_level[static_cast<int>(cpu_level())];
}

[[noreturn]] void refuse(const TensorView& view, const std::string& what) {
  throw std::invalid_argument(std::string(view.name) + ": " + what);
}

int check_bits(const char* name, int bits) {
  if (bits < 1 || bits > kMostBits) {
    throw std::invalid_argument(std::string(name) + ": expected 1 to 15, got " + std::to_string(bits));
  }
  return bits;
}

void check_window(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(least) + " to " +
                              std::to_string(most) + ", got " + std::to_string(value));
}

// Stride, padding and dilation of a convolution, and what filters [O, C / groups, I, J] say of it.
Geometry geometry_of(const TensorView& w, int64_t groups, const Pair& stride, const Pair& padding,
                     const Pair& dilation) {
  if (w.rank != 4) refuse(w, "expected [O, C / groups, I, J], got " + std::to_string(w.rank) + " axes");
  Geometry g = {};
  for (int axis = 0; axis < 4; ++axis) {
    if (w.shape[axis] < 1) refuse(w, "expected no axis of size 0");
  }
  if (groups < 1 || w.shape[0] % groups) {
    throw std::invalid_argument("groups: expected a divisor of O = " + std::to_string(w.shape[0]) + ", got " +
                                std::to_string(groups));
  }
  g.filters = w.shape[0], g.groups = groups, g.channels = groups * w.shape[1];
  constexpr int64_t kMost = 1 << 20;
  for (int axis = 0; axis < 2; ++axis) {
    g.kernel[axis] = w.shape[2 + axis], g.stride[axis] = stride[axis];
    g.padding[axis] = padding[axis], g.dilation[axis] = dilation[axis];
    if (g.kernel[axis] > kMost) refuse(w, "expected filters of at most 2^20 places along an axis");
    check_window("stride", stride[axis], 1, kMost);
    check_window("padding", padding[axis], 0, kMost);
    check_window("dilation", dilation[axis], 1, kMost);
  }
  return g;
}

// The same, for images of this size.
void place(Geometry& g, int64_t batch, int64_t height, int64_t width) {
  g.batch = batch, g.height = height, g.width = width;
  g.out_height = (height + 2 * g.padding[0] - g.dilation[0] * (g.kernel[0] - 1) - 1) / g.stride[0] + 1;
  g.out_width = (width + 2 * g.padding[1] - g.dilation[1] * (g.kernel[1] - 1) - 1) / g.stride[1] + 1;
  const bool fits = height + 2 * g.padding[0] > g.dilation[0] * (g.kernel[0] - 1) &&
                    width + 2 * g.padding[1] > g.dilation[1] * (g.kernel[1] - 1) && height > 0 && width > 0;
  if (!fits) throw std::invalid_argument("x: expected images of at least the extent of the filters");
}

// Those that are not null.
void check_all_on_cpu(std::initializer_list<const TensorView*> views) {
  for (const TensorView* view : views) {
    if (view) view->check_on_cpu();
  }
}

// [B, C, H, W], contiguous as [B, H, W, C].
void check_images(const TensorView& view, const std::array<int64_t, 4>& shape, DType dtype) {
  view.check_shape({shape[0], shape[1], shape[2], shape[3]}, "B, C, H, W");
  view.check_dtype(dtype);
  int64_t expected = 1;
  for (int axis : {1, 3, 2, 0}) {
    if (view.shape[axis] == 0) return;
    if (view.shape[axis] != 1 && view.stride[axis] != expected) {
      refuse(view, "expected a tensor that is contiguous in channels_last");
    }
    expected *= view.shape[axis];
  }
}

// One float32: [] or [1].
void check_scalar(const TensorView& view) {
  view.check_dtype(DType::float32);
  if (view.rank > 1 || (view.rank == 1 && view.shape[0] != 1)) refuse(view, "expected one element");
}

// The same, on the CPU.
float value_of(const TensorView& view) {
  check_scalar(view);
  return *static_cast<const float*>(view.data);
}

void check_vector(const TensorView& view, int64_t size, DType dtype, const char* axes) {
  view.check_shape({size}, axes);
  view.check_dtype(dtype);
  view.check_contiguous();
}

// The scale of a tensor whose largest magnitude this is, at least 2^-126; 1 for zero.
float scale_of(float largest, int bits, bool power_of_two) {
  constexpr float kSmallest = 0x1p-126f;
  if (largest == 0) return 1;
  int exponent;
  std::frexp(largest, &exponent);
  const float scale =
      power_of_two ? std::ldexp(1.0f, exponent - bits) : largest / static_cast<float>((1 << bits) - 1);
  return scale < kSmallest ? kSmallest : scale;
}

Rounding check_rounding(int rounding) {
  if (rounding < 0 || rounding > 2) throw std::invalid_argument("rounding: expected 0, 1 or 2");
  return static_cast<Rounding>(rounding);
}

void check_finite(float largest) {
  if (!std::isfinite(largest)) throw std::invalid_argument("x: expected finite values, got infinity or NaN");
}

// The product of two scales as factor * shift.
struct Factors {
  float factor, shift = 1;
  Factors(float first, float second) {
    double product = double(first) * double(second);
    if (std::fabs(product) < 0x1p-126) {
      product *= 0x1p126, shift = 0x1p-126f;
    } else if (std::fabs(product) >= 0x1p127) {
      product *= 0x1p-127, shift = 0x1p127f;
    }
    factor = static_cast<float>(product);
  }
};

using Shape = std::array<int64_t, 4>;
Shape x_shape(const Geometry& g) { return {g.batch, g.channels, g.height, g.width}; }
Shape y_shape(const Geometry& g) { return {g.batch, g.filters, g.out_height, g.out_width}; }

// What is done to a result on its way out, of these tensors or None.
class Extras {
 public:
  Extras(py::handle gain, py::handle bias, py::handle residual)
      : gain_("gain", gain), bias_("bias", bias), residual_("residual", residual) {}

  void check_on_cpu() const { check_all_on_cpu({gain_.get(), bias_.get(), residual_.get()}); }
  bool any() const { return gain_.get() || bias_.get() || residual_.get(); }
  Finish check(const Shape& shape, bool relu, double bound, bool read_next, float* largest) const {
    for (const OptionalArgument* vector : {&gain_, &bias_}) {
      if (vector->get()) check_vector(*vector->get(), shape[1], DType::float32, "O");
    }
    if (residual_.get()) check_images(*residual_.get(), shape, DType::float32);
    return {floats(gain_), floats(bias_), floats(residual_), relu, bound >= 0x1p40, read_next, largest};
  }

 private:
  static const float* floats(const OptionalArgument& argument) {
    return argument.get() ? static_cast<const float*>(argument.get()->data) : nullptr;
  }
  OptionalArgument gain_, bias_, residual_;
};

// The bound of a convolution's sums of products of integers of so many bits, which must be below kMostSum.
double check_sums(const TensorView& w, const Geometry& g, Direction direction, int bits_w, int bits) {
  const int64_t depth = direction == Direction::to_input ? g.group_filters() : g.group_channels();
  const double bound = double(depth) * g.taps() * ((1 << bits) - 1) * ((1 << bits_w) - 1);
  if (bound >= kMostSum) {
    refuse(w, "sums of so many products of " + std::to_string(bits_w) + " and " + std::to_string(bits) +
                  " bits may pass 2^46: expected fewer channels, taps or bits");
  }
  return bound;
}

// Filters as the kernels of one CPU level read them.
class PackedFilters {
 public:
  PackedFilters(py::handle w_, int64_t groups, const Pair& stride, const Pair& padding, const Pair& dilation,
                bool to_input, int bits_w, int bits_other)
      : direction_(to_input ? Direction::to_input : Direction::forward),
        kernels_(kernels()),
        bits_(check_bits("bits", bits_other)) {
    const TensorArgument w("w", w_);
    w.check_on_cpu();
    w.check_dtype(DType::int16);
    w.check_contiguous();
    geometry_ = geometry_of(w, groups, stride, padding, dilation);
    const int32_t limit = (1 << bits_) - 1;
    bound_ = check_sums(w, geometry_, direction_, check_bits("bits_w", bits_w), bits_);
    const int64_t bytes = kernels_.packed_bytes(geometry_, direction_);
    memory_.reset(new char[static_cast<size_t>(bytes) + kAlignment]);
    py::gil_scoped_release released;
    kernels_.pack(w, geometry_, direction_, limit, data());
  }

  // from, [B, C, H, W] forward and [B, O, OH, OW] to the input -> to, with H, W of x; returns max|to|.
  float convolve(py::handle from_, py::handle from_scale_, py::handle w_scale_, int bits, py::handle gain_,
                 py::handle bias_, py::handle residual_, bool relu, bool read_next, int64_t height,
                 int64_t width, py::handle to_) const {
    const TensorArgument from("x", from_), from_scale("x_scale", from_scale_), w_scale("w_scale", w_scale_);
    const Extras extras(gain_, bias_, residual_);
    const TensorArgument to("y", to_);
    if (check_bits("bits", bits) > bits_)
      throw std::invalid_argument("x: more bits than the filters are packed for");
    check_all_on_cpu({&from, &from_scale, &w_scale, &to});
    extras.check_on_cpu();
    from.check_rank(4, "B, C, H, W");
    Geometry g = geometry_;
    place(g, from.shape[0], height, width);
    const bool forward = direction_ == Direction::forward;
    check_images(from, forward ? x_shape(g) : y_shape(g), DType::int16);
    check_images(to, forward ? y_shape(g) : x_shape(g), DType::float32);
    if (!forward && (extras.any() || relu)) {
      throw std::invalid_argument("gain, bias, residual, relu: expected None and false to the input");
    }
    const Factors factors(value_of(from_scale), value_of(w_scale));
    float largest = 0;
    const Finish finish = extras.check(forward ? y_shape(g) : x_shape(g), relu, bound_, read_next, &largest);
    if (g.batch == 0) return 0;
    py::gil_scoped_release released;
    kernels_.convolve(from, factors.factor, factors.shift, data(), g, direction_, finish, to);
    return largest;
  }

  // The same forward of float32 x, for filters of one tap, stride 1 and no padding.
  float convolve_floats(py::handle x_, bool power_of_two, int rounding, py::handle w_scale_, py::handle gain_,
                        py::handle bias_, py::handle residual_, bool relu, bool read_next,
                        py::handle to_) const {
    const TensorArgument x("x", x_), w_scale("w_scale", w_scale_), to("y", to_);
    const Extras extras(gain_, bias_, residual_);
    check_all_on_cpu({&x, &w_scale, &to});
    extras.check_on_cpu();
    x.check_rank(4, "B, C, H, W");
    Geometry g = geometry_;
    place(g, x.shape[0], x.shape[2], x.shape[3]);
    bool pointwise = direction_ == Direction::forward && g.group_channels() + g.group_filters() > 2;
    for (int axis = 0; axis < 2; ++axis) {
      pointwise = pointwise && g.kernel[axis] == 1 && g.stride[axis] == 1 && g.padding[axis] == 0;
    }
    if (!pointwise) throw std::invalid_argument("w: expected one tap, stride 1, no padding, not depthwise");
    const Rounding how = check_rounding(rounding);
    if (how == Rounding::stochastic) throw std::invalid_argument("rounding: expected 0 or 2");
    check_images(x, x_shape(g), DType::float32);
    check_images(to, y_shape(g), DType::float32);
    float largest = 0;
    const Finish finish = extras.check(y_shape(g), relu, bound_, read_next, &largest);
    const float of_w = value_of(w_scale);
    if (g.batch == 0) return 0;
    TensorView flat = x;
    flat.rank = 1, flat.shape[0] = g.batch * g.channels * g.height * g.width, flat.stride[0] = 1;
    float of_x;
    {
      py::gil_scoped_release released;
      of_x = kernels_.largest(flat);
    }
    check_finite(of_x);
    const float scale = scale_of(of_x, bits_, power_of_two);
    const Factors factors(scale, of_w);
    py::gil_scoped_release released;
    kernels_.convolve_floats(x, {1 / scale, (1 << bits_) - 1, how}, factors.factor, factors.shift, data(), g,
                             finish, to);
    return largest;
  }

 private:
  static constexpr size_t kAlignment = 64;
  char* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (kAlignment - address % kAlignment) % kAlignment;
  }

  Geometry geometry_;
  Direction direction_;
  const CpuKernels& kernels_;  // what packed them is what reads them
  int bits_;
  double bound_;
  std::unique_ptr<char[]> memory_;
};

void quantize(py::handle x_, int bits, bool power_of_two, int rounding, py::handle noise_,
              std::optional<float> largest, py::handle data_, py::handle scale_, py::handle scratch_) {
  const TensorArgument x("x", x_), data("data", data_), scale("scale", scale_);
  const OptionalArgument noise("noise", noise_), scratch("scratch", scratch_);
  const CudaCall cuda({&x, noise.get(), &data, &scale, scratch.get()});
  check_bits("bits", bits);
  x.check_rank(1, "N");
  x.check_floating();
  x.check_contiguous();
  check_vector(data, x.shape[0], DType::int16, "N");
  check_scalar(scale);
  const Rounding how = check_rounding(rounding);
  if ((how == Rounding::stochastic) != (noise.get() != nullptr)) {
    throw std::invalid_argument("noise: expected a tensor for stochastic rounding, and None for others");
  }
  if (noise.get()) check_vector(*noise.get(), x.shape[0], DType::float32, "N");
  if (cuda) {
    if (!scratch.get()) throw TypeMismatch("scratch: expected a tensor [1] on CUDA, got None");
    check_vector(*scratch.get(), 1, DType::float32, "1");
    if (largest) throw std::invalid_argument("largest: expected None on CUDA");
    py::gil_scoped_release released;
    return cuda_kernels.quantize(x, {bits, power_of_two, how}, noise.get(), data, scale, *scratch.get(),
                                 cuda.stream());
  }
  float of_x;
  {
    py::gil_scoped_release released;
    of_x = largest ? *largest : kernels().largest(x);
  }
  check_finite(of_x);
  const float of_data = scale_of(of_x, bits, power_of_two);
  *static_cast<float*>(scale.data) = of_data;
  py::gil_scoped_release released;
  kernels().quantize(x, {1 / of_data, (1 << bits) - 1, how}, noise.get(), data);
}

// On CUDA alone: on the CPU it is PackedFilters that convolve.
void convolve(py::handle from_, py::handle from_scale_, py::handle w_, py::handle w_scale_, int bits_from,
              int bits_w, py::handle bias_, int64_t groups, const Pair& stride, const Pair& padding,
              const Pair& dilation, bool to_input, int64_t height, int64_t width, py::handle to_) {
  const TensorArgument from("x", from_), from_scale("x_scale", from_scale_), w("w", w_);
  const TensorArgument w_scale("w_scale", w_scale_), to("y", to_);
  const OptionalArgument bias("bias", bias_);
  const CudaCall cuda({&from, &from_scale, &w, &w_scale, bias.get(), &to});
  if (!cuda) throw TypeMismatch("x: expected a tensor on a CUDA device, got one on the CPU");
  const int bits = std::max(check_bits("bits_x", bits_from), check_bits("bits_w", bits_w));
  const Direction direction = to_input ? Direction::to_input : Direction::forward;
  w.check_dtype(DType::int16);
  Geometry g = geometry_of(w, groups, stride, padding, dilation);
  check_sums(w, g, direction, bits_w, bits_from);
  from.check_rank(4, "B, C, H, W");
  place(g, from.shape[0], height, width);
  check_images(from, to_input ? y_shape(g) : x_shape(g), DType::int16);
  check_images(to, to_input ? x_shape(g) : y_shape(g), DType::float32);
  if (bias.get()) check_vector(*bias.get(), to_input ? g.channels : g.filters, DType::float32, "O");
  check_scalar(from_scale);
  check_scalar(w_scale);
  py::gil_scoped_release released;
  cuda_kernels.convolve(from, from_scale, w, w_scale, bits, bias.get(), g, direction, to, cuda.stream());
}

void weight_gradient(py::handle grad_y_, py::handle grad_scale_, int bits_grad, py::handle x_,
                     py::handle x_scale_, int bits_x, int64_t groups, const Pair& stride, const Pair& padding,
                     const Pair& dilation, py::handle grad_w_, py::handle scratch_) {
  const TensorArgument grad_y("grad_y", grad_y_), grad_scale("grad_scale", grad_scale_), x("x", x_),
      x_scale("x_scale", x_scale_), grad_w("grad_w", grad_w_);
  const OptionalArgument scratch("scratch", scratch_);
  const CudaCall cuda({&grad_y, &grad_scale, &x, &x_scale, &grad_w, scratch.get()});
  check_bits("bits_grad", bits_grad);
  check_bits("bits_x", bits_x);
  grad_w.check_dtype(DType::float32);
  grad_w.check_contiguous();
  Geometry g = geometry_of(grad_w, groups, stride, padding, dilation);
  x.check_rank(4, "B, C, H, W");
  place(g, x.shape[0], x.shape[2], x.shape[3]);
  check_images(x, x_shape(g), DType::int16);
  check_images(grad_y, y_shape(g), DType::int16);
  check_scalar(grad_scale);
  check_scalar(x_scale);
  if (scratch.get()) {
    scratch.get()->check_shape({g.filters, g.group_channels(), g.kernel[0], g.kernel[1]},
                               "O, C / groups, I, J");
    scratch.get()->check_dtype(DType::int64);
    scratch.get()->check_contiguous();
  }
  py::gil_scoped_release released;
  if (cuda) {
    return cuda_kernels.weight_gradient(grad_y, grad_scale, x, x_scale, std::max(bits_grad, bits_x), g,
                                        scratch.get(), grad_w, cuda.stream());
  }
  if (g.batch == 0) {
    std::fill_n(static_cast<float*>(grad_w.data), g.filters * g.group_channels() * g.taps(), 0.0f);
    return;
  }
  const Factors factors(value_of(grad_scale), value_of(x_scale));
  kernels().weight_gradient(grad_y, x, factors.factor, factors.shift, g, (1 << bits_grad) - 1,
                            (1 << bits_x) - 1, grad_w);
}

}  // namespace

void bind(py::module_& module) {
  using py::arg;
  py::class_<PackedFilters>(module, "PackedFilters")
      .def(py::init<py::handle, int64_t, const Pair&, const Pair&, const Pair&, bool, int, int>(), arg("w"),
           arg("groups"), arg("stride"), arg("padding"), arg("dilation"), arg("to_input"), arg("bits_w"),
           arg("bits"))
      .def("convolve", &PackedFilters::convolve, arg("x"), arg("x_scale"), arg("w_scale"), arg("bits"),
           arg("gain"), arg("bias"), arg("residual"), arg("relu"), arg("read_next"), arg("height"),
           arg("width"), arg("y"))
      .def("convolve_floats", &PackedFilters::convolve_floats, arg("x"), arg("power_of_two"), arg("rounding"),
           arg("w_scale"), arg("gain"), arg("bias"), arg("residual"), arg("relu"), arg("read_next"),
           arg("y"));
  module.def("integer_conv_quantize", &quantize, arg("x"), arg("bits"), arg("power_of_two"), arg("rounding"),
             arg("noise"), arg("largest"), arg("data"), arg("scale"), arg("scratch") = py::none());
  module.def("integer_conv_convolve", &convolve, arg("x"), arg("x_scale"), arg("w"), arg("w_scale"),
             arg("bits_x"), arg("bits_w"), arg("bias"), arg("groups"), arg("stride"), arg("padding"),
             arg("dilation"), arg("to_input"), arg("height"), arg("width"), arg("y"));
  module.def("integer_conv_weight_gradient", &weight_gradient, arg("grad_y"), arg("grad_scale"),
             arg("bits_grad"), arg("x"), arg("x_scale"), arg("bits_x"), arg("groups"), arg("stride"),
             arg("padding"), arg("dilation"), arg("grad_w"), arg("scratch") = py::none());
}

}  // namespace viops::integer_conv
