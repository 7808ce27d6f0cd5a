// Token reorganization on the GPU.
//
// Two kernels serve the four functions: `collect` brings many rows to fewer (reorganize_tokens, and the
// backward of restore_tokens), `spread` brings them back (restore_tokens, and the backward of
// reorganize_tokens).
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda.cuh"
#include "token_reorganization/cuda_select.cuh"
#include "token_reorganization/token_reorganization.h"

namespace viops::token_reorganization {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kBlocksAtOnce = 2;      // of a multiprocessor
constexpr int kMaxColumns = 256;      // of a block, so that two rows at least are under way
constexpr int kInFlight = 4;          // loads of a thread before their first use
constexpr int kMaxSpreadRows = 8192;  // of a block: their sources are in shared memory
constexpr int kSpreadRows = kWarps;   // a block takes no fewer rows without need

// --- many rows to fewer: kept rows to their ranks, the weighted sum of the others behind them

template <class T>
struct Collect {
  Rows<const T> x;                      // [B, N, C]
  Rows<T> tokens;                       // [B, M, C]
  Scores scores;                        // [B, P]; without data the weights are one
  Index index;                          // [B, keep], written where the block selects
  int num_rows, num_patches, channels;  // N, P, C
  bool fuse;
  int capacity;  // of the block's Room
  int columns;   // vectors of a row that a block has
  int pieces;    // blocks an image
};

// The part of an image that a thread has: of the rows each `parts`-th, and of those one vector.
template <int V>
struct Share {
  int64_t b;
  int piece, part, parts, column, first_channel, channel;
  bool any;

