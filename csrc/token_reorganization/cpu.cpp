// Token reorganization on the CPU; built once a CPU level.
#include <algorithm>

#include "common/rows.h"
#include "token_reorganization/cpu_scores.h"
#include "token_reorganization/token_reorganization.h"

namespace viops::token_reorganization {
namespace {

// How many rows ahead of their use loads start: rows are read in an order that no hardware guesses.
constexpr int64_t kPrefetchRows = 2;
// Up to this many patches, comparing each with each beats sorting.
constexpr int64_t kRankByCounting = 640;

// The rows [B, N][C] of a tensor, handed out contiguous: in place where the channels are, else copied.
template <class T>
struct Rows {
  const T* data;
  int64_t stride_b, stride_n, stride_c, channels;

  explicit Rows(const TensorView& view)
      : data(static_cast<const T*>(view.data)),
        stride_b(view.stride[0]),
        stride_n(view.stride[1]),
        stride_c(view.shape[2] > 1 ? view.stride[2] : 1),
        channels(view.shape[2]) {}

  // Starts loading a row that is read soon.
  VIOPS_INLINE void prefetch(int64_t b, int64_t n, int64_t first, int64_t count) const {
    if (stride_c != 1) return;
    const char* row = reinterpret_cast<const char*>(data + b * stride_b + n * stride_n + first);
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += kCacheLine)
      __builtin_prefetch(row + i);
  }

  VIOPS_INLINE const T* get(int64_t b, int64_t n, int64_t first, int64_t count, T* buffer) const {
    const T* row = data + b * stride_b + n * stride_n + first * stride_c;
    if (stride_c == 1) return row;
    for (int64_t c = 0; c < count; ++c) buffer[c] = row[c * stride_c];
    return buffer;
  }
};

// Writes rows that are contiguous; past the caches where `stream` is set.
template <class T>
struct RowWriter {
  T* data;
  bool stream;

  // `moved` is how many bytes the call reads and writes: where they overflow the last cache, what is
  // written goes past it, so that it drives out nothing that is still to be read.
  RowWriter(const TensorView& view, int64_t row_bytes, int64_t moved)
      : data(static_cast<T*>(view.data)),
        stream(moved > last_cache_bytes() / 2 && row_bytes % kCacheLine == 0 &&
               reinterpret_cast<uintptr_t>(view.data) % kCacheLine == 0) {}

  // Starts taking over the cache lines of a row that is written soon.
  VIOPS_INLINE void prefetch(const T* row, int64_t count) const {
    const char* bytes = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += kCacheLine) __builtin_prefetch(bytes + i, 1);
  }

  VIOPS_INLINE void copy(T* to, const T* from, int64_t count) const {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (stream) {
      stream_copy(to, from, bytes);
    } else {
      std::memcpy(to, from, static_cast<size_t>(bytes));
    }
  }
};

// --- ranking

// Integers in the order of the scores: NaN highest, -0 equal to 0.
VIOPS_INLINE int32_t sort_key(float score) {
  const int32_t bits = bit_cast<int32_t>(score + 0.0f);
  return score != score ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}
VIOPS_INLINE int64_t sort_key(double score) {
  const int64_t bits = bit_cast<int64_t>(score + 0.0);
  return score != score ? INT64_MAX : bits ^ ((bits >> 63) & INT64_MAX);
}

template <class A>
using SortKey = decltype(sort_key(A()));

template <class Key>
struct Entry {
  Key key;
  int32_t place;
};

// Patches that are ranked at once; keys are padded to a multiple of it.
constexpr int kRankGroup = 32;

