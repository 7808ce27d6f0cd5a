// Reversible columns on the CPU; built once a CPU level.
//
// T is the dtype of all features but f, F that of f, A the type that sums are held in.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/rows.h"
#include "reversible_columns/reversible_columns.h"

namespace viops::reversible_columns {
namespace {

// A plane is cut into pieces of so many places, and rows of channels into blocks of so many: their sums are
// short, which keeps their rounding small, and always the same, whoever adds them.
constexpr int64_t kPiece = 8192;
constexpr int64_t kBlock = 32;
// Blocks are taken so many pieces of work at most: enough for threads to share evenly.
constexpr int64_t kMostChunks = 128;
// Rows whose sums are added at once.
constexpr int kRowsAtOnce = 4;
// The part of the last cache from which on what a call writes goes past it.
constexpr int64_t kShareOfCache = 4;

// a, of the alphas, or of none
template <class A, class T>
VIOPS_INLINE A factor_of(const T* alphas, int64_t channel) {
  if (!alphas) return 1;
  constexpr A least = static_cast<A>(kMinAlpha);
  const A alpha = static_cast<A>(widen(alphas[channel]));
  if (alpha < least && alpha > -least) return alpha < 0 ? -least : least;
  return alpha;
}

template <class A, class T>
VIOPS_INLINE Vector<A> load_lanes(const T* from, int64_t count) {
  return count == kLanes<A> ? load<A>(from) : load_part<A>(from, count);
}

// Past the caches where kStream, and then whole vectors at places aligned to them.
template <bool kStream, class A, class T>
VIOPS_INLINE void store_lanes(T* to, Vector<A> lanes, int64_t count) {
  if (kStream) return stream<A>(to, lanes);
  count == kLanes<A> ? store<A>(to, lanes) : store_part<A>(to, lanes, count);
}

// The values that a T has room for.
template <class T, class A>
VIOPS_INLINE Vector<A> round_to(Vector<A> values) {
  T lanes[kLanes<A>];
  store<A>(lanes, values);
  return load<A>(lanes);
}

// What values with rests are multiplied by before they are rounded.  Values of few bits, such as sums of half
// types, are often halfway between two of T; so is nothing that has few bits then, and the value that is
// rebuilt, which differs in its last bits, rounds to the same side.
template <class T>
constexpr double kTilt = 1 + (sizeof(T) == 4 ? 0x1p-29 : 0x1p-18);

// What rounding took away; no rest makes an infinity finite again.
template <class A>
VIOPS_INLINE Vector<A> rest_of(Vector<A> values, Vector<A> rounded) {
  const MaskVector<A> is_finite = rounded - rounded == Vector<A>{};
  return is_finite ? values - rounded : Vector<A>{};
}

// --- what is done with a vector of features: `run` gives what is added to grad_alpha

// A of an op over features of T, with rests or without
template <class T, bool kRests>
using Wide = std::conditional_t<kRests, double, decltype(widen(T()))>;

template <class T_, class F, bool kRests = false>
struct Forward {
  using T = T_;
  using A = Wide<T, kRests>;
  static constexpr bool kSums = false;
  const F* f;
  const T* x;
  T* out;
  const float* x_rest;  // may be null
  float* out_rest;

  template <bool kStream>
  VIOPS_INLINE Vector<A> run(int64_t at, int64_t count, Vector<A> a) const {
    Vector<A> x_values = load_lanes<A>(x + at, count);
    if (kRests && x_rest) x_values += load_lanes<A>(x_rest + at, count);
    const Vector<A> values = load_lanes<A>(f + at, count) + a * x_values;
    if (kRests) {
      const Vector<A> rounded = round_to<T, A>(values * static_cast<A>(kTilt<T>));
      store_lanes<kStream, A>(out + at, rounded, count);
      store_lanes<kStream, A>(out_rest + at, rest_of<A>(values, rounded), count);
    } else {
      store_lanes<kStream, A>(out + at, values, count);
    }
    return Vector<A>{};
  }
};

template <class T_, class F, bool kRests = false, bool kGrads = true>
struct Rebuild {
  using T = T_;
  using A = Wide<T, kRests>;
  static constexpr bool kSums = kGrads;
  const T *grad_out, *out;
  const F* f;
  T *x, *grad_x;
  const float* out_rest;
  float* x_rest;  // may be null