  __device__ Share(int columns, int pieces, int channels)
      : b(blockIdx.x / pieces),
        piece(static_cast<int>(blockIdx.x) % pieces),
        part(static_cast<int>(threadIdx.x) / columns),
        parts(kThreads / columns),
        column(static_cast<int>(threadIdx.x) % columns) {
    first_channel = piece * columns * V;
    channel = first_channel + column * V;
    any = part < parts && channel < channels;
  }
};

// Output rows [first, last): prefix rows stay where they are, kept row k comes from places[k - first_kept].
template <class T, int V>
__device__ void copy_rows(const Collect<T>& c, const Share<V>& share, int first, int last, const int* places,
                          int first_kept) {
  if (!share.any) return;
  const int num_prefix = c.num_rows - c.num_patches;
  for (int row = first + share.part; row < last; row += kInFlight * share.parts) {
    Vector<T, V> loaded[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int to = row + u * share.parts;
      if (to < last) {
        const int from = to < num_prefix ? to : num_prefix + places[to - num_prefix - first_kept];
        loaded[u] = load<V>(c.x, share.b, from, share.channel);
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int to = row + u * share.parts;
      if (to < last) store(c.tokens, share.b, to, share.channel, loaded[u]);
    }
  }
}

// sum += weights * patches over the thread's share of the places.
template <class T, class A, int V>
__device__ void add_rows(const Collect<T>& c, const Share<V>& share, const int* places, const A* weights,
                         int count, A (&sum)[V]) {
  if (!share.any) return;
  const int num_prefix = c.num_rows - c.num_patches;
  for (int k = share.part; k < count; k += kInFlight * share.parts) {
    Vector<T, V> loaded[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int i = k + u * share.parts;
      if (i < count) loaded[u] = load<V>(c.x, share.b, num_prefix + places[i], share.channel);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int i = k + u * share.parts;
      if (i < count) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += weights[i] * static_cast<A>(widen(loaded[u].get(v)));
      }
    }
  }
}

// The fused row: the parts' sums, added in pairs.
template <class T, class A, int V>
__device__ void write_sum(const Collect<T>& c, const Share<V>& share, const A (&sum)[V], A* partial) {
  A* const own = partial + threadIdx.x;  // [V], kThreads apart; zero where the thread has no share
#pragma unroll
  for (int v = 0; v < V; ++v) own[v * kThreads] = sum[v];
  __syncthreads();
  for (int parts = share.parts; parts > 1;) {
    const int half = (parts + 1) / 2;
    if (share.part < parts - half) {
#pragma unroll
      for (int v = 0; v < V; ++v) own[v * kThreads] += own[v * kThreads + half * c.columns];
    }
    parts = half;
    __syncthreads();
  }
  if (share.part > 0 || !share.any) return;
  Vector<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.set(v, Narrow<T>::of(own[v * kThreads]));
  store(c.tokens, share.b, c.num_rows - c.num_patches + c.index.keep, share.channel, out);
}

// kGiven: the index is read, and checked; else the block selects, and writes it.
template <class T, class A, int V, bool kGiven>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) collect_kernel(Collect<T> c) {
  VIOPS_DYNAMIC_SHARED(memory);
  const Room<A> room(memory, c.capacity);
  const Share<V> share(c.columns, c.pieces, c.channels);
  const int keep = c.index.keep, num_prefix = c.num_rows - c.num_patches;

  // memory works while the block selects; where rows are lost it would bring some in vain
  if (c.fuse) {
    const int count = min(c.columns * V, c.channels - share.first_channel);
    prefetch_rows(c.x, share.b, c.num_rows, share.first_channel, count);
  }
  if (!kGiven) {
    order_places(c.scores, share.b, c.num_patches, room);
    for (int k = threadIdx.x; k < keep && share.piece == 0; k += kThreads) {
      c.index.data[share.b * keep + k] = room.places[k];
    }
  }

  int first = 0;
  do {  // once at least, for the prefix
    const int count = min(keep - first, c.capacity);
    if (kGiven) {
#pragma unroll 1
      for (int k = threadIdx.x; k < count; k += kThreads) {
        room.places[k] = checked_place(c.index, share.b, first + k, c.num_patches);
      }
      __syncthreads();
    }
    copy_rows(c, share, first == 0 ? 0 : num_prefix + first, num_prefix + first + count, room.places, first);
    if (kGiven) __syncthreads();
    first += c.capacity;
  } while (first < keep);

  // one round where the block selected, since the capacity is P then; a given index is checked in any case
  A sum[V] = {};
  bool twice = false;
  for (first = 0; first < c.num_patches && (kGiven || c.fuse); first += c.capacity) {
    const int in_round = min(c.num_patches - first, c.capacity);
    const int count =
        kGiven ? list_dropped(c.index, share.b, first, in_round, room, twice) : c.num_patches - keep;
    const int* places = kGiven ? room.places : room.places + keep;
    if (c.fuse) {
#pragma unroll 1
      for (int k = threadIdx.x; k < count; k += kThreads) {
        room.weights[k] = c.scores.data ? c.scores.template get<A>(share.b, places[k]) : A(1);
      }
      __syncthreads();
      add_rows(c, share, places, room.weights, count, sum);
    }
    __syncthreads();
  }
  if (c.fuse) write_sum(c, share, sum, reinterpret_cast<A*>(memory));
  // last, since a call would put the sums aside; such a row does no harm until then
  VIOPS_DEVICE_ASSERT(!twice, "index: expected each place at most once in a row");
}

// --- few rows to many: kept rows back to their places, the weighted last row at all others

template <class T>
struct Spread {
  Rows<const T> tokens;                             // [B, M, C]
  Rows<const T> x;                                  // [B, N, C], read for grad_scores alone
  Rows<T> to;                                       // [B, N, C], or without data
  Scores scores;                                    // [B, P]; without data the weights are one
  Scores grad_scores;                               // [B, P], or without data
  Index index;                                      // [B, keep]
  int num_tokens, num_rows, num_patches, channels;  // M, N, P, C
  bool fused;
  int rows;    // that a block has
  int pieces;  // blocks an image
};

constexpr int kDropped = -1;

// sources [last - first] = the token that each row [first, last) of x comes from, or kDropped.
template <class T>
__device__ void find_sources(const Spread<T>& s, int64_t b, int first, int last, int* sources) {
  const int num_prefix = s.num_rows - s.num_patches;
  for (int n = first + static_cast<int>(threadIdx.x); n < last; n += kThreads) {
    sources[n - first] = n < num_prefix ? n : kDropped;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < s.index.keep; k += kThreads) {
    const int n = num_prefix + checked_place(s.index, b, k, s.num_patches);
    if (n < first || n >= last) continue;
    const int earlier = atomicExch(&sources[n - first], num_prefix + k);
    VIOPS_DEVICE_ASSERT(earlier == kDropped, "index: expected each place at most once in a row");
  }
  __syncthreads();
}

