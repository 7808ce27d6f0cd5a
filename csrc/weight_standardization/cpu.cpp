// Weight standardization on the CPU; built once a CPU level.
#include <algorithm>
#include <cmath>

#include "common/rows.h"
#include "weight_standardization/weight_standardization.h"

namespace viops::weight_standardization {
namespace {

// What is read twice is read in chunks that stay in the first-level cache: of so many bytes, widened, forward
// of one tensor and backward of each of two.
constexpr int64_t kForwardChunk = 20 << 10;
constexpr int64_t kBackwardChunk = 6 << 10;
// The part of the last cache from which on a call's bytes go past it: what else is in it is the network's.
constexpr int64_t kShareOfCache = 4;
// Filters are taken a group at a time, as many as fit into a chunk: their roots and quotients side by side.
constexpr int64_t kGroup = 64;
// What the next group reads is loaded into a cache while this one is written, unless that is more bytes.
constexpr int64_t kMostAhead = 128 << 10;
// How many times larger than the squares what is taken from them may be: so much grows their rounding error.
constexpr int kMostCancelled = 7;

// `count` weights of a filter as vectors: whole ones, and one at the end that overlaps the one before it.  In
// a filter that is shorter than a vector the last one reaches beyond the filter instead.
template <class A>
struct Vectors {
  int64_t whole;          // weights in whole vectors
  int64_t last;           // where the last vector starts
  bool has_last;          // where there are more weights than in whole vectors
  MaskVector<A> of_last;  // its lanes that no whole vector has

  Vectors(int64_t count, int64_t filter_size) {
    const int64_t others = count % kLanes<A>;
    const bool fits = filter_size >= kLanes<A>;
    whole = count - others;
    has_last = others > 0;
    last = fits ? count - kLanes<A> : 0;
    const int64_t first_lane = fits ? kLanes<A> - others : 0, end_lane = fits ? kLanes<A> : others;
    for (int i = 0; i < kLanes<A>; ++i) of_last[i] = i >= first_lane && i < end_lane ? -1 : 0;
  }
};

// Adds to each of N totals the sum over the vectors of terms(place, N vectors).
template <class A, int N, class Terms>
VIOPS_INLINE void add_terms(const Vectors<A>& vectors, const Terms& terms, A (&totals)[N]) {
  constexpr int kWays = N < 3 ? 4 : 2;  // sums side by side: an addition waits for the one before it
  Vector<A> sums[kWays][N] = {};
  Vector<A> values[N];
  int64_t c = 0;
  for (; c + kWays * kLanes<A> <= vectors.whole; c += kWays * kLanes<A>) {
#pragma GCC unroll 8
    for (int way = 0; way < kWays; ++way) {
      terms(c + way * kLanes<A>, values);
      for (int n = 0; n < N; ++n) sums[way][n] += values[n];
    }
  }
  for (; c < vectors.whole; c += kLanes<A>) {
    terms(c, values);
    for (int n = 0; n < N; ++n) sums[0][n] += values[n];
  }
  if (vectors.has_last) {
    terms(vectors.last, values);
    for (int n = 0; n < N; ++n) sums[0][n] += vectors.of_last ? values[n] : Vector<A>{};
  }
  for (int n = 0; n < N; ++n) {
    for (int way = 1; way < kWays; ++way) sums[0][n] += sums[way][n];
    totals[n] += sum_lanes(sums[0][n]);
  }
}

// to[c] = make(c), a vector at a time; past the caches where `stream` is set, and all vectors are whole.
template <class A, class T, class Make>
VIOPS_INLINE void write(const Vectors<A>& vectors, T* to, bool stream, const Make& make) {
  if (stream) {
    for (int64_t c = 0; c < vectors.whole; c += kLanes<A>) viops::stream<A>(to + c, make(c));
    return;
  }
  for (int64_t c = 0; c < vectors.whole; c += kLanes<A>) store<A>(to + c, make(c));
  if (vectors.has_last) store<A>(to + vectors.last, make(vectors.last));
}

// A mean in two numbers: high + low = first + offset without rounding.  Distances to `high` keep all their
// bits where `first` is far from zero and where it is far from all others, and `low`, which is small,
// corrects sums.
template <class A>
struct Mean {
  A high, low;

  Mean(A first, A offset) : high(first + offset) {
    const A rounded = high - first;
    low = (first - (high - rounded)) + (offset - rounded);
  }
};

// What is the same for all filters of a call.
template <class A>
struct Filters {
  int64_t count, size;  // O, K
  int64_t chunk;        // weights of a filter's chunk, but for its last one
  int64_t group;        // filters of a group, but for the last one
  Vectors<A> of_chunk, of_last_chunk, of_filter;
  Options options;