  template <bool kStream>
  VIOPS_INLINE Vector<A> run(int64_t at, int64_t count, Vector<A> a) const {
    Vector<A> values = load_lanes<A>(out + at, count);
    if (kRests) values += load_lanes<A>(out_rest + at, count);
    values = (values - load_lanes<A>(f + at, count)) / a;
    if (kRests) {
      const Vector<A> rounded = round_to<T, A>(values * static_cast<A>(kTilt<T>));
      if (x_rest) store_lanes<kStream, A>(x_rest + at, rest_of<A>(values, rounded), count);
      values = rounded;
    }
    store_lanes<kStream, A>(x + at, values, count);
    if (!kGrads) return Vector<A>{};
    const Vector<A> grad = load_lanes<A>(grad_out + at, count);
    store_lanes<kStream, A>(grad_x + at, a * grad, count);
    return grad * values;
  }
};

template <class T_, bool kGradX, bool kGradAlpha>
struct Backward {
  using T = T_;
  using A = decltype(widen(T()));
  static constexpr bool kSums = kGradAlpha;
  const T *grad_out, *x;
  T* grad_x;

  template <bool kStream>
  VIOPS_INLINE Vector<A> run(int64_t at, int64_t count, Vector<A> a) const {
    const Vector<A> grad = load_lanes<A>(grad_out + at, count);
    if (kGradX) store_lanes<kStream, A>(grad_x + at, a * grad, count);
    return kGradAlpha ? grad * load_lanes<A>(x + at, count) : Vector<A>{};
  }
};

// --- planes: [B, C, S]

// `count` places of one plane from `at` on; their sum.
template <bool kStream, class Op, class A = typename Op::A>
VIOPS_INLINE A run_places(const Op& op, int64_t at, int64_t count, A factor) {
  constexpr int kWays = 4;  // sums side by side: an addition waits for the one before it
  constexpr int64_t kStep = kLanes<A>;
  const Vector<A> a = factor + Vector<A>{};
  Vector<A> sums[kWays] = {};
  int64_t i = 0;
  for (; i + kWays * kStep <= count; i += kWays * kStep) {
    for (int way = 0; way < kWays; ++way) {
      sums[way] += op.template run<kStream>(at + i + way * kStep, kStep, a);
    }
  }
  for (; i + kStep <= count; i += kStep) sums[0] += op.template run<kStream>(at + i, kStep, a);
  if (i < count) sums[0] += op.template run<false>(at + i, count - i, a);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <bool kStream, class Op, class A = typename Op::A, class T = typename Op::T>
void run_planes(const Op& op, const Sizes& sizes, const T* alpha, T* grad_alpha, int threads) {
  const int64_t channels = sizes.channels, places = sizes.places, planes = sizes.batch * channels;
  const int64_t pieces = (places + kPiece - 1) / kPiece;
  const Scratch memory(Op::kSums ? planes * pieces * static_cast<int64_t>(sizeof(A)) : 0);
  A* const sums = reinterpret_cast<A*>(memory.data());  // [B, C, pieces]
  parallel_for(planes * pieces, threads, [&](int, int64_t begin, int64_t end) {
    const Op own = op;  // of which no store can change a pointer
    for (int64_t item = begin; item < end; ++item) {
      const int64_t plane = item / pieces, from = item % pieces * kPiece;
      const A a = factor_of<A>(alpha, plane % channels);
      const A sum = run_places<kStream>(own, plane * places + from, std::min(kPiece, places - from), a);
      if (Op::kSums) sums[item] = sum;
    }
    if (kStream) stream_fence();
  });
  if (!Op::kSums) return;
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t b = 0; b < sizes.batch; ++b) {
      for (int64_t piece = 0; piece < pieces; ++piece) total += sums[(b * channels + c) * pieces + piece];
    }
    grad_alpha[c] = Narrow<T, double>::of(total);
  }
}

// --- rows of channels: [B, S, C]

// kRows rows of channels from `at` on; their sums are added to, or, where fresh, written to `sums`.
template <bool kStream, int kRows, class Op, class A = typename Op::A>
VIOPS_INLINE void run_rows(const Op& op, int64_t at, int64_t channels, const A* factors, A* sums,
                           bool fresh) {
  const auto run = [&](auto streams, int64_t c, int64_t count) {
    const Vector<A> a = load<A>(factors + c);
    Vector<A> sum = Op::kSums && !fresh ? load<A>(sums + c) : Vector<A>{};
    for (int row = 0; row < kRows; ++row) {
      sum += op.template run<decltype(streams)::value>(at + row * channels + c, count, a);
    }
    if (Op::kSums) store<A>(sums + c, sum);
  };
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) run(std::bool_constant<kStream>(), c, kLanes<A>);
  if (c < channels) run(std::false_type(), c, channels - c);
}