template <class T, int V>
__device__ void copy_row(const Spread<T>& s, int64_t b, int n, int source) {
  constexpr int kStep = 32 * V;
#pragma unroll 1
  for (int c = lane() * V; c < s.channels; c += kInFlight * kStep) {
    Vector<T, V> loaded[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (c + u * kStep < s.channels) loaded[u] = load<V>(s.tokens, b, source, c + u * kStep);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (c + u * kStep < s.channels) store(s.to, b, n, c + u * kStep, loaded[u]);
    }
  }
}

// Row n of `to` = weight * the fused token; returns the lane's part of <x[n], fused token>.
template <class T, class A, int V>
__device__ A spread_fused(const Spread<T>& s, int64_t b, int n, A weight) {
  constexpr int kStep = 32 * V;
  A dot = 0;
#pragma unroll 1
  for (int c = lane() * V; c < s.channels; c += kInFlight * kStep) {
    Vector<T, V> own[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (s.x.data && c + u * kStep < s.channels) own[u] = load<V>(s.x, b, n, c + u * kStep);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (c + u * kStep >= s.channels) break;
      const Vector<T, V> fused = load<V>(s.tokens, b, s.num_tokens - 1, c + u * kStep);
      Vector<T, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A value = static_cast<A>(widen(fused.get(v)));
        if (s.x.data) dot += static_cast<A>(widen(own[u].get(v))) * value;
        out.set(v, Narrow<T>::of(weight * value));
      }
      if (s.to.data) store(s.to, b, n, c + u * kStep, out);
    }
  }
  return dot;
}

template <class T, int V>
__device__ void clear_row(const Spread<T>& s, int64_t b, int n) {
  Vector<T, V> zero;
#pragma unroll
  for (int v = 0; v < V; ++v) zero.set(v, Narrow<T>::of(0.0f));
#pragma unroll 1
  for (int c = lane() * V; c < s.channels; c += 32 * V) store(s.to, b, n, c, zero);
}

// A warp a row.
template <class T, class A, int V>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) spread_kernel(Spread<T> s) {
  VIOPS_DYNAMIC_SHARED(memory);
  int* const sources = reinterpret_cast<int*>(memory);  // [s.rows]
  const int64_t b = blockIdx.x / s.pieces;
  const int piece = static_cast<int>(blockIdx.x % s.pieces);
  const int first = piece * s.rows, last = min(first + s.rows, s.num_rows);
  const int num_prefix = s.num_rows - s.num_patches;

  // memory works while the block reads the index; where an image has several blocks, none needs all tokens
  if (s.to.data && s.pieces == 1) prefetch_rows(s.tokens, b, s.num_tokens, 0, s.channels);
  find_sources(s, b, first, last, sources);
  for (int n = first + static_cast<int>(threadIdx.x) / 32; n < last; n += kWarps) {
    const int source = sources[n - first];
    A dot = 0;
    if (source != kDropped) {
      if (s.to.data) copy_row<T, V>(s, b, n, source);
    } else if (s.fused) {
      dot =
          spread_fused<T, A, V>(s, b, n, s.scores.data ? s.scores.template get<A>(b, n - num_prefix) : A(1));
    } else if (s.to.data) {
      clear_row<T, V>(s, b, n);
    }
    if (s.grad_scores.data && n >= num_prefix) {
      dot = warp_sum(dot);
      if (lane() == 0) s.grad_scores.set(b, n - num_prefix, dot);
    }
  }
}

// --- on the host

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

dim3 grid_of(int64_t batch, int64_t blocks_an_image) {
  if (blocks_an_image > INT32_MAX / batch) {
    throw std::invalid_argument("x: expected a batch of at most " +
                                std::to_string(INT32_MAX / blocks_an_image) +
                                " for this shape on CUDA, got " + std::to_string(batch));
  }
  return dim3(static_cast<unsigned>(batch * blocks_an_image));
}

// An extent [N or C]; with room to count past it in int.
int extent(const TensorView& view, int axis, const char* what) {
  constexpr int64_t kMost = 1 << 30;
  if (view.shape[axis] > kMost) {
    throw std::invalid_argument(std::string(view.name) + ": expected at most 2^30 " + what +
                                " on CUDA, got " + std::to_string(view.shape[axis]));
  }
  return static_cast<int>(view.shape[axis]);
}

