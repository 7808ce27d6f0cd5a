// Token reorganization (EViT, ICLR 2022): the contracts of its kernels.
//
// B images, H heads, N tokens of which the first N - P are prefix and the last P patches, C channels,
// D channels a head.  Inputs may have any strides; outputs are contiguous unless said otherwise and
// overlap no input.  B, keep, P and C may be zero.  Sums are held in float32, or in float64 where an
// input is float64.  Shapes, dtypes and devices have been checked by bind.cpp.
#pragma once

#include "common/cpu_level.h"
#include "common/cuda_info.h"
#include "common/tensor_view.h"

namespace viops::token_reorganization {

// Whether an index has a place outside 0..P-1 or one twice in a row, and one such place.
struct WrongPlace {
  bool found = false;
  int64_t place = 0;
};

struct CpuKernels {
  // q, k, v [B, H, N, D] float32 -> out [B, H, N, D], any strides, = softmax(scale * q k^T) v, and
  // logsumexp [B, H, N], natural, of the rows of scale * q k^T.  H, N and D at least 1.
  void (*softmax_attention_forward)(const TensorView& q, const TensorView& k, const TensorView& v,
                                    double scale, const TensorView& out, const TensorView& logsumexp);

  // grad_out and the forward's q, k, v, out [B, H, N, D] and logsumexp [B, H, N] contiguous, all float32 ->
  // grad_q, grad_k, grad_v [B, H, N, D], any strides.
  void (*softmax_attention_backward)(const TensorView& grad_out, const TensorView& q, const TensorView& k,
                                     const TensorView& v, const TensorView& out, const TensorView& logsumexp,
                                     double scale, const TensorView& grad_q, const TensorView& grad_k,
                                     const TensorView& grad_v);

  // q, k [B, H, N, D] -> probabilities [B, H, N] = softmax over N of scale * <q[b, h, 0], k[b, h, n]>,
  // float64 where q is, else float32;
  // scores [B, P] float32 = mean over heads of the last P columns.  H, D and N at least 1.
  void (*class_attention_scores_forward)(const TensorView& q, const TensorView& k, double scale,
                                         const TensorView& scores, const TensorView& probabilities);

  // grad_scores [B, P] -> grad_q [B, H, N, D], zero but in row 0, and grad_k [B, H, N, D], of q's dtype
  // and any strides.
  void (*class_attention_scores_backward)(const TensorView& grad_scores, const TensorView& q,
                                          const TensorView& k, const TensorView& probabilities, double scale,
                                          const TensorView& grad_q, const TensorView& grad_k);

  // x [B, N, C], scores [B, P] -> tokens [B, N - P + keep + fuse, C]: prefix, kept patches by falling
  // score (NaN highest, equal ones by rising place), and with fuse the sum of scores * x over the
  // others; index [B, keep] int64.
  void (*reorganize_tokens_forward)(const TensorView& x, const TensorView& scores, const TensorView& tokens,
                                    const TensorView& index);

  // The three below read index [B, keep] and say whether it has a wrong place; then the outputs are not
  // complete.

  // grad_tokens [B, N - P + keep + fuse, C] -> grad_x [B, N, C] and grad_scores [B, P]; either may be
  // null.  x [B, N, C] is read for grad_scores alone, else null.
  WrongPlace (*reorganize_tokens_backward)(const TensorView& grad_tokens, const TensorView* x,
                                           const TensorView& scores, const TensorView& index,
                                           const TensorView* grad_x, const TensorView* grad_scores);

  // tokens [B, N - P + keep + fused, C] -> x [B, N, C]: kept tokens at their places, the fused token, or
  // zero where there is none, at all others.
  WrongPlace (*restore_tokens_forward)(const TensorView& tokens, const TensorView& index, int64_t num_patches,
                                       const TensorView& x);

  // grad_x [B, N, C] -> grad_tokens [B, N - P + keep + fused, C].
  WrongPlace (*restore_tokens_backward)(const TensorView& grad_x, const TensorView& index,
                                        int64_t num_patches, const TensorView& grad_tokens);
};

VIOPS_DECLARE_KERNELS(CpuKernels);

// The same on `stream`, a cudaStream_t; a wrong place in an index is a device-side assertion.
struct CudaKernels {
  void (*reorganize_tokens_forward)(const TensorView& x, const TensorView& scores, const TensorView& tokens,
                                    const TensorView& index, void* stream);
  void (*reorganize_tokens_backward)(const TensorView& grad_tokens, const TensorView* x,
                                     const TensorView& scores, const TensorView& index,
                                     const TensorView* grad_x, const TensorView* grad_scores, void* stream);
  void (*restore_tokens_forward)(const TensorView& tokens, const TensorView& index, int64_t num_patches,
                                 const TensorView& x, void* stream);
  void (*restore_tokens_backward)(const TensorView& grad_x, const TensorView& index, int64_t num_patches,
                                  const TensorView& grad_tokens, void* stream);
};

VIOPS_DECLARE_CUDA_KERNELS(CudaKernels);

}  // namespace viops::token_reorganization
