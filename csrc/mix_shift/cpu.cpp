// Mix-shift on the CPU: see mix_shift.h for what the kernels do.
#include "mix_shift/cpu_backward.h"

namespace viops::mix_shift {
namespace {

void forward(const TensorView& x, const Weights& weights, const Groups& groups, const Norm* norm,
             const TensorView& y) {
  VIOPS_FOR_DTYPE(x, forward_of, x, weights, groups, norm, y)
}

void norm_backward(const TensorView& grad_y, const TensorView& x, const Weights& weights,
                   const Groups& groups, const Norm& norm, const TensorView& grad_u,
                   const TensorView& grad_norm_weight, const TensorView& grad_norm_bias) {
  VIOPS_FOR_DTYPE(x, norm_backward_of, grad_y, x, weights, groups, norm, grad_u, grad_norm_weight,
                  grad_norm_bias)
}

void input_gradient(const TensorView& grad_u, const Weights& weights, const Groups& groups,
                    const TensorView& grad_x) {
  VIOPS_FOR_DTYPE(grad_u, input_gradient_of, grad_u, weights, groups, grad_x)
}

void weight_gradient(const TensorView& grad_u, const TensorView& x, const Groups& groups,
                     const TensorView& grad_lr, const TensorView* grad_td, const TensorView* grad_bias) {
  VIOPS_FOR_DTYPE(x, weight_gradient_of, grad_u, x, groups, grad_lr, grad_td, grad_bias)
}

}  // namespace

extern const CpuKernels VIOPS_LEVEL_NAME(kernels) = {forward, norm_backward, input_gradient, weight_gradient};

}  // namespace viops::mix_shift
