// Batch channel norm (Qiao et al., arXiv:1903.10520): the contracts of its kernels.
//
// B images, C channels, S places, G groups of C / G channels; a plane is one channel of one image.  Tensors
// [B, C, S] are of one floating dtype and of one layout: all contiguous, or all contiguous as [B, S, C].  All
// others are contiguous and of A: float64 where x is, else float32.  Outputs overlap no input.  B and S may
// be zero, C and G not.  Shapes, dtypes, layouts and devices have been checked by bind.cpp.
//
// Means are relative to a shift of the channel, so that nothing cancels where x is far from zero.
//
//   u = (x - shift - mean) * bn_weight / sqrt(var + eps) + bn_bias            per channel
//   z = (u - mean(u)) * group_rstd, group_rstd = 1 / sqrt(var(u) + eps)      per group of an image
//   y = z * weight + bias + residual, and its positive part where relu
#pragma once

#include <cmath>

#include "common/cpu_level.h"
#include "common/cuda_info.h"
#include "common/tensor_view.h"

namespace viops::batch_channel_norm {

// What normalises the channels.
enum class Mode : int { constants = 0, of_batch = 1, estimate = 2 };

struct Parameters {
  const TensorView& bn_weight;  // [C]
  const TensorView& bn_bias;    // [C]
  const TensorView& weight;     // [G]
  const TensorView& bias;       // [G]
  double eps;
  bool relu;
};

// What forward gives and backward takes.
struct Statistics {
  const TensorView& shift;         // [C]
  const TensorView& plane_mean;    // [B, C]: of x - shift
  const TensorView& plane_square;  // [B, C]: sums of (x - shift - plane_mean)^2
  const TensorView& mean;          // [C]: what normalises: see forward
  const TensorView& var;           // [C]
  const TensorView& group_mean;    // [B, G]: of u, relative to its mean over the group's first plane
  const TensorView& group_rstd;    // [B, G]
};

// Where backward writes.
struct Gradients {
  const TensorView& x;          // [B, C, S]
  const TensorView* residual;   // [B, C, S], or null: grad_y where y is positive
  const TensorView& bn_weight;  // [C]
  const TensorView& bn_bias;    // [C]
  const TensorView& weight;     // [G]
  const TensorView& bias;       // [G]
};

struct CpuKernels {
  // x and, unless null, residual [B, C, S] -> y [B, C, S] and the statistics.  shift is the median of
  // kShiftValues values of the channel in mode of_batch (zero where x has none), else given_mean [C].  With m
  // and v the mean and the biased variance over B and S of x - shift, mean and var are, by mode: 0 and
  // given_var [C]; m and v; speed * m and given_var + speed * (v + m^2 - given_var).  Where x has no values
  // they are 0 and given_var, or 0. given_mean and given_var are null in mode of_batch, speed [1] in all
  // modes but estimate.
  void (*forward)(const TensorView& x, const TensorView* residual, const TensorView* given_mean,
                  const TensorView* given_var, const TensorView* speed, const Parameters& parameters,
                  Mode mode, const TensorView& y, const Statistics& statistics);

