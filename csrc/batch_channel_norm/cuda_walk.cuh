// The walks over the values on the GPU: sums of pieces of planes, y, and the gradients.
#pragma once

#include "batch_channel_norm/cuda_groups.cuh"

namespace viops::batch_channel_norm {
namespace {

constexpr int kInFlight = 4;    // vectors of a thread that are loaded before the first is used
constexpr int kWithOthers = 2;  // where other tensors are read beside them

// Mean and sum of squares of the values that a thread has met of one channel.
template <class A>
struct Moments {
  A mean, square;

  // Adds those of more values: `share` is their part of all, `before` how many there were.
  __device__ __forceinline__ void add(const Moments& more, A share, A before) {
    const A distance = more.mean - mean;
    mean += distance * share;
    square += more.square + distance * (before * share) * distance;  // where nothing was before, not inf * 0
  }
};

// Takes in vectors of x - shift, `count` of them, in two passes.
template <class A, int kOwn, class T, int V>
__device__ __forceinline__ void add_vectors(const Vector<T, V> (&loaded)[kInFlight], int count,
                                            const Own<A, kOwn>& shift, A& seen, Moments<A> (&all)[kOwn]) {
  constexpr int kPerVector = V / kOwn;  // values of a channel
  const A more = static_cast<A>(count * kPerVector), reciprocal = 1 / more, share = more / (seen + more);
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    A sum = 0;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
      for (int v = 0; v < kPerVector; ++v) {
        if (u < count) sum += static_cast<A>(widen(loaded[u].get(own + v))) - shift.at(own);
      }
    }
    Moments<A> moments = {sum * reciprocal, 0};
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
      for (int v = 0; v < kPerVector; ++v) {
        if (u >= count) break;
        const A distance = static_cast<A>(widen(loaded[u].get(own + v))) - shift.at(own) - moments.mean;
        moments.square += distance * distance;
      }
    }
    all[own].add(moments, share, seen);
  }
  seen += more;
}

// The mean and the sum of squares of each piece of each plane, relative to the shift.
template <class T, class A, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    moments_kernel(Deal deal, Small<A> small, const T* x, const A* given_mean, Strides strides) {
  VIOPS_SHARED(double, room, [kThreads]);
  const Share<V, kChannelsLast> share(deal, blockIdx.x);
  constexpr int kOwn = Share<V, kChannelsLast>::kOwn;
  Own<A, kOwn> shift;
  Moments<A> all[kOwn] = {};
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    shift[own] = share.any ? shift_of(x, given_mean, deal.batch, deal.places, strides, share.c + own) : A(0);
  }
  A seen = 0;
#pragma unroll 1
  for (int64_t i = share.first; i < share.last; i += kInFlight * share.step) {
    Vector<T, V> loaded[kInFlight];
    int count = 0;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (i + u * share.step < share.last) {
        loaded[u] = load<V>(x + i + u * share.step);
        ++count;
      }
    }
    add_vectors(loaded, count, shift, seen, all);
  }
  const int64_t places = min(deal.length, deal.places - share.piece * deal.length);
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const double sum = sum_over_rows(deal, share, static_cast<double>(seen) * all[own].mean, room);
    const double mean = sum / static_cast<double>(places), distance = all[own].mean - mean;
    const double square =
        sum_over_rows(deal, share, all[own].square + static_cast<double>(seen) * distance * distance, room);
    if (share.row == 0 && share.any) {
      small.number(share.piece, 0, share.plane(deal) + own) = static_cast<A>(mean);
      small.number(share.piece, 1, share.plane(deal) + own) = static_cast<A>(square);
    }
  }
}

// x - shift - plane_mean, and the affine of it, for a thread's channels.
template <class A, int kOwn>
struct Coefficients {
  Own<A, kOwn> shift, mean, slope, offset;

  template <class S>
  __device__ __forceinline__ Coefficients(const Deal& deal, const Small<A>& small, const S& share,
                                          bool affine)
      : shift(small.shift + share.c, share.any),
        mean(small.plane_mean + share.plane(deal), share.any),
        slope(small.numbers(small.max_pieces, 0) + share.plane(deal), share.any && affine),
        offset(small.numbers(small.max_pieces, 1) + share.plane(deal), share.any && affine) {}

  template <class T>
  __device__ __forceinline__ A centred(T x, int v) const {
    return static_cast<A>(widen(x)) - shift.at(v) - mean.at(v);
  }
  // Before relu.
  __device__ __forceinline__ A normalised(A centred, int v) const {
    return centred * slope.at(v) + offset.at(v);
  }
};

// Blocks go from the last values to the first: those that were read last may still be in a cache.
__device__ __forceinline__ int64_t block_from_the_end() { return gridDim.x - 1 - blockIdx.x; }

template <class T, class A, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    normalise_kernel(Deal deal, Small<A> small, const T* x, const T* residual, bool relu, T* y) {
  const Share<V, kChannelsLast> share(deal, block_from_the_end());
  const Coefficients<A, Share<V, kChannelsLast>::kOwn> coefficients(deal, small, share, true);
#pragma unroll 1
  for (int64_t i = share.first; i < share.last; i += kWithOthers * share.step) {
    Vector<T, V> loaded[kWithOthers], added[kWithOthers];
#pragma unroll
    for (int u = 0; u < kWithOthers; ++u) {
      const int64_t place = i + u * share.step;
      if (place < share.last) {
        loaded[u] = load<V>(x + place);
        if (residual) added[u] = load<V>(residual + place);
      }
    }
#pragma unroll
    for (int u = 0; u < kWithOthers; ++u) {
      const int64_t place = i + u * share.step;
      if (place >= share.last) break;
      Vector<T, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        A value = coefficients.normalised(coefficients.centred(loaded[u].get(v), v), v);
        if (residual) value += static_cast<A>(widen(added[u].get(v)));
        if (relu && value < 0) value = 0;  // NaN stays
        out.set(v, Narrow<T>::of(value));
      }
      store(y + place, out);
    }
  }
}

