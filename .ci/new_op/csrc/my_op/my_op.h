// My op: the contracts of its kernels.
//
// B images, N tokens, C channels.  Inputs may have any strides; outputs are contiguous and overlap no
// input.  B, N and C may be zero.  Half types are computed in float32.  Shapes, dtypes and devices have been
// checked by bind.cpp.
#pragma once

#include "common/cpu_level.h"
#include "common/tensor_view.h"

namespace viops::my_op {

struct CpuKernels {
  // x [B, N, C] -> y [B, N, C] = x * scale.
  void (*forward)(const TensorView& x, double scale, const TensorView& y);

  // grad_y [B, N, C] -> grad_x [B, N, C] = grad_y * scale.
  void (*backward)(const TensorView& grad_y, double scale, const TensorView& grad_x);
};

VIOPS_DECLARE_KERNELS(CpuKernels);

}  // namespace viops::my_op