template <class T>
Rows<T> rows_of(const TensorView& view) {
  return {static_cast<T*>(view.data), view.stride[0], view.stride[1], view.stride[2]};
}

Scores scores_of(const TensorView* view) {
  if (!view) return {};
  return {view->data, view->dtype, view->stride[0], view->stride[1]};
}

Index index_of(const TensorView& view) {
  return {static_cast<int64_t*>(view.data), view.stride[0], view.stride[1], static_cast<int>(view.shape[1])};
}

// Whether the rows of `view` [B, N, C] are whole vectors of 16 bytes.
bool has_vectors(const TensorView& view, size_t size) {
  const auto whole = [&](int64_t elements) { return elements * static_cast<int64_t>(size) % 16 == 0; };
  return view.stride[2] == 1 && whole(view.shape[2]) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
         (view.shape[0] == 1 || whole(view.stride[0])) && (view.shape[1] == 1 || whole(view.stride[1]));
}

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T, class A, int V, bool kGiven>
void launch_collect(Collect<T> c, int64_t batch, cudaStream_t stream) {
  // an image is one block's, or its channels are cut in whole lines: in pieces narrow enough, and where
  // images are few in as many as keep the device busy
  const int columns = std::max(c.channels / V, 1), line = kLineBytes / static_cast<int>(V * sizeof(T));
  const int64_t wanted =
      std::max(divide_up(columns, kMaxColumns),
               std::min<int64_t>(kBlocksAtOnce * multiprocessors() / batch, divide_up(columns, line)));
  c.columns = static_cast<int>(wanted > 1 ? round_up(divide_up(columns, wanted), line) : columns);
  c.pieces = static_cast<int>(divide_up(columns, c.columns));
  c.capacity = kGiven ? static_cast<int>(std::clamp<int64_t>(round_up(c.num_patches, 32), 32, kMaxSorted))
                      : capacity_to_order(c.num_patches);
  const int64_t bytes = std::max<int64_t>(Room<A>::bytes(c.capacity), kThreads * V * sizeof(A));
  launch(collect_kernel<T, A, V, kGiven>,
         {grid_of(batch, c.pieces), dim3(kThreads), static_cast<size_t>(bytes), stream}, c);
}

template <class A>
void launch_rank(const TensorView& scores, const TensorView& index, cudaStream_t stream) {
  const int64_t batch = scores.shape[0], num_patches = scores.shape[1];
  launch(rank_kernel<A>, {grid_of(batch, divide_up(num_patches, kRankedInBlock)), dim3(kThreads), 0, stream},
         scores_of(&scores), static_cast<int>(num_patches), static_cast<int>(index.shape[1]),
         static_cast<int64_t*>(index.data));
}

// scores [B, P], or null where the index is given and the weights are one.
template <class T, class A>
void collect(const TensorView& x, const TensorView* scores, int64_t num_patches, const TensorView& tokens,
             const TensorView& index, cudaStream_t stream) {
  const int64_t batch = x.shape[0];
  if (batch == 0) return;
  Collect<T> c = {};
  c.x = rows_of<const T>(x);
  c.tokens = rows_of<T>(tokens);
  c.scores = scores_of(scores);
  c.index = index_of(index);
  c.channels = extent(x, 2, "channels");
  c.num_rows = extent(x, 1, "tokens");
  c.num_patches = static_cast<int>(num_patches);
  c.fuse = tokens.shape[1] > x.shape[1] - num_patches + index.shape[1];
  const bool vectors = has_vectors(x, sizeof(T)) && has_vectors(tokens, sizeof(T));
  if (scores && num_patches <= kMaxSorted) {
    return vectors ? launch_collect<T, A, kVector<T>, false>(c, batch, stream)
                   : launch_collect<T, A, 1, false>(c, batch, stream);
  }
  if (scores && c.index.keep > 0) launch_rank<A>(*scores, index, stream);
  vectors ? launch_collect<T, A, kVector<T>, true>(c, batch, stream)
          : launch_collect<T, A, 1, true>(c, batch, stream);
}

