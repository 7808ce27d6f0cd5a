// Sums over runs of a plane, and over places of many channels; part of cpu.cpp.
#pragma once

#include "batch_channel_norm/cpu_values.h"

namespace viops::batch_channel_norm {
namespace {

// Of `count` values the mean and the sum of squared distances to it.
struct Moments {
  double count, mean, square;

  VIOPS_INLINE void add(const Moments& more) {
    const double total = count + more.count, distance = more.mean - mean;
    mean += distance * (more.count / total);
    square += more.square + distance * distance * (count * more.count / total);
    count = total;
  }
};

// Sums of a run of vectors, in several chains so that none is long and none waits for another.
constexpr int kChains = 4;

template <class A>
struct Chains {
  Vector<A> sums[kChains] = {};
  A rest = 0;

  VIOPS_INLINE A total() const { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest; }
  VIOPS_INLINE void add(int chain, Vector<A> value) { sums[chain] += value; }
  VIOPS_INLINE void add(int, A value) { rest += value; }
};

// Calls step(lanes, chain, i) over [0, count).
template <class A, class Step>
VIOPS_INLINE void walk_in_chains(int64_t count, const Step& step) {
  constexpr int kWide = kChains * kLanes<A>;
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    for (int chain = 0; chain < kChains; ++chain) step(Many<A>(), chain, i + chain * kLanes<A>);
  }
  for (; i + kLanes<A> <= count; i += kLanes<A>) step(Many<A>(), 0, i);
  for (; i < count; ++i) step(One<A>(), 0, i);
}

// x - shift along a run that stays in the first-level cache; the next one follows it.
template <class T, class A>
Moments moments_along(const T* x, int64_t count, A shift) {
  Chains<A> sum;
  walk_in_chains<A>(
      count, [&](auto lanes, int chain, int64_t i) { sum.add(chain, decltype(lanes)::load(x + i) - shift); });
  const Centred<T, A, A> centred = {x, shift, sum.total() / static_cast<A>(count)};
  Chains<A> distance, square;
  walk_in_chains<A>(count, [&](auto lanes, int chain, int64_t i) {
    centred.prefetch(i + count);
    const auto value = centred.template get<decltype(lanes)>(i);
    distance.add(chain, value);
    square.add(chain, value * value);
  });
  // the mean is rounded: these distances do not quite add up to zero
  const double off = static_cast<double>(distance.total()) / static_cast<double>(count);
  return {static_cast<double>(count), centred.mean + off, square.total() - count * off * off};
}

// Of the gradient, and of its products with x - shift - plane_mean.
struct GradientSums {
  double grad, product;
};

// Along a run, which the next one follows; `kept`, unless null, gets the gradient.
template <class T, class A, bool kRelu>
GradientSums sums_along(const Gradient<T, A, A, kRelu>& gradient, int64_t count, T* kept) {
  Chains<A> grads, products;
  walk_in_chains<A>(count, [&](auto lanes, int chain, int64_t i) {
    using Lanes = decltype(lanes);
    gradient.prefetch(i + count);
    const auto grad = gradient.template get<Lanes>(i);
    grads.add(chain, grad);
    products.add(chain, grad * gradient.y.x.template get<Lanes>(i));
    if (kept) Lanes::store(kept + i, grad);
  });
  return {grads.total(), products.total()};
}

// --- the same of `width` channels, over places that lie `stride` apart

constexpr int kPlacesAtOnce = 4;

// Calls step(at_once, lanes, s, c) over the places and channels, at_once being how many places it has to
// take.
template <class A, class Step>
VIOPS_INLINE void walk_places(int64_t places, int64_t width, const Step& step) {
  int64_t s = 0;
  for (; s + kPlacesAtOnce <= places; s += kPlacesAtOnce) {
    walk<A>(0, width,
            [&](auto lanes, int64_t c) { step(std::integral_constant<int, kPlacesAtOnce>(), lanes, s, c); });
  }
  for (; s < places; ++s) {
    walk<A>(0, width, [&](auto lanes, int64_t c) { step(std::integral_constant<int, 1>(), lanes, s, c); });
  }
}

// Adds the moments of x [places, width] - shift [width] to those of `count` values: mean, square [width].
// memory: 3 arrays of width.
template <class T, class A>
void add_moments(const T* x, int64_t stride, int64_t places, int64_t width, const A* shift, double count,
                 double* mean, double* square, A* memory) {
  A *const own_mean = memory, *const distances = memory + width, *const squares = memory + 2 * width;
  std::fill(memory, memory + 3 * width, A(0));
  walk_places<A>(places, width, [&](auto at_once, auto lanes, int64_t s, int64_t c) {
    using Lanes = decltype(lanes);
    auto sum = Lanes::load(own_mean + c);
    for (int r = 0; r < at_once; ++r) sum += Lanes::load(x + (s + r) * stride + c) - Lanes::load(shift + c);
    Lanes::store(own_mean + c, sum);
  });
  walk<A>(0, width, [&](auto lanes, int64_t c) {
    using Lanes = decltype(lanes);
    Lanes::store(own_mean + c, Lanes::load(own_mean + c) / static_cast<A>(places));
  });
  walk_places<A>(places, width, [&](auto at_once, auto lanes, int64_t s, int64_t c) {
    using Lanes = decltype(lanes);
    auto distance = Lanes::load(distances + c), sum = Lanes::load(squares + c);
    for (int r = 0; r < at_once; ++r) {
      const Centred<T, A, const A*> centred = {x + (s + r) * stride, shift, own_mean};
      centred.prefetch(places * stride + c);  // of the next places
      const auto value = centred.template get<Lanes>(c);
      distance += value;
      sum += value * value;
    }
    Lanes::store(distances + c, distance);
    Lanes::store(squares + c, sum);
  });
  // as Moments::add, without a division for each channel
  const double more = static_cast<double>(places), reciprocal = 1 / more, share = more / (count + more);
  for (int64_t c = 0; c < width; ++c) {
    const double off = distances[c] * reciprocal;
    const double distance = own_mean[c] + off - mean[c];
    mean[c] += distance * share;
    square[c] += squares[c] - distances[c] * off + distance * distance * (count * share);
  }
}

// Adds the sums of a gradient [places, width] to grads and products [width]; `kept`, unless null, gets the
// gradient.  memory: 2 arrays of width.
template <class T, class A, bool kRelu>
void add_sums(const Gradient<T, A, const A*, kRelu>& gradient, int64_t stride, int64_t places, int64_t width,
              T* kept, double* grads, double* products, A* memory) {
  A *const own_grads = memory, *const own_products = memory + width;
  std::fill(memory, memory + 2 * width, A(0));
  walk_places<A>(places, width, [&](auto at_once, auto lanes, int64_t s, int64_t c) {
    using Lanes = decltype(lanes);
    auto grad_sum = Lanes::load(own_grads + c), product_sum = Lanes::load(own_products + c);
    for (int r = 0; r < at_once; ++r) {
      const int64_t skipped = (s + r) * stride;
      Gradient<T, A, const A*, kRelu> own = gradient;
      own.grad_y += skipped;
      own.y.x.x += skipped;
      if (own.y.residual) own.y.residual += skipped;
      const auto grad = own.template get<Lanes>(c);
      grad_sum += grad;
      product_sum += grad * own.y.x.template get<Lanes>(c);
      if (kept) Lanes::store(kept + skipped + c, grad);
    }
    Lanes::store(own_grads + c, grad_sum);
    Lanes::store(own_products + c, product_sum);
  });
  for (int64_t c = 0; c < width; ++c) {
    grads[c] += own_grads[c];
    products[c] += own_products[c];
  }
}

}  // namespace
}  // namespace viops::batch_channel_norm