  Filters(const TensorView& weight, const Options& options, int64_t chunk_size)
      : count(weight.shape[0]),
        size(weight.shape[1]),
        chunk(std::min(chunk_size, size)),
        group(size > 0 ? std::max<int64_t>(1, std::min(kGroup, chunk_size / size)) : kGroup),
        of_chunk(chunk, size),
        of_last_chunk(size - last_chunk(), size),
        of_filter(size, size),
        options(options) {}

  int64_t last_chunk() const { return size > 0 ? (size - 1) / chunk * chunk : 0; }
  const Vectors<A>& vectors(int64_t start) const { return start == last_chunk() ? of_last_chunk : of_chunk; }
  // Where what `group` filters read of T goes on, for the prefetches of their writing; or 0.
  template <class T>
  int64_t ahead(int64_t group) const {
    return group * size * static_cast<int64_t>(sizeof(T)) <= kMostAhead ? group * size : 0;
  }
  double degrees() const { return static_cast<double>(std::max<int64_t>(size - options.unbiased, 1)); }
};

// The mean of `count` weights, relative to a guess of it, and the sum of squared distances to it.
template <class A, class T>
VIOPS_INLINE void moments(const Vectors<A>& vectors, const T* from, A count, A guess, A& mean, A& squares) {
  A totals[2] = {};
  const auto terms_at = [&](int64_t c, Vector<A>* terms) {
    terms[0] = load<A>(from + c) - guess;
    terms[1] = terms[0] * terms[0];
  };
  add_terms(vectors, terms_at, totals);
  mean = totals[0] / count;
  squares = std::max(totals[1] - totals[0] * mean, A(0));
}

// The same relative to the filter's first weight.  Where that is a poor guess, and the squares have
// cancelled, they are taken again relative to the mean.
template <class A, class T>
VIOPS_INLINE void chunk_statistics(const Vectors<A>& vectors, const T* from, int64_t size, A first, A& mean,
                                   A& squares) {
  const A count = static_cast<A>(size);
  moments(vectors, from, count, first, mean, squares);
  if (count * mean * mean > kMostCancelled * squares) {
    const A guess = first + mean;
    moments(vectors, from, count, guess, mean, squares);
    mean += guess - first;
  }
}

// The same for a filter of several chunks (Chan et al., "Algorithms for computing the sample variance").
template <class A, class T>
void merged_statistics(const Filters<A>& filters, const T* weight, A first, A& mean, A& squares) {
  double all_mean = 0, all_squares = 0;
  for (int64_t start = 0; start < filters.size; start += filters.chunk) {
    const int64_t count = std::min(filters.chunk, filters.size - start);
    chunk_statistics(filters.vectors(start), weight + start, count, first, mean, squares);
    const double share = static_cast<double>(count) / static_cast<double>(start + count);
    const double step = mean - all_mean;
    all_mean += step * share;
    all_squares += squares + step * step * static_cast<double>(start) * share;
  }
  mean = static_cast<A>(all_mean);
  squares = static_cast<A>(all_squares);
}

template <class A>
A* data_of(const TensorView* view) {
  return view ? static_cast<A*>(view->data) : nullptr;
}

// Whether what a call writes goes past the caches: where what it reads and writes is a good part of the last
// one, and filters are whole lines.
bool streams(const TensorView& out, int64_t moved, int64_t element_bytes) {
  return moved >= last_cache_bytes() / kShareOfCache && out.shape[1] * element_bytes % kCacheLine == 0 &&
         reinterpret_cast<uintptr_t>(out.data) % kCacheLine == 0;
}

template <class A>
struct Forward {
  static constexpr int kInputs = 1;
  Filters<A> filters;
  const A* gain;
  A *mean, *factor;
  bool stream;