// ranks[i] = how many patches come before patch i: those of a higher key, and the earlier ones of an equal
// key.
template <class A>
void rank_by_counting(const SortKey<A>* keys, int64_t num_patches, int32_t* ranks) {
  using Keys = MaskVector<A>;
  constexpr int kVectors = kRankGroup / kLanes<A>;
  Keys lane[kVectors];
  for (int i = 0; i < kRankGroup; ++i) lane[i / kLanes<A>][i % kLanes<A>] = i;

  for (int64_t first = 0; first < num_patches; first += kRankGroup) {
    const int64_t next = std::min<int64_t>(first + kRankGroup, num_patches);
    Keys own[kVectors], before[kVectors] = {};
    std::memcpy(own, keys + first, sizeof(own));
    // a patch of an earlier group comes before one of equal key: compare with one less, which no key
    // underflows
    for (int64_t j = 0; j < first; ++j) {
      for (int v = 0; v < kVectors; ++v) before[v] -= keys[j] > own[v] - 1;
    }
    for (int64_t j = first; j < next; ++j) {
      for (int v = 0; v < kVectors; ++v)
        before[v] -= keys[j] > own[v] + (lane[v] > static_cast<SortKey<A>>(j - first));
    }
    for (int64_t j = next; j < num_patches; ++j) {
      for (int v = 0; v < kVectors; ++v) before[v] -= keys[j] > own[v];
    }
    for (int64_t i = first; i < next; ++i) {
      ranks[i] = static_cast<int32_t>(before[(i - first) / kLanes<A>][(i - first) % kLanes<A>]);
    }
  }
}

// ranks[i] = how many patches come before patch i, for the first `keep`; `keep` for all others.
template <class Key>
void rank_by_sorting(const Key* keys, int64_t num_patches, int64_t keep, Entry<Key>* entries,
                     int32_t* ranks) {
  for (int64_t i = 0; i < num_patches; ++i) entries[i] = {keys[i], static_cast<int32_t>(i)};
  const auto before = [](const Entry<Key>& a, const Entry<Key>& b) {
    return a.key > b.key || (a.key == b.key && a.place < b.place);
  };
  if (keep < num_patches) std::nth_element(entries, entries + keep, entries + num_patches, before);
  std::sort(entries, entries + keep, before);
  for (int64_t i = 0; i < num_patches; ++i) ranks[i] = static_cast<int32_t>(keep);
  for (int64_t j = 0; j < keep; ++j) ranks[entries[j].place] = static_cast<int32_t>(j);
}

template <class A, class S>
void widen_scores(const S* from, int64_t stride, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(widen(from[i * stride]));
}

// Row b of scores [B, P] as A, whatever its dtype.
template <class A>
void read_scores(const TensorView& scores, int64_t b, A* to) {
  const int64_t count = scores.shape[1], stride = scores.stride[1], start = b * scores.stride[0];
  switch (scores.dtype) {
    case DType::float32:
      return widen_scores(static_cast<const float*>(scores.data) + start, stride, count, to);
    case DType::float64:
      return widen_scores(static_cast<const double*>(scores.data) + start, stride, count, to);
    case DType::bfloat16:
      return widen_scores(static_cast<const bfloat16*>(scores.data) + start, stride, count, to);
    default: return widen_scores(static_cast<const float16*>(scores.data) + start, stride, count, to);
  }
}

// --- many rows to fewer: kept rows to their ranks, the weighted sum of the others behind them

constexpr int kRowsAtOnce = 4;

template <class T, class A>
struct Collect {
  Rows<T> from;          // [B, N, C]
  RowWriter<T> to;       // [B, M, C]
  const int32_t* ranks;  // [B, P]; outside 0..keep-1 where a patch is dropped
  const A* weights;      // [B, P], or null: all one
  int64_t num_tokens, num_prefix, num_patches, keep;
  bool fuse;
  char* scratch;  // [B][scratch_bytes]

  static int64_t scratch_bytes(int64_t channels) {
    return padded(channels * sizeof(A)) + kRowsAtOnce * padded(channels * sizeof(T));
  }

