// Decayed attention for Python: the checks that guard memory, then the kernels.
#include <string>

#include "common/python_tensor.h"
#include "decayed_attention/decayed_attention.h"

namespace viops::decayed_attention {
namespace {

const CpuKernels& kernels() {
  static const CpuKernels* const by_level[kCpuLevels] = VIOPS_KERNELS_BY_LEVEL;
  return *by_level[static_cast<int>(cpu_level())];
}

DType accumulation_dtype(const TensorView& q) {
  return q.dtype == DType::float64 ? DType::float64 : DType::float32;
}

// A tensor [B, H, h, w, C] of q's grid and dtype, C being `channels`.
void check_grid(const TensorView& view, const TensorView& q, int64_t channels, const char* axes) {
  view.check_on_cpu();
  view.check_shape({q.shape[0], q.shape[1], q.shape[2], q.shape[3], channels}, axes);
  view.check_same_dtype(q);
}

void check_like_q(const TensorView& view, const TensorView& q) {
  check_grid(view, q, q.shape[4], "B, H, h, w, D");
}

void check_like_v(const TensorView& view, const TensorView& q, const TensorView& v) {
  check_grid(view, q, v.shape[4], "B, H, h, w, Dv");
}

// sin and cos [B, 1, h, w, D], or neither.
void check_rotation(const TensorView* sin, const TensorView* cos, const TensorView& q) {
  if ((sin == nullptr) != (cos == nullptr)) {
    throw std::invalid_argument("sin: expected a tensor where cos is one, and None where it is None");
  }
  if (!sin) return;
  if (q.shape[4] % 2) {
    throw std::invalid_argument("sin: expected None where D is odd, and D is " + std::to_string(q.shape[4]));
  }
  for (const TensorView* view : {sin, cos}) {
    view->check_on_cpu();
    view->check_shape({q.shape[0], 1, q.shape[2], q.shape[3], q.shape[4]}, "B, 1, h, w, D");
    view->check_dtype(accumulation_dtype(q));
  }
}

void check_inputs(const Inputs& inputs) {
  const TensorView &q = inputs.q, &v = inputs.v;
  q.check_on_cpu();
  q.check_rank(5, "B, H, h, w, D");
  q.check_floating();
  v.check_rank(5, "B, H, h, w, Dv");
  if (q.shape[1] < 1 || q.shape[2] < 1 || q.shape[3] < 1 || q.shape[4] < 1) {
    throw std::invalid_argument("q: expected H, h, w and D of at least 1");
  }
  if (v.shape[4] < 1) throw std::invalid_argument("v: expected Dv of at least 1");
  check_like_q(inputs.k, q);
  check_like_v(v, q, v);
  inputs.log_decay.check_on_cpu();
  inputs.log_decay.check_shape({q.shape[0], q.shape[1]}, "B, H");
  inputs.log_decay.check_dtype(accumulation_dtype(q));
  check_rotation(inputs.sin, inputs.cos, q);
}

// logsumexp and inner, of what check_inputs has seen.
void check_saved(const Inputs& inputs, const TensorView& logsumexp, const TensorView* inner) {
  const TensorView& q = inputs.q;
  logsumexp.check_on_cpu();
  logsumexp.check_shape({q.shape[0], inputs.axial ? 2 : 1, q.shape[1], q.shape[2], q.shape[3]},
                        "B, passes, H, h, w");
  logsumexp.check_dtype(accumulation_dtype(q));
  logsumexp.check_contiguous();
  if ((inner != nullptr) != inputs.axial) {
    throw std::invalid_argument("inner: expected a tensor where axial is true, and None where it is false");
  }
  if (inner) check_like_v(*inner, q, inputs.v);
}

void forward(py::handle q_, py::handle k_, py::handle v_, py::handle log_decay_, py::handle sin_,
             py::handle cos_, bool axial, double scale, py::handle out_, py::handle logsumexp_,
             py::handle inner_) {
  const TensorArgument q("q", q_), k("k", k_), v("v", v_), log_decay("log_decay", log_decay_);
  const OptionalArgument sin("sin", sin_), cos("cos", cos_), inner("inner", inner_);
  const TensorArgument out("out", out_);
  const OptionalArgument logsumexp("logsumexp", logsumexp_);
  const Inputs inputs = {q, k, v, log_decay, sin.get(), cos.get(), axial, scale};
  check_inputs(inputs);
  check_like_v(out, q, v);
  if (logsumexp.get()) {
    check_saved(inputs, *logsumexp.get(), inner.get());
  } else if (inner.get()) {
    throw std::invalid_argument("inner: expected None where logsumexp is None, got a tensor");
  }
  py::gil_scoped_release released;
  kernels().forward(inputs, out, logsumexp.get(), inner.get());
}

void backward(py::handle grad_out_, py::handle q_, py::handle k_, py::handle v_, py::handle log_decay_,
              py::handle sin_, py::handle cos_, py::handle out_, py::handle logsumexp_, py::handle inner_,
              bool axial, double scale, py::handle grad_q_, py::handle grad_k_, py::handle grad_v_,
              py::handle grad_log_decay_) {
  const TensorArgument grad_out("grad_out", grad_out_), q("q", q_), k("k", k_), v("v", v_);
  const TensorArgument log_decay("log_decay", log_decay_), out("out", out_),
      logsumexp("logsumexp", logsumexp_);
  const OptionalArgument sin("sin", sin_), cos("cos", cos_), inner("inner", inner_);
  const TensorArgument grad_q("grad_q", grad_q_), grad_k("grad_k", grad_k_), grad_v("grad_v", grad_v_);
  const OptionalArgument grad_log_decay("grad_log_decay", grad_log_decay_);
  const Inputs inputs = {q, k, v, log_decay, sin.get(), cos.get(), axial, scale};
  check_inputs(inputs);
  check_like_v(out, q, v);
  check_saved(inputs, logsumexp, inner.get());
  check_like_v(grad_out, q, v);
  check_like_q(grad_q, q);
  check_like_q(grad_k, q);
  check_like_v(grad_v, q, v);
  if (const TensorView* grad = grad_log_decay.get()) {
    grad->check_on_cpu();
    grad->check_shape({q.shape[0], q.shape[1]}, "B, H");
    grad->check_dtype(accumulation_dtype(q));
    grad->check_contiguous();
  }
  py::gil_scoped_release released;
  kernels().backward(grad_out, inputs, out, logsumexp, inner.get(), grad_q, grad_k, grad_v,
                     grad_log_decay.get());
}

}  // namespace

void bind(py::module_& module) {
  module.def("decayed_attention_forward", &forward);
  module.def("decayed_attention_backward", &backward);
}

}  // namespace viops::decayed_attention