  // A group of filters from `o` on, of weight to out.
  template <class T>
  VIOPS_INLINE void run(int64_t o, int64_t group, const T* const (&inputs)[kInputs], T* out) const {
    const int64_t size = filters.size, ahead = filters.template ahead<T>(group);
    A first[kGroup], means[kGroup], squares[kGroup], factors[kGroup];
    if (size == 0) std::fill_n(means, group, A(0)), std::fill_n(squares, group, A(0));
    for (int64_t i = 0; i < group && size > 0; ++i) {
      const T* const weight = inputs[0] + i * size;
      first[i] = static_cast<A>(widen(weight[0]));
      if (size <= filters.chunk) {
        chunk_statistics(filters.of_last_chunk, weight, size, first[i], means[i], squares[i]);
      } else {
        merged_statistics(filters, weight, first[i], means[i], squares[i]);
      }
    }
    const double degrees = filters.degrees(), eps = filters.options.eps;
    const bool eps_inside = filters.options.eps_inside;
    for (int64_t i = 0; i < group; ++i) {
      const double var = static_cast<double>(squares[i]) / degrees;
      factors[i] = static_cast<A>(1 / (eps_inside ? std::sqrt(var + eps) : std::sqrt(var) + eps));
    }
    if (mean) {
      std::copy(means, means + group, mean + o);
      std::copy(factors, factors + group, factor + o);
    }
    for (int64_t i = 0; i < group && size > 0; ++i) {
      const T* const weight = inputs[0] + i * size;
      const A scale = gain ? factors[i] * gain[o + i] : factors[i];
      const Mean<A> centre(first[i], means[i]);
      const A shift = -centre.low * scale;
      write(filters.of_filter, out + i * size, stream, [&](int64_t c) {
        __builtin_prefetch(weight + c + ahead);
        return (load<A>(weight + c) - centre.high) * scale + shift;
      });
    }
  }
};

template <class A>
struct Backward {
  static constexpr int kInputs = 2;
  Filters<A> filters;
  const A *gain, *mean, *factor;
  A* grad_gain;
  bool stream;

  // A group of filters from `o` on, of grad_out and weight to grad_weight.
  template <class T>
  VIOPS_INLINE void run(int64_t o, int64_t group, const T* const (&inputs)[kInputs], T* grad_weight) const {
    const int64_t size = filters.size, ahead = filters.template ahead<T>(group);
    double sums[kGroup], products[kGroup], squares[kGroup];
    for (int64_t i = 0; i < group; ++i) {
      double totals[4] = {};
      const T *const grad_out = inputs[0] + i * size, *const weight = inputs[1] + i * size;
      if (size > 0 && filters.options.eps_inside) {
        add_totals<3>(grad_out, weight, mean[o + i], totals);
      } else if (size > 0) {
        add_totals<4>(grad_out, weight, mean[o + i], totals);
      }
      // relative to what the means of both are: the saved mean is rounded
      const double rest = size > 0 ? totals[1] / static_cast<double>(size) : 0;
      sums[i] = totals[0];
      products[i] = totals[2] - totals[0] * rest;
      squares[i] = std::max(totals[3] - totals[1] * rest, 0.0);
    }
    A scale[kGroup], bend[kGroup], mean_grad[kGroup];
    for (int64_t i = 0; i < group; ++i) {
      const double own_factor = factor[o + i], own_gain = gain ? gain[o + i] : A(1);
      if (grad_gain) grad_gain[o + i] = static_cast<A>(products[i] * own_factor);
      scale[i] = static_cast<A>(own_factor * own_gain);
      bend[i] = static_cast<A>(bend_of(own_factor, squares[i]) * products[i] * own_gain);
      mean_grad[i] = static_cast<A>(sums[i] / static_cast<double>(size));
    }
    for (int64_t i = 0; i < group && size > 0; ++i) {
      const T *const grad_out = inputs[0] + i * size, *const weight = inputs[1] + i * size;
      const Mean<A> grad_centre(static_cast<A>(widen(grad_out[0])), mean_grad[i]);
      const Mean<A> centre(static_cast<A>(widen(weight[0])), mean[o + i]);
      const A own_scale = scale[i], own_bend = bend[i];
      const A shift = centre.low * own_bend - grad_centre.low * own_scale;
      write(filters.of_filter, grad_weight + i * size, stream, [&](int64_t c) {
        __builtin_prefetch(grad_out + c + ahead);
        __builtin_prefetch(weight + c + ahead);
        const Vector<A> distance = load<A>(weight + c) - centre.high;
        return (load<A>(grad_out + c) - grad_centre.high) * own_scale + (shift - distance * own_bend);
      });
    }
  }

 private:
  // Adds the sums over a filter of gradients, relative to the first one, so that of constant ones nothing is
  // left; of distances to the mean; of their products; and, where N is 4, of squared distances.
  template <int N, class T>
  VIOPS_INLINE void add_totals(const T* grad_out, const T* weight, A own_mean, double (&totals)[4]) const {
    const A first_grad = static_cast<A>(widen(grad_out[0]));
    const A centre = Mean<A>(static_cast<A>(widen(weight[0])), own_mean).high;
    for (int64_t start = 0; start < filters.size; start += filters.chunk) {
      const auto terms_at = [&](int64_t c, Vector<A>* terms) {
        terms[0] = load<A>(grad_out + start + c) - first_grad;
        terms[1] = load<A>(weight + start + c) - centre;
        terms[2] = terms[0] * terms[1];
        if (N == 4) terms[N - 1] = terms[1] * terms[1];
      };
      A of_chunk[N] = {};
      add_terms(filters.vectors(start), terms_at, of_chunk);
      for (int n = 0; n < N; ++n) totals[n] += of_chunk[n];
    }
  }

