// What lies between two walks over the values: statistics of channels and groups, in float64; part of
// cpu.cpp.
//
// All of a group is one thread's.  What it hands on is rounded to A first, so that backward meets the same.
#pragma once

#include "batch_channel_norm/cpu_sums.h"

namespace viops::batch_channel_norm {
namespace {

struct Sizes {
  int64_t batch, channels, places, groups, in_group;

  Sizes(const TensorView& x, const TensorView& weight)
      : batch(x.shape[0]),
        channels(x.shape[1]),
        places(x.shape[2]),
        groups(weight.shape[0]),
        in_group(channels / groups) {}
  int64_t values() const { return batch * channels * places; }
};

// Two sums of each piece of each plane: [B, pieces, 2, C].
struct Partials {
  double* data;
  int64_t pieces, length;  // of which the last piece has fewer places
  int64_t channels, places;

  int64_t bytes(int64_t batch) const { return padded(batch * pieces * 2 * channels * 8); }
  double* first(int64_t b, int64_t piece) const { return data + (b * pieces + piece) * 2 * channels; }
  double* second(int64_t b, int64_t piece) const { return first(b, piece) + channels; }
  int64_t begin(int64_t piece) const { return piece * length; }
  int64_t end(int64_t piece) const { return std::min(places, (piece + 1) * length); }

  Moments moments(int64_t b, int64_t c) const {
    Moments all = {0, 0, 0};
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Moments own = {static_cast<double>(end(piece) - begin(piece)), first(b, piece)[c],
                           second(b, piece)[c]};
      piece == 0 ? void(all = own) : all.add(own);
    }
    return all;
  }
  GradientSums sums(int64_t b, int64_t c) const {
    GradientSums all = {0, 0};
    for (int64_t piece = 0; piece < pieces; ++piece) {
      all.grad += first(b, piece)[c];
      all.product += second(b, piece)[c];
    }
    return all;
  }
};

// The tensors of a call that are not [B, C, S].
template <class A>
struct Small {
  const A *bn_weight, *bn_bias, *weight, *bias;                                 // [C], [C], [G], [G]
  A *shift, *plane_mean, *plane_square, *mean, *var, *group_mean, *group_rstd;  // as Statistics has them
  double eps;

  Small(const Parameters& p, const Statistics& s)
      : bn_weight(data(p.bn_weight)),
        bn_bias(data(p.bn_bias)),
        weight(data(p.weight)),
        bias(data(p.bias)),
        shift(data(s.shift)),
        plane_mean(data(s.plane_mean)),
        plane_square(data(s.plane_square)),
        mean(data(s.mean)),
        var(data(s.var)),
        group_mean(data(s.group_mean)),
        group_rstd(data(s.group_rstd)),
        eps(p.eps) {}
  static A* data(const TensorView& view) { return static_cast<A*>(view.data); }

  VIOPS_INLINE double rstd(int64_t c) const { return factor_of(1.0, static_cast<double>(var[c]), eps); }
  VIOPS_INLINE double factor(int64_t c) const { return rstd(c) * bn_weight[c]; }
  // The distance of a plane's mean to what normalises its channel.
  VIOPS_INLINE double distance(int64_t plane, int64_t c) const {
    return static_cast<double>(plane_mean[plane]) - static_cast<double>(mean[c]);
  }
};

// The means of u over the planes of a group of one image, relative to that over the group.
template <class A>
struct GroupMeans {
  const Small<A>& small;
  int64_t plane, first;  // the first one's
  double group_mean;