  // Channels [first, first + count) of image b.
  void run(int64_t b, int64_t first, int64_t count) const {
    const int64_t channels = from.channels;
    char* memory = scratch + b * scratch_bytes(channels);
    A* sum = reinterpret_cast<A*>(memory) + first;
    memory += padded(channels * sizeof(A));
    T* buffers[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) {
      buffers[r] = reinterpret_cast<T*>(memory + r * padded(channels * sizeof(T))) + first;
    }
    T* out = to.data + b * num_tokens * channels + first;
    for (int64_t n = 0; n < num_prefix; ++n) {
      to.copy(out + n * channels, from.get(b, n, first, count, buffers[0]), count);
    }
    const T* waiting[kRowsAtOnce];
    A weight[kRowsAtOnce];
    int num_waiting = 0;
    bool fresh = true;
    for (int64_t i = 0; i < num_patches; ++i) {
      const int64_t rank = ranks[b * num_patches + i];
      const bool kept = rank >= 0 && rank < keep;
      if (!kept && !fuse) continue;
      if (i + kPrefetchRows < num_patches) from.prefetch(b, num_prefix + i + kPrefetchRows, first, count);
      const T* row = from.get(b, num_prefix + i, first, count, buffers[num_waiting]);
      if (i + kPrefetchRows < num_patches && !to.stream) {
        const int64_t next = ranks[b * num_patches + i + kPrefetchRows];
        if (next >= 0 && next < keep) to.prefetch(out + (num_prefix + next) * channels, count);
      }
      if (kept) {
        to.copy(out + (num_prefix + rank) * channels, row, count);
        continue;
      }
      waiting[num_waiting] = row;
      weight[num_waiting] = weights ? weights[b * num_patches + i] : A(1);
      if (++num_waiting == kRowsAtOnce) {
        add_rows(sum, fresh, waiting, weight, kRowsAtOnce, count);
        num_waiting = 0;
        fresh = false;
      }
    }
    if (fuse) {
      if (num_waiting || fresh) add_rows(sum, fresh, waiting, weight, num_waiting, count);
      narrow_row(out + (num_prefix + keep) * channels, sum, count);
    }
    if (to.stream) stream_fence();
  }
};

// Runs prepare(b) and then work(b, first, count) over all channels of each image, on as many threads as
// there are: over images, or over channels too where images are few.
template <class Prepare, class Work>
void for_each_image(int64_t batch, int64_t channels, int64_t bytes, Prepare prepare, Work work) {
  const int threads = threads_for(bytes);
  if (batch >= threads) {
    parallel_for(batch, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        prepare(b);
        work(b, 0, channels);
      }
    });
    return;
  }
  parallel_for(batch, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) prepare(b);
  });
  const int64_t blocks = (channels + kCacheLine - 1) / kCacheLine;  // whole cache lines for any dtype
  const int64_t pieces = std::min<int64_t>(blocks, (threads + batch - 1) / std::max<int64_t>(batch, 1));
  parallel_for(batch * pieces, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / pieces, piece = item % pieces;
      const int64_t first = std::min(channels, blocks * piece / pieces * kCacheLine);
      const int64_t last = std::min(channels, blocks * (piece + 1) / pieces * kCacheLine);
      work(b, first, last - first);
    }
  });
}

template <class T, class A>
void reorganize_forward(const TensorView& x, const TensorView& scores, const TensorView& tokens,
                        const TensorView& index) {
  using Key = SortKey<A>;
  const int64_t batch = x.shape[0], channels = x.shape[2], num_patches = scores.shape[1];
  const int64_t num_prefix = x.shape[1] - num_patches, keep = index.shape[1], num_tokens = tokens.shape[1];
  const int64_t row_bytes = channels * static_cast<int64_t>(sizeof(T));
  const int64_t bytes = batch * (x.shape[1] + num_tokens) * row_bytes;
  const bool counting = num_patches <= kRankByCounting;

  const int64_t padded_patches = (num_patches + kRankGroup - 1) / kRankGroup * kRankGroup;
  const int64_t keys_bytes = padded(padded_patches * sizeof(Key));
  const int64_t entries_bytes = counting ? 0 : padded(num_patches * sizeof(Entry<Key>));
  const Scratch weights_memory(batch * num_patches * sizeof(A));      // [B, P]
  const Scratch ranks_memory(batch * num_patches * sizeof(int32_t));  // [B, P]
  const Scratch keys_memory(batch * (keys_bytes + entries_bytes));
  const Scratch rows_memory(batch * Collect<T, A>::scratch_bytes(channels));
  A* weights = reinterpret_cast<A*>(weights_memory.data());
  int32_t* ranks = reinterpret_cast<int32_t*>(ranks_memory.data());

  const Collect<T, A> collect{Rows<T>(x),
                              RowWriter<T>(tokens, row_bytes, bytes),
                              ranks,
                              weights,
                              num_tokens,
                              num_prefix,
                              num_patches,
                              keep,
                              num_tokens > num_prefix + keep,
                              rows_memory.data()};
  const auto rank_image = [&](int64_t b) {
    A* score = weights + b * num_patches;
    int32_t* rank = ranks + b * num_patches;
    char* memory = keys_memory.data() + b * (keys_bytes + entries_bytes);
    Key* keys = reinterpret_cast<Key*>(memory);
    read_scores(scores, b, score);
    for (int64_t i = 0; i < num_patches; ++i) keys[i] = sort_key(score[i]);
    std::fill(keys + num_patches, keys + padded_patches, Key(0));
    if (counting) {
      rank_by_counting<A>(keys, num_patches, rank);
    } else {
      rank_by_sorting(keys, num_patches, keep, reinterpret_cast<Entry<Key>*>(memory + keys_bytes), rank);
    }
    int64_t* out = static_cast<int64_t*>(index.data) + b * keep;
    for (int64_t i = 0; i < num_patches; ++i) {
      if (rank[i] < keep) out[rank[i]] = i;
    }
  };
  for_each_image(batch, channels, bytes, rank_image,
                 [&](int64_t b, int64_t first, int64_t count) { collect.run(b, first, count); });
}

