// Decayed attention (RMT, CVPR 2024): the contracts of its kernels.
//
// B images, H heads, a grid of h rows and w columns, D channels a head, Dv of the values.  All tensors of
// rank 5 may have any strides and are of one floating dtype; outputs overlap no input.  B may be zero, all
// else is at least 1.  Sums are held in float32, or in float64 for float64 (below: A).  Shapes, dtypes and
// devices have been checked by bind.cpp.
//
// The logit of query n, at row y and column x, and key m is
//   scale * <q_n, k_m> + log_decay * (|y_n - y_m| + |x_n - x_m|).
// Whole: each token attends to all others.  Axial: each row attends within itself, giving `inner`, then each
// column within itself, on `inner` for values, with the same q and k.
// Where sin and cos are not null q and k are x * cos + turned(x) * sin instead, turned (even, odd) channels
// being (-odd, even).
#pragma once

#include "common/cpu_level.h"
#include "common/tensor_view.h"

namespace viops::decayed_attention {

// What both directions read.
struct Inputs {
  const TensorView& q;          // [B, H, h, w, D]
  const TensorView& k;          // [B, H, h, w, D]
  const TensorView& v;          // [B, H, h, w, Dv]
  const TensorView& log_decay;  // [B, H] of A, any strides
  const TensorView* sin;        // [B, 1, h, w, D] of A, any strides, or null as cos is
  const TensorView* cos;
  bool axial;
  double scale;
};

struct CpuKernels {
  // -> out [B, H, h, w, Dv] and what backward takes: logsumexp [B, P, H, h, w] of A, contiguous and natural,
  // of each pass (P = 2 where axial, else 1), and inner [B, H, h, w, Dv], null unless axial; both are null
  // where there will be no backward.
  void (*forward)(const Inputs& inputs, const TensorView& out, const TensorView* logsumexp,
                  const TensorView* inner);

  // grad_out [B, H, h, w, Dv] and what forward gave (out is for other backends) -> grad_q, grad_k [B, H, h,
  // w, D], grad_v [B, H, h, w, Dv] and, unless null, grad_log_decay [B, H] of A, contiguous.
  void (*backward)(const TensorView& grad_out, const Inputs& inputs, const TensorView& out,
                   const TensorView& logsumexp, const TensorView* inner, const TensorView& grad_q,
                   const TensorView& grad_k, const TensorView& grad_v, const TensorView* grad_log_decay);
};

VIOPS_DECLARE_KERNELS(CpuKernels);

}  // namespace viops::decayed_attention