  GroupMeans(const Sizes& sizes, const Small<A>& small, int64_t b, int64_t g)
      : small(small), plane(b * sizes.channels + g * sizes.in_group), first(g * sizes.in_group) {
    group_mean = small.group_mean[b * sizes.groups + g] + u_mean(0, small.factor(first));
  }
  VIOPS_INLINE double u_mean(int64_t k, double factor) const {
    return small.distance(plane + k, first + k) * factor + small.bn_bias[first + k];
  }
  VIOPS_INLINE double distance(int64_t k, double factor) const { return u_mean(k, factor) - group_mean; }
};

// For each plane the affine that gives y; slopes, offsets [B, C].
template <class A>
void write_affines(const Sizes& sizes, const Small<A>& small, int64_t g, A* slopes, A* offsets) {
  for (int64_t b = 0; b < sizes.batch; ++b) {
    const GroupMeans<A> means(sizes, small, b, g);
    const double scale = static_cast<double>(small.weight[g]) * small.group_rstd[b * sizes.groups + g];
    for (int64_t k = 0; k < sizes.in_group; ++k) {
      const double factor = small.factor(means.first + k);
      const Affine<double> affine =
          affine_of<double>(means.distance(k, factor), factor, scale, small.bias[g]);
      slopes[means.plane + k] = static_cast<A>(affine.slope);
      offsets[means.plane + k] = static_cast<A>(affine.offset);
    }
  }
}

// plane_mean and plane_square of a group, from their pieces.
template <class A>
void merge_planes(const Sizes& sizes, const Small<A>& small, int64_t g, const Partials& partials) {
  for (int64_t b = 0; b < sizes.batch; ++b) {
    for (int64_t c = g * sizes.in_group; c < (g + 1) * sizes.in_group; ++c) {
      const Moments moments = partials.moments(b, c);
      small.plane_mean[b * sizes.channels + c] = static_cast<A>(moments.mean);
      small.plane_square[b * sizes.channels + c] = static_cast<A>(moments.square);
    }
  }
}

// Of a channel's values, of which there are some, relative to its shift.
template <class A>
Moments channel_moments(const Sizes& sizes, const Small<A>& small, int64_t c) {
  double mean = 0, square = 0;
  for (int64_t b = 0; b < sizes.batch; ++b) mean += small.plane_mean[b * sizes.channels + c];
  mean /= static_cast<double>(sizes.batch);
  for (int64_t b = 0; b < sizes.batch; ++b) {
    const double distance = small.plane_mean[b * sizes.channels + c] - mean;
    square +=
        small.plane_square[b * sizes.channels + c] + static_cast<double>(sizes.places) * distance * distance;
  }
  return {static_cast<double>(sizes.batch * sizes.places), mean, square};
}

// mean and var of the channels of a group; given_var and speed as forward has them.
template <class A>
void write_channels(const Sizes& sizes, const Small<A>& small, int64_t g, Mode mode, const A* given_var,
                    const A* speed) {
  const int64_t count = sizes.batch * sizes.places;
  for (int64_t c = g * sizes.in_group; c < (g + 1) * sizes.in_group; ++c) {
    const Moments own =
        count && mode != Mode::constants ? channel_moments(sizes, small, c) : Moments{1, 0, 0};
    const ChannelStatistics<double> normalising(mode, count, own.mean, own.square / own.count,
                                                given_var ? given_var[c] : A(0), speed ? *speed : A(0));
    small.mean[c] = static_cast<A>(normalising.mean);
    small.var[c] = static_cast<A>(normalising.var);
  }
}

// group_mean and group_rstd of a group, over its channels.
template <class A>
void write_group(const Sizes& sizes, const Small<A>& small, int64_t g, double* factors) {
  const int64_t first = g * sizes.in_group;
  const double in_group = static_cast<double>(sizes.in_group);
  const double places = static_cast<double>(std::max<int64_t>(sizes.places, 1));
  for (int64_t k = 0; k < sizes.in_group; ++k) factors[k] = small.factor(first + k);
  for (int64_t b = 0; b < sizes.batch; ++b) {
    const int64_t plane = b * sizes.channels + first;
    const auto u_mean = [&](int64_t k) {
      return small.distance(plane + k, first + k) * factors[k] + small.bn_bias[first + k];
    };
    double mean = 0, within = 0, between = 0;
    for (int64_t k = 0; k < sizes.in_group; ++k) mean += u_mean(k);
    mean /= in_group;
    for (int64_t k = 0; k < sizes.in_group; ++k) {
      const double distance = u_mean(k) - mean;
      between += distance * distance;
      if (factors[k] != 0) within += small.plane_square[plane + k] * factors[k] * factors[k];  // not inf * 0
    }
    const double var = (within / places + between) / in_group;
    small.group_mean[b * sizes.groups + g] = static_cast<A>(mean - u_mean(0));
    small.group_rstd[b * sizes.groups + g] = static_cast<A>(factor_of(1.0, var, small.eps));
  }
}

// What the walk over the gradients leaves to multiply with, [B, C] each.
template <class A>
struct PlaneGradients {
  A *along, *centre, *slant;
};

// Backward's sums and totals for the channels and the groups, [C] and [G].
template <class A>
struct SmallGradients {
  A *bn_weight, *bn_bias, *weight, *bias;
  const A* totals;  // [2, C] or null