template <bool kStream, class Op, class A = typename Op::A, class T = typename Op::T>
void run_channels_last(const Op& op, const Sizes& sizes, const T* alpha, T* grad_alpha, int threads) {
  const int64_t channels = sizes.channels, rows = sizes.batch * sizes.places;
  const int64_t width = padded(channels * static_cast<int64_t>(sizeof(A))) / static_cast<int64_t>(sizeof(A));
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  const int64_t chunk = (blocks + kMostChunks - 1) / kMostChunks * kBlock;  // rows of a piece of work
  const int64_t chunks = rows > 0 ? (rows + chunk - 1) / chunk : 0;
  const Scratch memory((1 + (Op::kSums ? chunks + threads : 0)) * width * static_cast<int64_t>(sizeof(A)));
  A* const factors = reinterpret_cast<A*>(memory.data());  // [width], and of one beyond the channels
  A* const totals = factors + width;                       // [chunks, width]
  A* const of_blocks = totals + chunks * width;            // [threads, width]
  for (int64_t c = 0; c < width; ++c) {
    factors[c] = c < channels ? factor_of<A>(alpha, c) : A(1);
  }
  parallel_for(chunks, threads, [&](int part, int64_t begin, int64_t end) {
    const Op own = op;  // of which no store can change a pointer
    A* const sums = of_blocks + part * width;
    for (int64_t row = begin * chunk; row < std::min(end * chunk, rows); row += kBlock) {
      const int64_t count = std::min(kBlock, rows - row), whole = count - count % kRowsAtOnce;
      for (int64_t r = 0; r < whole; r += kRowsAtOnce) {
        run_rows<kStream, kRowsAtOnce>(own, (row + r) * channels, channels, factors, sums, r == 0);
      }
      for (int64_t r = whole; r < count; ++r) {
        run_rows<kStream, 1>(own, (row + r) * channels, channels, factors, sums, r == 0);
      }
      if (!Op::kSums) continue;
      A* const total = totals + row / chunk * width;
      const bool fresh = row % chunk == 0;
      for (int64_t c = 0; c < channels; c += kLanes<A>) {
        store<A>(total + c, fresh ? load<A>(sums + c) : load<A>(total + c) + load<A>(sums + c));
      }
    }
    if (kStream) stream_fence();
  });
  if (!Op::kSums) return;
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t i = 0; i < chunks; ++i) total += totals[i * width + c];
    grad_alpha[c] = Narrow<T, double>::of(total);
  }
}

// --- calls

template <class T>
T* data_of(const TensorView* view) {
  return view ? static_cast<T*>(view->data) : nullptr;
}