template <class T>
void restore_backward(const TensorView& grad_x, const int32_t* ranks, int64_t keep, int64_t num_patches,
                      const TensorView& grad_tokens) {
  using A = decltype(widen(T()));
  const int64_t batch = grad_x.shape[0], channels = grad_x.shape[2], num_tokens = grad_tokens.shape[1];
  const int64_t num_prefix = grad_x.shape[1] - num_patches;
  const int64_t row_bytes = channels * static_cast<int64_t>(sizeof(T));
  const int64_t bytes = batch * (grad_x.shape[1] + num_tokens) * row_bytes;
  const Scratch rows_memory(batch * Collect<T, A>::scratch_bytes(channels));
  const Collect<T, A> collect{Rows<T>(grad_x),
                              RowWriter<T>(grad_tokens, row_bytes, bytes),
                              ranks,
                              nullptr,
                              num_tokens,
                              num_prefix,
                              num_patches,
                              keep,
                              num_tokens > num_prefix + keep,
                              rows_memory.data()};
  for_each_image(
      batch, channels, bytes, [](int64_t) {},
      [&](int64_t b, int64_t first, int64_t count) { collect.run(b, first, count); });
}

// --- few rows to many: kept rows back to their places, the weighted last row at all others

template <class T, class A>
struct Spread {
  Rows<T> from;          // [B, M, C]
  const Rows<T>* x;      // [B, N, C] for dots, or null
  RowWriter<T>* to;      // [B, N, C], or null
  const int32_t* ranks;  // [B, P]; outside 0..keep-1 where a patch was dropped
  const A* weights;      // [B, P], or null: all one
  A* dots;               // [B, P] = <x, last row> at dropped places, 0 at kept ones; or null
  int64_t num_prefix, num_patches, keep;
  bool fused;

  static int64_t scratch_bytes(int64_t channels) {
    return padded(channels * sizeof(A)) + padded(channels * sizeof(T));
  }