  SmallGradients(const Gradients& g, const TensorView* totals)
      : bn_weight(Small<A>::data(g.bn_weight)),
        bn_bias(Small<A>::data(g.bn_bias)),
        weight(Small<A>::data(g.weight)),
        bias(Small<A>::data(g.bias)),
        totals(totals ? Small<A>::data(*totals) : nullptr) {}
};

// The gradients of a group's parameters, and of its planes as far as they go through group norm alone: to u.
// memory: 4 arrays of the channels in a group.
template <class A>
void group_backward(const Sizes& sizes, const Small<A>& small, int64_t g, const Partials& partials,
                    const SmallGradients<A>& grads, const PlaneGradients<A>& planes, double* memory) {
  const int64_t first = g * sizes.in_group;
  const double size = static_cast<double>(std::max<int64_t>(sizes.in_group * sizes.places, 1));
  double *const factors = memory, *const z_means = memory + sizes.in_group;
  double *const of_bias = z_means + sizes.in_group, *const of_factor = of_bias + sizes.in_group;
  for (int64_t k = 0; k < sizes.in_group; ++k) {
    factors[k] = small.factor(first + k);
    of_bias[k] = of_factor[k] = 0;
  }
  double of_group_weight = 0, of_group_bias = 0;
  for (int64_t b = 0; b < sizes.batch; ++b) {
    const int64_t plane = b * sizes.channels + first, group = b * sizes.groups + g;
    const double rstd = small.group_rstd[group];
    const GroupMeans<A> means(sizes, small, b, g);
    double grad = 0, product = 0;  // over the group: of the gradient, and with z
    for (int64_t k = 0; k < sizes.in_group; ++k) {
      z_means[k] = means.distance(k, factors[k]) * rstd;
      const GradientSums sums = partials.sums(b, first + k);
      grad += sums.grad;
      product += factors[k] * rstd * sums.product + z_means[k] * sums.grad;
    }
    of_group_weight += product;
    of_group_bias += grad;
    for (int64_t k = 0; k < sizes.in_group; ++k) {
      const PlaneGradient<double> own(small.weight[g] * rstd, z_means[k], factors[k] * rstd, grad / size,
                                      product / size);
      const GradientSums sums = partials.sums(b, first + k);
      const double of_sum = own.along * sums.grad - own.centre * static_cast<double>(sizes.places);
      of_bias[k] += of_sum;
      of_factor[k] += own.along * sums.product - own.slant * small.plane_square[plane + k] +
                      small.distance(plane + k, first + k) * of_sum;
      planes.along[plane + k] = static_cast<A>(own.along * factors[k]);
      planes.centre[plane + k] = static_cast<A>(own.centre * factors[k]);
      planes.slant[plane + k] = static_cast<A>(own.slant * factors[k]);
    }
  }
  grads.weight[g] = static_cast<A>(of_group_weight);
  grads.bias[g] = static_cast<A>(of_group_bias);
  for (int64_t k = 0; k < sizes.in_group; ++k) {
    grads.bn_bias[first + k] = static_cast<A>(of_bias[k]);
    grads.bn_weight[first + k] = static_cast<A>(of_factor[k] * small.rstd(first + k));
  }
}

// Adds what goes through the mean and the variance of `count` values a channel.
template <class A>
void add_through_statistics(const Sizes& sizes, const Small<A>& small, int64_t g, int64_t count,
                            const SmallGradients<A>& grads, const PlaneGradients<A>& planes) {
  for (int64_t c = g * sizes.in_group; c < (g + 1) * sizes.in_group; ++c) {
    const double share = small.factor(c) / static_cast<double>(count);
    const double shift = share * (grads.totals ? grads.totals[c] : grads.bn_bias[c]);
    const double bend =
        share * small.rstd(c) * (grads.totals ? grads.totals[sizes.channels + c] : grads.bn_weight[c]);
    for (int64_t plane = c; plane < sizes.batch * sizes.channels; plane += sizes.channels) {
      planes.centre[plane] = static_cast<A>(planes.centre[plane] + shift + small.distance(plane, c) * bend);
      planes.slant[plane] = static_cast<A>(planes.slant[plane] + bend);
    }
  }
}

}  // namespace
}  // namespace viops::batch_channel_norm
