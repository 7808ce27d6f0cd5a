// Reversible columns (Cai et al., arXiv:2212.11696, section 3.1): the contracts of its kernels.
//
// Features [B, C, ...] are contiguous with the channels where they stand, or last, all of a call in the same
// way, and of one floating dtype T; f may be of a half dtype where T is float32.  alpha and its gradient have
// C elements of T and are contiguous.  Outputs overlap no input.  Any size may be zero.  Shapes, dtypes,
// strides and devices have been checked by bind.cpp.
//
//   a = alpha, its magnitude clamped to kMinAlpha with its sign; both zeros become +kMinAlpha, NaN stays
//
// The kernels with rests take T float32 or a half type, rests in float32, laid out as the features, and
// compute in float64.  A feature and its rest are a value v of float64 in two parts:
//
//   feature = v rounded to T,  rest = v - feature rounded to float32, or 0 where the feature is not finite
#pragma once

#include "common/cpu_level.h"
#include "common/tensor_view.h"

namespace viops::reversible_columns {

constexpr double kMinAlpha = 1e-3;

// Features as kernels walk them: S is the product of the axes of space.  Without alpha they are one plane.
struct Sizes {
  int64_t batch, channels, places;
  bool channels_last;  // [B, S, C] in memory, else [B, C, S]
};

struct CpuKernels {
  // out = f + a * x
  void (*forward)(const Sizes& sizes, const TensorView& f, const TensorView& x, const TensorView& alpha,
                  const TensorView& out);

  // x = (out - f) / a, grad_x = a * grad_out, and grad_alpha = sum of grad_out * x, whose bits do not depend
  // on the number of threads.
  void (*rebuild)(const Sizes& sizes, const TensorView& grad_out, const TensorView& out, const TensorView& f,
                  const TensorView& alpha, const TensorView& x, const TensorView& grad_x,
                  const TensorView& grad_alpha);

  // The gradients of forward: one of them may be null, x then, too, where it is grad_alpha.
  void (*backward)(const Sizes& sizes, const TensorView& grad_out, const TensorView* x,
                   const TensorView& alpha, const TensorView* grad_x, const TensorView* grad_alpha);

  // out and out_rest, of f + a * (x + x_rest).  x_rest may be null, for zeros; alpha too, for a = 1.
  void (*forward_with_rest)(const Sizes& sizes, const TensorView& f, const TensorView& x,
                            const TensorView* x_rest, const TensorView* alpha, const TensorView& out,
                            const TensorView& out_rest);

  // x and x_rest, of (out + out_rest - f) / a, and the gradients as those of rebuild, of x as it is rounded.
  // x_rest may be null, where nobody wants it; alpha, for a = 1; and grad_out, grad_x and grad_alpha
  // together.
  void (*rebuild_with_rest)(const Sizes& sizes, const TensorView* grad_out, const TensorView& out,
                            const TensorView& out_rest, const TensorView& f, const TensorView* alpha,
                            const TensorView& x, const TensorView* x_rest, const TensorView* grad_x,
                            const TensorView* grad_alpha);
};

VIOPS_DECLARE_KERNELS(CpuKernels);

}  // namespace viops::reversible_columns