  // Of the derivative of the factor by a weight, what distance to the mean is multiplied with; none where the
  // variance is zero.
  double bend_of(double own_factor, double squares) const {
    const double degrees = filters.degrees();
    if (filters.options.eps_inside) return own_factor * own_factor * own_factor / degrees;
    const double std = std::sqrt(squares / degrees);
    return std > 0 ? own_factor * own_factor / (std * degrees) : 0;
  }
};

// A group of filters shorter than a vector: widened to where a vector may reach beyond its filter.  The next
// filter is written over what the one before it left there.
template <class A, class T, class Op>
void run_short(const Op& op, int64_t o, int64_t group, const T* const (&inputs)[Op::kInputs], T* output) {
  A from[Op::kInputs][(kGroup + 1) * kLanes<A>] = {}, to[(kGroup + 1) * kLanes<A>];
  const A* at[Op::kInputs];
  for (int i = 0; i < Op::kInputs; ++i) {
    widen_row(from[i], inputs[i], group * op.filters.size);
    at[i] = from[i];
  }
  op.run(o, group, at, to);
  narrow_row(output, to, group * op.filters.size);
}

// op.run for all filters of inputs [O, K] to output [O, K], of T.
template <class A, class T, class Op>
void run_filters(const Op& op, const TensorView* const (&inputs)[Op::kInputs], const TensorView& output,
                 int64_t moved) {
  const int64_t size = op.filters.size, most = op.filters.group;
  const bool is_short = size > 0 && size < kLanes<A>;
  const int threads = moved < kSerialBytes ? 1 : max_threads();
  parallel_for(op.filters.count, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o += most) {
      const int64_t group = std::min(most, end - o);
      const T* at[Op::kInputs];
      for (int i = 0; i < Op::kInputs; ++i) at[i] = static_cast<const T*>(inputs[i]->data) + o * size;
      T* const to = static_cast<T*>(output.data) + o * size;
      is_short ? run_short<A>(op, o, group, at, to) : op.run(o, group, at, to);
    }
    if (op.stream) stream_fence();
  });
}

template <class T>
void forward(const TensorView& weight, const TensorView* gain, const Options& options, const TensorView& out,
             const TensorView* mean, const TensorView* factor) {
  using A = decltype(widen(T()));
  constexpr int64_t element = sizeof(T);
  const int64_t moved = 2 * weight.shape[0] * weight.shape[1] * element;
  const Forward<A> op = {{weight, options, kForwardChunk / static_cast<int64_t>(sizeof(A))},
                         data_of<A>(gain),
                         data_of<A>(mean),
                         data_of<A>(factor),
                         streams(out, moved, element)};
  run_filters<A, T>(op, {&weight}, out, moved);
}

template <class T>
void backward(const TensorView& grad_out, const TensorView& weight, const TensorView* gain,
              const TensorView& mean, const TensorView& factor, const Options& options,
              const TensorView& grad_weight, const TensorView* grad_gain) {
  using A = decltype(widen(T()));
  constexpr int64_t element = sizeof(T);
  const int64_t moved = 3 * weight.shape[0] * weight.shape[1] * element;
  const Backward<A> op = {{weight, options, kBackwardChunk / static_cast<int64_t>(sizeof(A))},
                          data_of<A>(gain),
                          data_of<A>(&mean),
                          data_of<A>(&factor),
                          data_of<A>(grad_gain),
                          streams(grad_weight, moved, element)};
  run_filters<A, T>(op, {&grad_out, &weight}, grad_weight, moved);
}

const CpuKernels kernels = {
    [](const TensorView& weight, const TensorView* gain, const Options& options, const TensorView& out,
       const TensorView* mean, const TensorView* factor) {
      VIOPS_FOR_DTYPE(weight, forward, weight, gain, options, out, mean, factor)
    },
    [](const TensorView& grad_out, const TensorView& weight, const TensorView* gain, const TensorView& mean,
       const TensorView& factor, const Options& options, const TensorView& grad_weight,
       const TensorView* grad_gain) {
      VIOPS_FOR_DTYPE(weight, backward, grad_out, weight, gain, mean, factor, options, grad_weight, grad_gain)
    },
};

}  // namespace

extern const CpuKernels VIOPS_LEVEL_NAME(kernels) = kernels;

}  // namespace viops::weight_standardization
