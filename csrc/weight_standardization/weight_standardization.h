// Weight standardization (Qiao et al., arXiv:1903.10520): the contracts of its kernels.
//
// O filters of K weights.  Tensors [O, K] are contiguous and of one floating dtype; all others are contiguous
// and of A: float64 where weight is, else float32.  Outputs overlap no input.  O and K may be zero.  Shapes,
// dtypes and devices have been checked by bind.cpp.
//
//   var = sum of (w - mean)^2 / max(K - unbiased, 1)
//   factor = eps_inside ? 1 / sqrt(var + eps) : 1 / (sqrt(var) + eps)
//   out = (w - mean) * factor * gain
#pragma once

#include "common/cpu_level.h"
#include "common/tensor_view.h"

namespace viops::weight_standardization {

struct Options {
  double eps;
  bool unbiased, eps_inside;
};

struct CpuKernels {
  // weight [O, K], gain [O] or null: ones -> out [O, K]; mean [O], relative to each filter's first weight,
  // and factor [O], both null where there will be no backward.
  void (*forward)(const TensorView& weight, const TensorView* gain, const Options& options,
                  const TensorView& out, const TensorView* mean, const TensorView* factor);

  // grad_out, weight [O, K], gain [O] or null, mean [O], factor [O] -> grad_weight [O, K] and, unless null,
  // grad_gain [O].  A filter of variance zero has no gradient through its variance.
  void (*backward)(const TensorView& grad_out, const TensorView& weight, const TensorView* gain,
                   const TensorView& mean, const TensorView& factor, const Options& options,
                   const TensorView& grad_weight, const TensorView* grad_gain);
};

VIOPS_DECLARE_KERNELS(CpuKernels);

}  // namespace viops::weight_standardization