// Whether what a call writes goes past the caches: where what it moves is a good part of the last one, and
// rows are whole lines.
template <class T>
bool streams(const Sizes& sizes, int64_t moved, std::initializer_list<const void*> outputs) {
  const int64_t row = sizes.channels_last ? sizes.channels : sizes.places;
  if (moved < last_cache_bytes() / kShareOfCache) return false;
  if (row * static_cast<int64_t>(sizeof(T)) % kCacheLine) return false;
  for (const void* output : outputs) {
    if (reinterpret_cast<uintptr_t>(output) % kCacheLine) return false;
  }
  return true;
}

template <class Op, class T = typename Op::T>
void run(const Op& op, const Sizes& sizes, int64_t moved, const TensorView* alpha,
         const TensorView* grad_alpha, std::initializer_list<const void*> outputs) {
  const int threads = moved < kSerialBytes ? 1 : max_threads();
  const T* const factors = data_of<T>(alpha);
  T* const sums = data_of<T>(grad_alpha);
  if (streams<T>(sizes, moved, outputs)) {
    sizes.channels_last ? run_channels_last<true>(op, sizes, factors, sums, threads)
                        : run_planes<true>(op, sizes, factors, sums, threads);
  } else {
    sizes.channels_last ? run_channels_last<false>(op, sizes, factors, sums, threads)
                        : run_planes<false>(op, sizes, factors, sums, threads);
  }
}

template <class T>
int64_t bytes_of(const Sizes& sizes) {
  return sizes.batch * sizes.channels * sizes.places * static_cast<int64_t>(sizeof(T));
}

template <class T, class F>
void forward(const Sizes& sizes, const TensorView& f, const TensorView& x, const TensorView& alpha,
             const TensorView& out) {
  const Forward<T, F> op = {data_of<F>(&f), data_of<T>(&x), data_of<T>(&out), nullptr, nullptr};
  run(op, sizes, 2 * bytes_of<T>(sizes) + bytes_of<F>(sizes), &alpha, nullptr, {out.data});
}

template <class T, class F>
void forward_with_rest(const Sizes& sizes, const TensorView& f, const TensorView& x, const TensorView* x_rest,
                       const TensorView* alpha, const TensorView& out, const TensorView& out_rest) {
  const Forward<T, F, true> op = {data_of<F>(&f), data_of<T>(&x), data_of<T>(&out), data_of<float>(x_rest),
                                  data_of<float>(&out_rest)};
  const int64_t moved =
      2 * bytes_of<T>(sizes) + bytes_of<F>(sizes) + (x_rest ? 2 : 1) * bytes_of<float>(sizes);
  run(op, sizes, moved, alpha, nullptr, {out.data, out_rest.data});
}

template <class T, class F>
void rebuild(const Sizes& sizes, const TensorView& grad_out, const TensorView& out, const TensorView& f,
             const TensorView& alpha, const TensorView& x, const TensorView& grad_x,
             const TensorView& grad_alpha) {
  const Rebuild<T, F> op = {data_of<T>(&grad_out), data_of<T>(&out), data_of<F>(&f), data_of<T>(&x),
                            data_of<T>(&grad_x),   nullptr,          nullptr};
  run(op, sizes, 4 * bytes_of<T>(sizes) + bytes_of<F>(sizes), &alpha, &grad_alpha, {x.data, grad_x.data});
}

template <class T, class F>
void rebuild_with_rest(const Sizes& sizes, const TensorView* grad_out, const TensorView& out,
                       const TensorView& out_rest, const TensorView& f, const TensorView* alpha,
                       const TensorView& x, const TensorView* x_rest, const TensorView* grad_x,
                       const TensorView* grad_alpha) {
  const auto run_op = [&](auto op, int64_t tensors) {
    op = {data_of<T>(grad_out), data_of<T>(&out),          data_of<F>(&f),        data_of<T>(&x),
          data_of<T>(grad_x),   data_of<float>(&out_rest), data_of<float>(x_rest)};
    const int64_t rests = (x_rest ? 2 : 1) * bytes_of<float>(sizes);
    run(op, sizes, tensors * bytes_of<T>(sizes) + bytes_of<F>(sizes) + rests, alpha, grad_alpha,
        {op.x, op.x_rest, op.grad_x});
  };
  grad_out ? run_op(Rebuild<T, F, true, true>(), 4) : run_op(Rebuild<T, F, true, false>(), 2);
}

