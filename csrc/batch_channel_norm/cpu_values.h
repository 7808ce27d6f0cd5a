// The values of a run of elements, a vector or a single one at a time; part of cpu.cpp.
//
// A run lies along a plane, whose coefficients are the same for all of it, or along the channels of a place,
// which have coefficients of their own: P is A, or const A*.  prefetch(i) starts loading what get(i) reads.
#pragma once

#include "common/rows.h"

namespace viops::batch_channel_norm {
namespace {

template <class A>
struct One {
  using Value = A;
  template <class T>
  static VIOPS_INLINE Value load(const T* from) {
    return static_cast<A>(widen(*from));
  }
  template <class T>
  static VIOPS_INLINE void store(T* to, Value value) {
    *to = Narrow<T, A>::of(value);
  }
};

template <class A>
struct Many {
  using Value = Vector<A>;
  template <class T>
  static VIOPS_INLINE Value load(const T* from) {
    return viops::load<A>(from);
  }
  template <class T>
  static VIOPS_INLINE void store(T* to, Value value) {
    viops::store<A>(to, value);
  }
  template <class T>
  static VIOPS_INLINE void stream(T* to, Value value) {
    viops::stream<A>(to, value);
  }
};

// Calls step(lanes, i) for the elements from `begin` to `end`.
template <class A, class Step>
VIOPS_INLINE void walk(int64_t begin, int64_t end, const Step& step) {
  int64_t i = begin;
  for (; i + kLanes<A> <= end; i += kLanes<A>) step(Many<A>(), i);
  for (; i < end; ++i) step(One<A>(), i);
}

template <class Lanes, class A>
VIOPS_INLINE A at(A same, int64_t) {
  return same;
}
template <class Lanes, class A>
VIOPS_INLINE typename Lanes::Value at(const A* each, int64_t i) {
  return Lanes::load(each + i);
}

// x - shift - plane_mean: the two are never added up, since far from zero that would round.
template <class T, class A, class P>
struct Centred {
  const T* x;
  P shift, mean;

  VIOPS_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x + i); }
  template <class Lanes>
  VIOPS_INLINE typename Lanes::Value get(int64_t i) const {
    return (Lanes::load(x + i) - at<Lanes>(shift, i)) - at<Lanes>(mean, i);
  }
};

// y; residual may be null.
template <class T, class A, class P, bool kRelu>
struct Normalised {
  Centred<T, A, P> x;
  const T* residual;
  P slope, offset;

  VIOPS_INLINE void prefetch(int64_t i) const {
    x.prefetch(i);
    if (residual) __builtin_prefetch(residual + i);
  }
  template <class Lanes>
  VIOPS_INLINE typename Lanes::Value get(int64_t i) const {
    typename Lanes::Value y = x.template get<Lanes>(i) * at<Lanes>(slope, i) + at<Lanes>(offset, i);
    if (residual) y += Lanes::load(residual + i);
    if constexpr (kRelu) y = y < A(0) ? typename Lanes::Value{} : y;  // NaN stays
    return y;
  }
};

// grad_y, where relu zero but at positive y.
template <class T, class A, class P, bool kRelu>
struct Gradient {
  const T* grad_y;
  Normalised<T, A, P, false> y;

  VIOPS_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(grad_y + i);
    kRelu ? y.prefetch(i) : y.x.prefetch(i);
  }
  template <class Lanes>
  VIOPS_INLINE typename Lanes::Value get(int64_t i) const {
    const typename Lanes::Value grad = Lanes::load(grad_y + i);
    if constexpr (kRelu) {
      return y.template get<Lanes>(i) > A(0) ? grad : typename Lanes::Value{};
    } else {
      return grad;
    }
  }
};

template <class T, class A, class P, bool kRelu>
struct GradientToX {
  Gradient<T, A, P, kRelu> grad;
  P along, centre, slant;

  VIOPS_INLINE void prefetch(int64_t i) const { grad.prefetch(i); }
  template <class Lanes>
  VIOPS_INLINE typename Lanes::Value get(int64_t i) const {
    return (grad.template get<Lanes>(i) * at<Lanes>(along, i) - at<Lanes>(centre, i)) -
           grad.y.x.template get<Lanes>(i) * at<Lanes>(slant, i);
  }
};

// to[i] = values.get(i); past the caches where `stream` is set: the caller fences.  What is read next lies
// `ahead` of the run, to either side: no hardware guesses that, nor goes past a page.
template <class A, class T, class Values>
VIOPS_INLINE void write(T* to, int64_t count, bool stream, int64_t ahead, const Values& values) {
  const auto step = [&](auto lanes, int64_t i) {
    using Lanes = decltype(lanes);
    values.prefetch(i + ahead);
    Lanes::store(to + i, values.template get<Lanes>(i));
  };
  if (!stream) return walk<A>(0, count, step);
  const auto place = reinterpret_cast<uintptr_t>(to) / sizeof(T);
  constexpr int64_t kLine = kCacheLine / sizeof(T);
  int64_t i = 0;
  for (; i < count && (place + i) % kLine; ++i) step(One<A>(), i);
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    values.prefetch(i + ahead);
    Many<A>::stream(to + i, values.template get<Many<A>>(i));
  }
  for (; i < count; ++i) step(One<A>(), i);
}

}  // namespace
}  // namespace viops::batch_channel_norm