// The tensors like x of backward; residual and kept may be null.
template <class T>
struct Values {
  const T *grad_y, *x, *residual;
  T* kept;  // the gradient to the residual: grad_y where y is positive
  T* grad_x;
};

// A vector of what is read in backward, and the gradient in it.
template <class T, int V>
struct Loaded {
  Vector<T, V> grad, x, residual;

  __device__ __forceinline__ Loaded() {}
  __device__ __forceinline__ void read(const Values<T>& values, int64_t place, bool masked) {
    grad = load<V>(values.grad_y + place);
    x = load<V>(values.x + place);
    if (masked && values.residual) residual = load<V>(values.residual + place);
  }
  // The gradient at element v, where `masked` zero but at positive y.
  template <class A, int kOwn>
  __device__ __forceinline__ T gradient(const Values<T>& values, const Coefficients<A, kOwn>& coefficients,
                                        A centred, int v, bool masked) const {
    if (!masked) return grad.get(v);
    A y = coefficients.normalised(centred, v);
    if (values.residual) y += static_cast<A>(widen(residual.get(v)));
    return y > 0 ? grad.get(v) : Narrow<T>::of(A(0));
  }
};

// Of each piece of each plane the sum of the gradient, and of its products with x - shift - plane_mean.
template <class T, class A, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    gradient_sums_kernel(Deal deal, Small<A> small, Values<T> values, bool relu) {
  VIOPS_SHARED(double, room, [kThreads]);
  const Share<V, kChannelsLast> share(deal, blockIdx.x);
  constexpr int kOwn = Share<V, kChannelsLast>::kOwn;
  const Coefficients<A, kOwn> coefficients(deal, small, share, relu);
  A grads[kOwn] = {}, products[kOwn] = {};
#pragma unroll 1
  for (int64_t i = share.first; i < share.last; i += kWithOthers * share.step) {
    Loaded<T, V> loaded[kWithOthers];
#pragma unroll
    for (int u = 0; u < kWithOthers; ++u) {
      if (i + u * share.step < share.last) loaded[u].read(values, i + u * share.step, relu);
    }
#pragma unroll
    for (int u = 0; u < kWithOthers; ++u) {
      const int64_t place = i + u * share.step;
      if (place >= share.last) break;
      Vector<T, V> kept;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A centred = coefficients.centred(loaded[u].x.get(v), v);
        kept.set(v, loaded[u].gradient(values, coefficients, centred, v, relu));
        const A grad = static_cast<A>(widen(kept.get(v)));
        grads[kOwn == 1 ? 0 : v] += grad;
        products[kOwn == 1 ? 0 : v] += grad * centred;
      }
      if (values.kept) store(values.kept + place, kept);
    }
  }
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const double grad = sum_over_rows(deal, share, static_cast<double>(grads[own]), room);
    const double product = sum_over_rows(deal, share, static_cast<double>(products[own]), room);
    if (share.row == 0 && share.any) {
      small.number(share.piece, 0, share.plane(deal) + own) = static_cast<A>(grad);
      small.number(share.piece, 1, share.plane(deal) + own) = static_cast<A>(product);
    }
  }
}

// masked: relu's mask is still to be applied to grad_y.
template <class T, class A, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    gradient_kernel(Deal deal, Small<A> small, Values<T> values, bool masked) {
  const Share<V, kChannelsLast> share(deal, block_from_the_end());
  constexpr int kOwn = Share<V, kChannelsLast>::kOwn;
  const Coefficients<A, kOwn> coefficients(deal, small, share, masked);
  const Own<A, kOwn> along(small.numbers(0, 0) + share.plane(deal), share.any);
  const Own<A, kOwn> centre(small.numbers(1, 0) + share.plane(deal), share.any);
  const Own<A, kOwn> slant(small.numbers(1, 1) + share.plane(deal), share.any);
#pragma unroll 1
  for (int64_t i = share.first; i < share.last; i += kWithOthers * share.step) {
    Loaded<T, V> loaded[kWithOthers];
#pragma unroll
    for (int u = 0; u < kWithOthers; ++u) {
      if (i + u * share.step < share.last) loaded[u].read(values, i + u * share.step, masked);
    }
#pragma unroll
    for (int u = 0; u < kWithOthers; ++u) {
      const int64_t place = i + u * share.step;
      if (place >= share.last) break;
      Vector<T, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A centred = coefficients.centred(loaded[u].x.get(v), v);
        const A grad = static_cast<A>(widen(loaded[u].gradient(values, coefficients, centred, v, masked)));
        out.set(v, Narrow<T>::of(along.at(v) * grad - centre.at(v) - centred * slant.at(v)));
      }
      store(values.grad_x + place, out);
    }
  }
}

}  // namespace
}  // namespace viops::batch_channel_norm
