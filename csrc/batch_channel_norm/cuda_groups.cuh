// What lies between two walks over the values on the GPU: a block a group, in float64.
#pragma once

#include "batch_channel_norm/cuda_values.cuh"

namespace viops::batch_channel_norm {
namespace {

constexpr int kGroupThreads = 512;
constexpr int kGroupWarps = kGroupThreads / 32;

// The tensors of a call that are not like x, and what kernels hand on: scratch [P, 2, B, C].  Its last piece
// is for slopes and offsets, the others for sums of pieces of planes.
template <class A>
struct Small {
  const A *bn_weight, *bn_bias, *weight, *bias;                                 // [C], [C], [G], [G]
  A *shift, *plane_mean, *plane_square, *mean, *var, *group_mean, *group_rstd;  // as Statistics has them
  A* scratch;
  int64_t batch, channels, places, groups, in_group;
  int64_t max_pieces;  // P - 1
  double eps;

  __device__ __forceinline__ double factor(int64_t c) const {
    return factor_of<double>(bn_weight[c], var[c], eps);
  }
  __device__ __forceinline__ double distance(int64_t plane, int64_t c) const {
    return static_cast<double>(plane_mean[plane]) - static_cast<double>(mean[c]);
  }
  // The mean of u over a plane.
  __device__ __forceinline__ double u_mean(int64_t plane, int64_t c) const {
    return distance(plane, c) * factor(c) + static_cast<double>(bn_bias[c]);
  }
  // The mean of u over group g of image b.
  __device__ __forceinline__ double u_mean_of_group(int64_t b, int64_t g) const {
    return static_cast<double>(group_mean[b * groups + g]) +
           u_mean(b * channels + g * in_group, g * in_group);
  }
  __device__ __forceinline__ double scale(int64_t b, int64_t g) const {
    return static_cast<double>(weight[g]) * static_cast<double>(group_rstd[b * groups + g]);
  }
  __device__ __forceinline__ Affine<double> affine(int64_t b, int64_t c) const {
    const int64_t g = c / in_group;
    return affine_of<double>(u_mean(b * channels + c, c) - u_mean_of_group(b, g), factor(c), scale(b, g),
                             bias[g]);
  }
  // Of all planes the first or second numbers of a piece, and one of them.
  __device__ __forceinline__ A* numbers(int64_t piece, int which) const {
    return scratch + (2 * piece + which) * batch * channels;
  }
  __device__ __forceinline__ A& number(int64_t piece, int which, int64_t plane) const {
    return numbers(piece, which)[plane];
  }
  __device__ __forceinline__ void write_affine(int64_t b, int64_t c) const {
    const Affine<double> own = affine(b, c);
    number(max_pieces, 0, b * channels + c) = static_cast<A>(own.slope);
    number(max_pieces, 1, b * channels + c) = static_cast<A>(own.offset);
  }
};

// The pieces that a walk has left in scratch.
struct Pieces {
  int64_t count, length, places;

  __device__ __forceinline__ double size(int64_t piece) const {
    return static_cast<double>(min(length, places - piece * length));
  }
};

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }

// From so many pieces on a plane's are merged by a warp, else by a thread.
constexpr int64_t kManyPieces = 8;

// Who merges the pieces of a plane: pieces first, first + step, ..., and the sum over all who do.
template <bool kByWarp>
struct Merger {
  static constexpr int kStep = kByWarp ? 32 : 1;
  static __device__ __forceinline__ int first() { return kByWarp ? lane() : 0; }
  static __device__ __forceinline__ double total(double value) { return kByWarp ? warp_sum(value) : value; }