template <class T>
void backward(const Sizes& sizes, const TensorView& grad_out, const TensorView* x, const TensorView& alpha,
              const TensorView* grad_x, const TensorView* grad_alpha) {
  const auto run_op = [&](auto op, int64_t tensors) {
    op = {data_of<T>(&grad_out), data_of<T>(x), data_of<T>(grad_x)};
    run(op, sizes, tensors * bytes_of<T>(sizes), &alpha, grad_alpha, {op.grad_x});
  };
  if (grad_x && grad_alpha) return run_op(Backward<T, true, true>(), 3);
  if (grad_x) return run_op(Backward<T, true, false>(), 2);
  if (grad_alpha) return run_op(Backward<T, false, true>(), 2);
}

// Calls Function<T, F> for the dtypes of checked features, none of them float64.
#define VIOPS_FOR_NARROW_DTYPES(values, f, Function, ...)                   \
  if ((values).dtype == DType::float32 && (f).dtype == DType::bfloat16) {   \
    return Function<float, bfloat16>(__VA_ARGS__);                          \
  }                                                                         \
  if ((values).dtype == DType::float32 && (f).dtype == DType::float16) {    \
    return Function<float, float16>(__VA_ARGS__);                           \
  }                                                                         \
  switch ((values).dtype) {                                                 \
    case DType::float32: return Function<float, float>(__VA_ARGS__);        \
    case DType::bfloat16: return Function<bfloat16, bfloat16>(__VA_ARGS__); \
    default: return Function<float16, float16>(__VA_ARGS__);                \
  }

// The same, float64 among them.
#define VIOPS_FOR_DTYPES(values, f, Function, ...)                                    \
  if ((values).dtype == DType::float64) return Function<double, double>(__VA_ARGS__); \
  VIOPS_FOR_NARROW_DTYPES(values, f, Function, __VA_ARGS__)

const CpuKernels kernels = {
    [](const Sizes& sizes, const TensorView& f, const TensorView& x, const TensorView& alpha,
       const TensorView& out) { VIOPS_FOR_DTYPES(x, f, forward, sizes, f, x, alpha, out) },
    [](const Sizes& sizes, const TensorView& grad_out, const TensorView& out, const TensorView& f,
       const TensorView& alpha, const TensorView& x, const TensorView& grad_x, const TensorView& grad_alpha) {
      VIOPS_FOR_DTYPES(out, f, rebuild, sizes, grad_out, out, f, alpha, x, grad_x, grad_alpha)
    },
    [](const Sizes& sizes, const TensorView& grad_out, const TensorView* x, const TensorView& alpha,
       const TensorView* grad_x, const TensorView* grad_alpha) {
      VIOPS_FOR_DTYPE(grad_out, backward, sizes, grad_out, x, alpha, grad_x, grad_alpha)
    },
    [](const Sizes& sizes, const TensorView& f, const TensorView& x, const TensorView* x_rest,
       const TensorView* alpha, const TensorView& out, const TensorView& out_rest) {
      VIOPS_FOR_NARROW_DTYPES(x, f, forward_with_rest, sizes, f, x, x_rest, alpha, out, out_rest)
    },
    [](const Sizes& sizes, const TensorView* grad_out, const TensorView& out, const TensorView& out_rest,
       const TensorView& f, const TensorView* alpha, const TensorView& x, const TensorView* x_rest,
       const TensorView* grad_x, const TensorView* grad_alpha) {
      VIOPS_FOR_NARROW_DTYPES(out, f, rebuild_with_rest, sizes, grad_out, out, out_rest, f, alpha, x, x_rest,
                              grad_x, grad_alpha)
    },
};

}  // namespace

extern const CpuKernels VIOPS_LEVEL_NAME(kernels) = kernels;

}  // namespace viops::reversible_columns