  // grad_y, x [B, C, S], residual as forward had it where relu, else null -> the gradients.  count: how many
  // values a channel mean and var are of, which the gradient then goes through, or 0: constants.  totals
  // [2, C], unless null: what the gradients of bn_bias and bn_weight are summed over all processes; null:
  // they are the sums themselves.
  void (*backward)(const TensorView& grad_y, const TensorView& x, const TensorView* residual,
                   const Parameters& parameters, const Statistics& statistics, int64_t count,
                   const TensorView* totals, const Gradients& gradients);
};

VIOPS_DECLARE_KERNELS(CpuKernels);

// The same on `stream`, a cudaStream_t.  scratch [P, 2, B, C], P at least 3, is of A and of any content:
// pieces of planes are worked on side by side, P - 1 of them at most.
struct CudaKernels {
  void (*forward)(const TensorView& x, const TensorView* residual, const TensorView* given_mean,
                  const TensorView* given_var, const TensorView* speed, const Parameters& parameters,
                  Mode mode, const TensorView& y, const Statistics& statistics, const TensorView& scratch,
                  void* stream);
  void (*backward)(const TensorView& grad_y, const TensorView& x, const TensorView* residual,
                   const Parameters& parameters, const Statistics& statistics, int64_t count,
                   const TensorView* totals, const Gradients& gradients, const TensorView& scratch,
                   void* stream);
};

VIOPS_DECLARE_CUDA_KERNELS(CudaKernels);

#if defined(__CUDACC__)
#define VIOPS_HOST_DEVICE __host__ __device__
#else
#define VIOPS_HOST_DEVICE
#endif

namespace {

// Whether tensors like x [B, C, S] are contiguous as [B, S, C], and not as [B, C, S]; a plane of a single
// place is walked along the channels too.
inline bool is_channels_last(const TensorView& x) {
  return x.shape[2] == 1 || (x.stride[2] != 1 && x.shape[1] > 1);
}

// A shift is the median of so many values, spread over batch and places, so that a lone one far away does
// not take the digits of all others.
constexpr int kShiftValues = 5;

// Where the i-th of them is in a channel that lies as [B, S] with these strides.
VIOPS_HOST_DEVICE inline int64_t shift_place(int i, int64_t batch, int64_t places, int64_t stride_b,
                                             int64_t stride_s) {
  const int64_t at = (batch * places - 1) / (kShiftValues - 1) * i +
                     (batch * places - 1) % (kShiftValues - 1) * i / (kShiftValues - 1);
  return at / places * stride_b + at % places * stride_s;
}

template <class R>
VIOPS_HOST_DEVICE R least(R a, R b) {
  return a < b ? a : b;
}
template <class R>
VIOPS_HOST_DEVICE R most(R a, R b) {
  return a < b ? b : a;
}
template <class R>
VIOPS_HOST_DEVICE R median(const R (&v)[kShiftValues]) {
  const R low = most(least(v[0], v[1]), least(v[2], v[3])), high = least(most(v[0], v[1]), most(v[2], v[3]));
  return most(least(low, high), least(most(low, high), v[4]));
}

// What normalises a channel, relative to its shift: see forward.  own_mean and own_var are of its `count`
// values.
template <class R>
struct ChannelStatistics {
  R mean, var;

  VIOPS_HOST_DEVICE ChannelStatistics(Mode mode, int64_t count, R own_mean, R own_var, R given_var, R speed)
      : mean(0), var(mode == Mode::of_batch ? R(0) : given_var) {
    if (count == 0 || mode == Mode::constants) return;
    mean = mode == Mode::of_batch ? own_mean : speed * own_mean;
    var = mode == Mode::of_batch ? own_var : given_var + speed * (own_var + own_mean * own_mean - given_var);
  }
};

// What batch norm multiplies a channel with.
template <class R>
VIOPS_HOST_DEVICE R factor_of(R bn_weight, R var, R eps) {
  using std::sqrt;
  return bn_weight / sqrt(var + eps);
}

// y = (x - shift - plane_mean) * slope + offset, over a plane.
template <class R>
struct Affine {
  R slope, offset;
};

// distance: of the means of u over the plane and over the group; scale: weight * group_rstd.
template <class R>
VIOPS_HOST_DEVICE Affine<R> affine_of(R distance, R factor, R scale, R bias) {
  return {scale * factor, distance * scale + bias};
}

// The gradient to u over a plane is along * grad - centre - (x - shift - plane_mean) * slant, since group
// norm takes from grad its share of two sums over the group, of grad and of grad * z.
template <class R>
struct PlaneGradient {
  R along, centre, slant;

  // z_mean: of z over the plane; spread: what group norm and batch norm multiply x with, scale / weight *
  // factor.
  VIOPS_HOST_DEVICE PlaneGradient(R scale, R z_mean, R spread, R mean_grad, R mean_product)
      : along(scale),
        centre(scale * (mean_grad + mean_product * z_mean)),
        slant(scale * mean_product * spread) {}
};

}  // namespace

}  // namespace viops::batch_channel_norm