  // Calls merge(plane) for the planes of group g.
  template <class A, class Merge>
  static __device__ __forceinline__ void for_each_plane(const Small<A>& small, int64_t g,
                                                        const Merge& merge) {
#pragma unroll 1
    for (int64_t i = static_cast<int>(threadIdx.x) / kStep; i < small.batch * small.in_group;
         i += kGroupThreads / kStep) {
      merge(i / small.in_group * small.channels + g * small.in_group + i % small.in_group);
    }
  }
};

// plane_mean and plane_square, from the mean and the sum of squares of each piece.
template <bool kByWarp, class A>
__device__ void merge_moments(const Small<A>& small, const Pieces& pieces, int64_t g) {
  using By = Merger<kByWarp>;
  By::for_each_plane(small, g, [&](int64_t plane) {
    double mean = 0, square = 0;
    for (int64_t piece = By::first(); piece < pieces.count; piece += By::kStep) {
      mean += small.number(piece, 0, plane) * pieces.size(piece);
    }
    mean = By::total(mean) / static_cast<double>(max(pieces.places, int64_t(1)));
    for (int64_t piece = By::first(); piece < pieces.count; piece += By::kStep) {
      const double distance = small.number(piece, 0, plane) - mean;
      square += small.number(piece, 1, plane) + distance * distance * pieces.size(piece);
    }
    square = By::total(square);
    if (By::first() > 0) return;
    small.plane_mean[plane] = static_cast<A>(mean);
    small.plane_square[plane] = static_cast<A>(square);
  });
}

// The sums over all pieces of a plane, to its first.
template <bool kByWarp, class A>
__device__ void merge_sums(const Small<A>& small, const Pieces& pieces, int64_t g) {
  using By = Merger<kByWarp>;
  By::for_each_plane(small, g, [&](int64_t plane) {
    double grad = 0, product = 0;
    for (int64_t piece = By::first(); piece < pieces.count; piece += By::kStep) {
      grad += small.number(piece, 0, plane);
      product += small.number(piece, 1, plane);
    }
    grad = By::total(grad), product = By::total(product);
    if (By::first() > 0) return;
    small.number(0, 0, plane) = static_cast<A>(grad);
    small.number(0, 1, plane) = static_cast<A>(product);
  });
}

// mean and var of channel c, by one warp.
template <class A>
__device__ void write_channel(const Small<A>& small, Mode mode, const A* given_var, const A* speed,
                              int64_t c) {
  const int64_t count = small.batch * small.places;
  double mean = 0, square = 0;
  if (count > 0 && mode != Mode::constants) {
    for (int64_t b = lane(); b < small.batch; b += 32) mean += small.plane_mean[b * small.channels + c];
    mean = warp_sum(mean) / static_cast<double>(small.batch);
    for (int64_t b = lane(); b < small.batch; b += 32) {
      const double distance = small.plane_mean[b * small.channels + c] - mean;
      square += small.plane_square[b * small.channels + c] + small.places * distance * distance;
    }
    square = warp_sum(square);
  }
  if (lane() > 0) return;
  const ChannelStatistics<double> normalising(mode, count, mean,
                                              square / static_cast<double>(max(count, int64_t(1))),
                                              given_var ? given_var[c] : A(0), speed ? *speed : A(0));
  small.mean[c] = static_cast<A>(normalising.mean);
  small.var[c] = static_cast<A>(normalising.var);
}

// group_mean and group_rstd of group g of image b, and the affines of its planes, by one warp.
template <class A>
__device__ void write_group(const Small<A>& small, int64_t b, int64_t g) {
  const int64_t first = g * small.in_group, last = first + small.in_group, planes = b * small.channels;
  double mean = 0, within = 0, between = 0;
  for (int64_t c = first + lane(); c < last; c += 32) mean += small.u_mean(planes + c, c);
  mean = warp_sum(mean) / static_cast<double>(small.in_group);
  for (int64_t c = first + lane(); c < last; c += 32) {
    const double distance = small.u_mean(planes + c, c) - mean, factor = small.factor(c);
    between += distance * distance;
    if (factor != 0) within += small.plane_square[planes + c] * factor * factor;  // not inf * 0
  }
  const double places = static_cast<double>(max(small.places, int64_t(1)));
  const double var = (warp_sum(within) / places + warp_sum(between)) / static_cast<double>(small.in_group);
  if (lane() == 0) {
    small.group_mean[b * small.groups + g] = static_cast<A>(mean - small.u_mean(planes + first, first));
    small.group_rstd[b * small.groups + g] = static_cast<A>(factor_of(1.0, var, small.eps));
  }
  __syncwarp();
  for (int64_t c = first + lane(); c < last; c += 32) small.write_affine(b, c);
}

// Strides of x, of which a median of values is what the means of a channel are relative to.
struct Strides {
  int64_t batch, channel, place;
};

template <class A, class T>
__device__ __forceinline__ A shift_of(const T* x, const A* given_mean, int64_t batch, int64_t places,
                                      const Strides& strides, int64_t c) {
  if (given_mean) return given_mean[c];
  A values[kShiftValues];
#pragma unroll
  for (int i = 0; i < kShiftValues; ++i) {
    values[i] = static_cast<A>(
        widen(x[c * strides.channel + shift_place(i, batch, places, strides.batch, strides.place)]));
  }
  return median(values);
}

// The shifts, statistics of the channels and the groups, and the affines.
template <class T, class A>
__global__ void __launch_bounds__(kGroupThreads, 1)
    forward_groups_kernel(Small<A> small, Pieces pieces, Mode mode, const T* x, Strides strides,
                          const A* given_mean, const A* given_var, const A* speed) {
  const int64_t g = blockIdx.x, first = g * small.in_group;
  for (int64_t k = threadIdx.x; k < small.in_group; k += kGroupThreads) {
    const bool none = !given_mean && small.batch * small.places == 0;
    small.shift[first + k] =
        none ? A(0) : shift_of(x, given_mean, small.batch, small.places, strides, first + k);
  }
  pieces.count < kManyPieces ? merge_moments<false>(small, pieces, g) : merge_moments<true>(small, pieces, g);
  __syncthreads();
#pragma unroll 1
  for (int64_t k = warp(); k < small.in_group; k += kGroupWarps) {
    write_channel(small, mode, given_var, speed, first + k);
  }
  __syncthreads();
#pragma unroll 1
  for (int64_t b = warp(); b < small.batch; b += kGroupWarps) write_group(small, b, g);
}

// The affines again: a thread a plane.
template <class A>
__global__ void __launch_bounds__(kGroupThreads, 1) affines_kernel(Small<A> small) {
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x;
  if (plane < small.batch * small.channels) {
    small.write_affine(plane / small.channels, plane % small.channels);
  }
}

template <class A>
struct SmallGradients {
  A *bn_weight, *bn_bias, *weight, *bias;  // [C], [C], [G], [G]
  const A* totals;                         // [2, C] or null
  int64_t count;
};

struct GroupSums {
  double grad, product;  // with z
};

// The sums over group g of image b.  What group norm alone gives for centre and slant goes to the second
// piece. By one warp.
template <class A>
__device__ GroupSums group_backward(const Small<A>& small, int64_t b, int64_t g) {
  const int64_t first = g * small.in_group, last = first + small.in_group, planes = b * small.channels;
  const double rstd = small.group_rstd[b * small.groups + g], mean = small.u_mean_of_group(b, g);
  const double size = static_cast<double>(max(small.in_group * small.places, int64_t(1)));
  GroupSums sums = {0, 0};
  for (int64_t c = first + lane(); c < last; c += 32) {
    const double grad = small.number(0, 0, planes + c), product = small.number(0, 1, planes + c);
    sums.grad += grad;
    sums.product += (small.factor(c) * product + (small.u_mean(planes + c, c) - mean) * grad) * rstd;
  }
  sums = {warp_sum(sums.grad), warp_sum(sums.product)};
  for (int64_t c = first + lane(); c < last; c += 32) {
    const double z_mean = (small.u_mean(planes + c, c) - mean) * rstd;
    const PlaneGradient<double> own(small.scale(b, g), z_mean, small.factor(c) * rstd, sums.grad / size,
                                    sums.product / size);
    small.number(1, 0, planes + c) = static_cast<A>(own.centre);
    small.number(1, 1, planes + c) = static_cast<A>(own.slant);
  }
  return sums;
}

// The gradients of channel c's parameters; what the walk needs: along in place of the first piece's first
// numbers, centre and slant in full.  By one warp.
template <class A>
__device__ void channel_backward(const Small<A>& small, const SmallGradients<A>& grads, int64_t c) {
  const int64_t g = c / small.in_group;
  double of_bias = 0, of_factor = 0;
  for (int64_t b = lane(); b < small.batch; b += 32) {
    const int64_t plane = b * small.channels + c;
    const double along = small.scale(b, g);
    const double of_sum =
        along * small.number(0, 0, plane) - small.places * static_cast<double>(small.number(1, 0, plane));
    of_bias += of_sum;
    of_factor += along * small.number(0, 1, plane) -
                 static_cast<double>(small.number(1, 1, plane)) * small.plane_square[plane] +
                 small.distance(plane, c) * of_sum;
  }
  const double factor = small.factor(c), rstd = factor_of<double>(1, small.var[c], small.eps);
  const A sums[2] = {static_cast<A>(warp_sum(of_bias)), static_cast<A>(warp_sum(of_factor) * rstd)};
  if (lane() == 0) {
    grads.bn_bias[c] = sums[0];
    grads.bn_weight[c] = sums[1];
  }
  double shift = 0, bend = 0;  // through the mean and the variance
  if (grads.count > 0) {
    const double share = factor / static_cast<double>(grads.count);
    shift = share * (grads.totals ? grads.totals[c] : sums[0]);
    bend = share * rstd * (grads.totals ? grads.totals[small.channels + c] : sums[1]);
  }
  for (int64_t b = lane(); b < small.batch; b += 32) {
    const int64_t plane = b * small.channels + c;
    A &centre = small.number(1, 0, plane), &slant = small.number(1, 1, plane);
    small.number(0, 0, plane) = static_cast<A>(small.scale(b, g) * factor);
    centre = static_cast<A>(centre * factor + shift + small.distance(plane, c) * bend);
    slant = static_cast<A>(slant * factor + bend);
  }
}

template <class A>
__global__ void __launch_bounds__(kGroupThreads, 1)
    backward_groups_kernel(Small<A> small, Pieces pieces, SmallGradients<A> grads) {
  VIOPS_SHARED(double, of_warps, [2][kGroupWarps]);
  const int64_t g = blockIdx.x;
  pieces.count < kManyPieces ? merge_sums<false>(small, pieces, g) : merge_sums<true>(small, pieces, g);
  __syncthreads();
  GroupSums sums = {0, 0};  // over the images of this warp
#pragma unroll 1
  for (int64_t b = warp(); b < small.batch; b += kGroupWarps) {
    const GroupSums own = group_backward(small, b, g);
    sums = {sums.grad + own.grad, sums.product + own.product};
  }
  if (lane() == 0) {
    of_warps[0][warp()] = sums.grad;
    of_warps[1][warp()] = sums.product;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double grad = 0, product = 0;
    for (int i = 0; i < kGroupWarps; ++i) grad += of_warps[0][i], product += of_warps[1][i];
    grads.bias[g] = static_cast<A>(grad);
    grads.weight[g] = static_cast<A>(product);
  }
#pragma unroll 1
  for (int64_t k = warp(); k < small.in_group; k += kGroupWarps) {
    channel_backward(small, grads, g * small.in_group + k);
  }
}

}  // namespace
}  // namespace viops::batch_channel_norm