template <class T, class A, int V>
void launch_spread(Spread<T> s, int64_t batch, cudaStream_t stream) {
  const int64_t wanted = std::max(
      divide_up(s.num_rows, kMaxSpreadRows),
      std::min<int64_t>(kBlocksAtOnce * multiprocessors() / batch, divide_up(s.num_rows, kSpreadRows)));
  s.rows = static_cast<int>(divide_up(s.num_rows, wanted));
  s.pieces = static_cast<int>(divide_up(s.num_rows, s.rows));
  launch(spread_kernel<T, A, V>, {grid_of(batch, s.pieces), dim3(kThreads), s.rows * sizeof(int), stream}, s);
}

// x and grad_scores go together; they, scores and `to` may be null.
template <class T, class A>
void spread(const TensorView& tokens, const TensorView* x, const TensorView* scores, const TensorView& index,
            int64_t num_patches, const TensorView* to, const TensorView* grad_scores, cudaStream_t stream) {
  const int64_t batch = tokens.shape[0];
  const TensorView* rows = to ? to : x;
  if (!rows || batch == 0 || rows->shape[1] == 0) return;
  Spread<T> s = {};
  s.tokens = rows_of<const T>(tokens);
  if (x) s.x = rows_of<const T>(*x);
  if (to) s.to = rows_of<T>(*to);
  s.scores = scores_of(scores);
  s.grad_scores = scores_of(grad_scores);
  s.index = index_of(index);
  s.channels = extent(tokens, 2, "channels");
  s.num_tokens = extent(tokens, 1, "tokens");
  s.num_rows = extent(*rows, 1, "tokens");
  s.num_patches = static_cast<int>(num_patches);
  s.fused = s.num_tokens > s.num_rows - s.num_patches + s.index.keep;
  const auto vectors = [](const TensorView* view) { return !view || has_vectors(*view, sizeof(T)); };
  if (vectors(&tokens) && vectors(x) && vectors(to)) {
    launch_spread<T, A, kVector<T>>(s, batch, stream);
  } else {
    launch_spread<T, A, 1>(s, batch, stream);
  }
}

// run(T(), A()): A, what sums are held in, is double where rows or scores are.
template <class Run>
void for_dtypes(DType rows, DType scores, const Run& run) {
  const bool wide = scores == DType::float64;
  switch (rows) {
    case DType::float32: return wide ? run(float(), double()) : run(float(), float());
    case DType::float64: return run(double(), double());
    case DType::bfloat16: return wide ? run(__nv_bfloat16(), double()) : run(__nv_bfloat16(), float());
    default: return wide ? run(__half(), double()) : run(__half(), float());
  }
}

void reorganize_tokens_forward(const TensorView& x, const TensorView& scores, const TensorView& tokens,
                               const TensorView& index, void* stream) {
  for_dtypes(x.dtype, scores.dtype, [&](auto t, auto a) {
    collect<decltype(t), decltype(a)>(x, &scores, scores.shape[1], tokens, index,
                                      static_cast<cudaStream_t>(stream));
  });
}

void reorganize_tokens_backward(const TensorView& grad_tokens, const TensorView* x, const TensorView& scores,
                                const TensorView& index, const TensorView* grad_x,
                                const TensorView* grad_scores, void* stream) {
  for_dtypes(grad_tokens.dtype, scores.dtype, [&](auto t, auto a) {
    spread<decltype(t), decltype(a)>(grad_tokens, x, &scores, index, scores.shape[1], grad_x, grad_scores,
                                     static_cast<cudaStream_t>(stream));
  });
}

void restore_tokens_forward(const TensorView& tokens, const TensorView& index, int64_t num_patches,
                            const TensorView& x, void* stream) {
  for_dtypes(tokens.dtype, tokens.dtype, [&](auto t, auto a) {
    spread<decltype(t), decltype(a)>(tokens, nullptr, nullptr, index, num_patches, &x, nullptr,
                                     static_cast<cudaStream_t>(stream));
  });
}

void restore_tokens_backward(const TensorView& grad_x, const TensorView& index, int64_t num_patches,
                             const TensorView& grad_tokens, void* stream) {
  for_dtypes(grad_x.dtype, grad_x.dtype, [&](auto t, auto a) {
    collect<decltype(t), decltype(a)>(grad_x, nullptr, num_patches, grad_tokens, index,
                                      static_cast<cudaStream_t>(stream));
  });
}

}  // namespace

extern const CudaKernels cuda_kernels = {reorganize_tokens_forward, reorganize_tokens_backward,
                                         restore_tokens_forward, restore_tokens_backward};

}  // namespace viops::token_reorganization