  // Rows [begin, end) of image b; memory holds scratch_bytes.
  void run(int64_t b, int64_t begin, int64_t end, char* memory) const {
    const int64_t channels = from.channels;
    A* last = reinterpret_cast<A*>(memory);
    T* buffer = reinterpret_cast<T*>(memory + padded(channels * sizeof(A)));
    if (fused) {
      widen_row(last, from.get(b, num_prefix + keep, 0, channels, buffer), channels);
    } else {
      std::fill(last, last + channels, A(0));
    }
    for (int64_t n = begin; n < end; ++n) {
      const int64_t place = n - num_prefix;
      const int64_t rank = place < 0 ? -1 : ranks[b * num_patches + place];
      const bool dropped = place >= 0 && (rank < 0 || rank >= keep);
      T* out = to ? to->data + (b * (num_prefix + num_patches) + n) * channels : nullptr;
      if (place >= 0 && place + kPrefetchRows < num_patches) {
        const int64_t next = ranks[b * num_patches + place + kPrefetchRows];
        if (to && next >= 0 && next < keep) from.prefetch(b, num_prefix + next, 0, channels);
        if (x && (next < 0 || next >= keep)) x->prefetch(b, n + kPrefetchRows, 0, channels);
      }
      if (!dropped) {
        if (to) to->copy(out, from.get(b, place < 0 ? n : num_prefix + rank, 0, channels, buffer), channels);
        if (dots && place >= 0) dots[b * num_patches + place] = A(0);
        continue;
      }
      if (dots) {
        const A dot = fused ? dot_row(x->get(b, n, 0, channels, buffer), last, channels) : A(0);
        dots[b * num_patches + place] = dot;
      }
      if (!to) continue;
      if (!fused) {
        std::fill(out, out + channels, Narrow<T, A>::of(A(0)));
      } else if (weights) {
        scale_row(out, last, weights[b * num_patches + place], channels);
      } else {
        narrow_row(out, last, channels);
      }
    }
    if (to && to->stream) stream_fence();
  }
};

// Rows of all images, over threads.
template <class T, class A>
void spread_rows(const Spread<T, A>& spread, int64_t batch, int64_t bytes) {
  const int64_t num_rows = spread.num_prefix + spread.num_patches;
  const int threads = threads_for(bytes);
  const int64_t pieces = batch >= threads ? 1 : std::max<int64_t>(1, std::min<int64_t>(threads, num_rows));
  const int64_t scratch_bytes = Spread<T, A>::scratch_bytes(spread.from.channels);
  const Scratch memory(batch * pieces * scratch_bytes);
  parallel_for(batch * pieces, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / pieces, piece = item % pieces;
      spread.run(b, num_rows * piece / pieces, num_rows * (piece + 1) / pieces,
                 memory.data() + item * scratch_bytes);
    }
  });
}

template <class A, class S>
void narrow_scores(const A* from, int64_t count, S* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = Narrow<S, A>::of(from[i]);
}

template <class T, class A>
void reorganize_backward(const TensorView& grad_tokens, const TensorView* x, const TensorView& scores,
                         const int32_t* ranks, int64_t keep, const TensorView* grad_x,
                         const TensorView* grad_scores) {
  const int64_t batch = scores.shape[0], num_patches = scores.shape[1], channels = grad_tokens.shape[2];
  if (!grad_x && !x) return;
  const int64_t num_tokens = (grad_x ? grad_x : x)->shape[1];
  const int64_t row_bytes = channels * static_cast<int64_t>(sizeof(T));
  const int64_t bytes = batch * (num_tokens + grad_tokens.shape[1]) * row_bytes;
  const Scratch weights_memory(batch * num_patches * sizeof(A));  // [B, P]
  const Scratch dots_memory(batch * num_patches * sizeof(A));     // [B, P]
  A* weights = reinterpret_cast<A*>(weights_memory.data());
  A* dots = reinterpret_cast<A*>(dots_memory.data());
  for (int64_t b = 0; b < batch; ++b) read_scores(scores, b, weights + b * num_patches);

  RowWriter<T> writer(grad_x ? *grad_x : grad_tokens, row_bytes, bytes);
  const Rows<T> x_rows(x ? *x : grad_tokens);
  const int64_t num_prefix = num_tokens - num_patches;
  spread_rows(Spread<T, A>{Rows<T>(grad_tokens), x ? &x_rows : nullptr, grad_x ? &writer : nullptr, ranks,
                           weights, grad_scores ? dots : nullptr, num_prefix, num_patches, keep,
                           grad_tokens.shape[1] > num_prefix + keep},
              batch, bytes);
  if (!grad_scores) return;
  const int64_t count = batch * num_patches;
  switch (grad_scores->dtype) {
    case DType::float32: return narrow_scores(dots, count, static_cast<float*>(grad_scores->data));
    case DType::float64: return narrow_scores(dots, count, static_cast<double*>(grad_scores->data));
    case DType::bfloat16: return narrow_scores(dots, count, static_cast<bfloat16*>(grad_scores->data));
    default: return narrow_scores(dots, count, static_cast<float16*>(grad_scores->data));
  }
}

