// Mix-shift (Zheng et al., arXiv:2202.06510): the contracts of its kernels.
//
// B images of C channels, H rows, W columns.  The channels are G groups of ceil(C / G), the last one of what
// is left, at least one; group g has kernels of k_g x k_g, k_g odd, and rolls by s_g, any integer.  With u
// what convolutions give, zeros being around the rolled image,
//
//   rolled_w[b, c, h, w] = x[b, c, h, (w - s) mod W], rolled_h[b, c, h, w] = x[b, c, (h - s) mod H, w]
//   u[b, c, h, w] = bias[c] + sum over i, j of weight_lr[c, i, j] * rolled_w[b, c, h + i - k/2, w + j - k/2]
//                           + sum over i, j of weight_td[c, i, j] * rolled_h[b, c, h + i - k/2, w + j - k/2]
//   y = u, or where there is a norm (u - mean) / sqrt(var + eps) * norm_weight + norm_bias, the mean and the
//       biased variance being over the channels of a place
//
// Tensors [B, C, H, W] are of one floating dtype.  Inputs among them have any strides; outputs are contiguous
// or channels_last.  Weights [K], for each group [C_g, k_g, k_g], one group after the other, and vectors [C]
// are contiguous and of A: float64 where x is, else float32.  weight_td null: weight_lr is the only
// direction.  Outputs overlap no input.  B may be zero.  Shapes, dtypes, layouts and
// devices have been checked by bind.cpp.
#pragma once

#include "common/cpu_level.h"
#include "common/cuda_info.h"
#include "common/tensor_view.h"

namespace viops::mix_shift {

constexpr int kMaxGroups = 64;

// How the channels are dealt to groups.
struct Groups {
  int64_t count, channels;         // G, C
  int64_t kernel[kMaxGroups];      // k_g
  int64_t shift[kMaxGroups];       // s_g
  int64_t offset[kMaxGroups + 1];  // of a group's weights within [K]; the last is K

  int64_t begin(int64_t group) const {
    const int64_t size = (channels + count - 1) / count, place = group * size;
    return place < channels ? place : channels;
  }
  int64_t end(int64_t group) const { return begin(group + 1); }
};

struct Norm {
  const TensorView& weight;  // [C]
  const TensorView* bias;    // [C], or null: zeros
  double eps;
};

struct Weights {
  const TensorView& lr;    // [K]
  const TensorView* td;    // [K], or null
  const TensorView* bias;  // [C], or null: zeros
};

struct CpuKernels {
  // x [B, C, H, W] -> y [B, C, H, W], channels_last where there is a norm.  norm may be null.
  void (*forward)(const TensorView& x, const Weights& weights, const Groups& groups, const Norm* norm,
                  const TensorView& y);

  // grad_y, x [B, C, H, W] -> grad_u [B, C, H, W], channels_last, and grad_norm_weight, grad_norm_bias [C],
  // u being computed again.  norm.bias is not read.
  void (*norm_backward)(const TensorView& grad_y, const TensorView& x, const Weights& weights,
                        const Groups& groups, const Norm& norm, const TensorView& grad_u,
                        const TensorView& grad_norm_weight, const TensorView& grad_norm_bias);

  // grad_u [B, C, H, W] -> grad_x [B, C, H, W].  weights.bias is not read.
  void (*input_gradient)(const TensorView& grad_u, const Weights& weights, const Groups& groups,
                         const TensorView& grad_x);

  // grad_u, x [B, C, H, W] -> grad_lr [K] and, unless null, grad_td [K] and grad_bias [C].  The same bits
  // for the same number of threads.
  void (*weight_gradient)(const TensorView& grad_u, const TensorView& x, const Groups& groups,
                          const TensorView& grad_lr, const TensorView* grad_td, const TensorView* grad_bias);
};

VIOPS_DECLARE_KERNELS(CpuKernels);

// The same on a GPU, and a stream.
struct CudaKernels {
  void (*forward)(const TensorView& x, const Weights& weights, const Groups& groups, const Norm* norm,
                  const TensorView& y, void* stream);

  // scratch [P, 2, C] of A, P at least 1: sums of pieces.
  void (*norm_backward)(const TensorView& grad_y, const TensorView& x, const Weights& weights,
                        const Groups& groups, const Norm& norm, const TensorView& grad_u,
                        const TensorView& grad_norm_weight, const TensorView& grad_norm_bias,
                        const TensorView& scratch, void* stream);

  void (*input_gradient)(const TensorView& grad_u, const Weights& weights, const Groups& groups,
                         const TensorView& grad_x, void* stream);

  // scratch [P, 2 K + C] of A, P at least 1: sums of pieces.
  void (*weight_gradient)(const TensorView& grad_u, const TensorView& x, const Groups& groups,
                          const TensorView& grad_lr, const TensorView* grad_td, const TensorView* grad_bias,
                          const TensorView& scratch, void* stream);
};

VIOPS_DECLARE_CUDA_KERNELS(CudaKernels);

}  // namespace viops::mix_shift