template <class T>
void restore_forward(const TensorView& tokens, const int32_t* ranks, int64_t keep, int64_t num_patches,
                     const TensorView& x) {
  using A = decltype(widen(T()));
  const int64_t batch = tokens.shape[0], num_prefix = x.shape[1] - num_patches;
  const int64_t row_bytes = tokens.shape[2] * static_cast<int64_t>(sizeof(T));
  const int64_t bytes = batch * (x.shape[1] + tokens.shape[1]) * row_bytes;
  RowWriter<T> writer(x, row_bytes, bytes);
  spread_rows(Spread<T, A>{Rows<T>(tokens), nullptr, &writer, ranks, nullptr, nullptr, num_prefix,
                           num_patches, keep, tokens.shape[1] > num_prefix + keep},
              batch, bytes);
}

// Calls Function<T> for the dtype of a checked floating-point tensor.
#define VIOPS_FOR_DTYPE(view, Function, ...)                      \
  switch ((view).dtype) {                                         \
    case DType::float32: return Function<float>(__VA_ARGS__);     \
    case DType::float64: return Function<double>(__VA_ARGS__);    \
    case DType::bfloat16: return Function<bfloat16>(__VA_ARGS__); \
    default: return Function<float16>(__VA_ARGS__);               \
  }

// Sums are float64 where an input is.
template <class T>
void reorganize_forward_by_scores(const TensorView& x, const TensorView& scores, const TensorView& tokens,
                                  const TensorView& index) {
  if constexpr (sizeof(T) < sizeof(double)) {
    if (scores.dtype != DType::float64) return reorganize_forward<T, float>(x, scores, tokens, index);
  }
  reorganize_forward<T, double>(x, scores, tokens, index);
}

template <class T>
void reorganize_backward_by_scores(const TensorView& grad_tokens, const TensorView* x,
                                   const TensorView& scores, const int32_t* ranks, int64_t keep,
                                   const TensorView* grad_x, const TensorView* grad_scores) {
  if constexpr (sizeof(T) < sizeof(double)) {
    if (scores.dtype != DType::float64) {
      return reorganize_backward<T, float>(grad_tokens, x, scores, ranks, keep, grad_x, grad_scores);
    }
  }
  reorganize_backward<T, double>(grad_tokens, x, scores, ranks, keep, grad_x, grad_scores);
}

const CpuKernels kernels = {
    [](const TensorView& q, const TensorView& k, double scale, const TensorView& scores,
       const TensorView& probabilities) {
      VIOPS_FOR_DTYPE(q, scores_forward, q, k, scale, scores, probabilities)
    },
    [](const TensorView& grad_scores, const TensorView& q, const TensorView& k,
       const TensorView& probabilities, double scale, const TensorView& grad_q, const TensorView& grad_k) {
      VIOPS_FOR_DTYPE(q, scores_backward, grad_scores, q, k, probabilities, scale, grad_q, grad_k)
    },
    [](const TensorView& x, const TensorView& scores, const TensorView& tokens, const TensorView& index) {
      VIOPS_FOR_DTYPE(x, reorganize_forward_by_scores, x, scores, tokens, index)
    },
    [](const TensorView& grad_tokens, const TensorView* x, const TensorView& scores, const int32_t* ranks,
       int64_t keep, const TensorView* grad_x, const TensorView* grad_scores) {
      VIOPS_FOR_DTYPE(grad_tokens, reorganize_backward_by_scores, grad_tokens, x, scores, ranks, keep, grad_x,
                      grad_scores)
    },
    [](const TensorView& tokens, const int32_t* ranks, int64_t keep, int64_t num_patches,
       const TensorView& x) { VIOPS_FOR_DTYPE(tokens, restore_forward, tokens, ranks, keep, num_patches, x) },
    [](const TensorView& grad_x, const int32_t* ranks, int64_t keep, int64_t num_patches,
       const TensorView& grad_tokens) {
      VIOPS_FOR_DTYPE(grad_x, restore_backward, grad_x, ranks, keep, num_patches, grad_tokens)
    },
};

}  // namespace

extern const CpuKernels VIOPS_LEVEL_NAME(kernels) = kernels;

}  // namespace viops::token_reorganization
