// Token reorganization on the CPU; built once a CPU level.
#include <algorithm>

#include "common/rows.h"
#include "token_reorganization/cpu_attention.h"
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
  RowWriter(const TensorView& view, int64_t moved)
      : data(static_cast<T*>(view.data)),
        stream(moved > last_cache_bytes() / 2 &&
               view.shape[2] * static_cast<int64_t>(sizeof(T)) % kCacheLine == 0 &&
               reinterpret_cast<uintptr_t>(view.data) % kCacheLine == 0) {}

  // Starts taking over the cache lines of a row that is written soon.
  VIOPS_INLINE void prefetch(const T* row, int64_t count) const {
    if (stream) return;
    const char* bytes = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += kCacheLine)
      __builtin_prefetch(bytes + i, 1);
  }

  VIOPS_INLINE void copy(T* to, const T* from, int64_t count) const {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (stream) {
      stream_copy(to, from, bytes);
    } else if (bytes > 0) {
      std::memcpy(to, from, static_cast<size_t>(bytes));
    }
  }
};

// Takes what a thread found in its part of an index into what all found; whether it was wrong.
bool note(WrongPlace& all, const WrongPlace& own) {
  if (!own.found) return false;
  __atomic_store_n(&all.place, own.place, __ATOMIC_RELAXED);
  __atomic_store_n(&all.found, true, __ATOMIC_RELAXED);
  return true;
}

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

// Scores and ranks of one image's patches, and room to make them.
template <class A>
struct Ranking {
  using Key = SortKey<A>;
  int64_t num_patches;
  int32_t* ranks;  // [P]; outside 0..keep-1 where a patch is dropped
  A* scores;       // [P]
  Key* keys;       // [P] padded to kRankGroup
  Entry<Key>* entries;

  static bool by_counting(int64_t num_patches) { return num_patches <= kRankByCounting; }

  static int64_t scratch_bytes(int64_t num_patches) {
    return padded(num_patches * sizeof(int32_t)) + padded(num_patches * sizeof(A)) +
           padded((num_patches + kRankGroup) * sizeof(Key)) +
           (by_counting(num_patches) ? 0 : padded(num_patches * sizeof(Entry<Key>)));
  }

  Ranking(int64_t num_patches, char* memory)
      : num_patches(num_patches), ranks(reinterpret_cast<int32_t*>(memory)) {
    scores = reinterpret_cast<A*>(memory += padded(num_patches * sizeof(int32_t)));
    keys = reinterpret_cast<Key*>(memory += padded(num_patches * sizeof(A)));
    entries = reinterpret_cast<Entry<Key>*>(memory + padded((num_patches + kRankGroup) * sizeof(Key)));
  }

  // From row b of scores [B, P].
  void rank(const TensorView& all_scores, int64_t b, int64_t keep) {
    read_scores(all_scores, b, scores);
    for (int64_t i = 0; i < num_patches; ++i) keys[i] = sort_key(scores[i]);
    if (by_counting(num_patches)) {
      std::fill(keys + num_patches, keys + num_patches + kRankGroup, Key(0));
      rank_by_counting<A>(keys, num_patches, ranks);
    } else {
      rank_by_sorting(keys, num_patches, keep, entries, ranks);
    }
  }

  // From row b of index [B, keep], up to the first wrong place.
  WrongPlace invert(const TensorView& index, int64_t b) {
    std::fill(ranks, ranks + num_patches, -1);
    const int64_t* row = static_cast<const int64_t*>(index.data) + b * index.stride[0];
    for (int64_t j = 0; j < index.shape[1]; ++j) {
      const int64_t place = row[j * index.stride[1]];
      if (place < 0 || place >= num_patches || ranks[place] >= 0) return {true, place};
      ranks[place] = static_cast<int32_t>(j);
    }
    return {};
  }
};

// --- many rows to fewer: kept rows to their ranks, the weighted sum of the others behind them

constexpr int kRowsAtOnce = 4;

template <class T, class A>
struct Collect {
  Rows<T> from;     // [B, N, C]
  RowWriter<T> to;  // [B, M, C]
  int64_t num_tokens, num_prefix, num_patches, keep;
  bool fuse;

  Collect(const TensorView& from, const TensorView& to, int64_t num_patches, int64_t keep, int64_t bytes)
      : from(from),
        to(to, bytes),
        num_tokens(to.shape[1]),
        num_prefix(from.shape[1] - num_patches),
        num_patches(num_patches),
        keep(keep),
        fuse(num_tokens > num_prefix + keep) {}

  static int64_t scratch_bytes(int64_t channels) {
    return padded(channels * sizeof(A)) + kRowsAtOnce * padded(channels * sizeof(T));
  }

  // Channels [first, first + count) of image b; ranks [P], weights [P] or null for ones.
  void run(int64_t b, int64_t first, int64_t count, const int32_t* ranks, const A* weights,
           char* memory) const {
    const int64_t channels = from.channels;
    A* sum = reinterpret_cast<A*>(memory);
    T* buffers[kRowsAtOnce];
    memory += padded(channels * sizeof(A));
    for (T*& buffer : buffers) {
      buffer = reinterpret_cast<T*>(memory);
      memory += padded(channels * sizeof(T));
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
      if (i + kPrefetchRows < num_patches) {
        const int64_t next = ranks[i + kPrefetchRows];
        from.prefetch(b, num_prefix + i + kPrefetchRows, first, count);
        if (next >= 0 && next < keep) to.prefetch(out + (num_prefix + next) * channels, count);
      }
      const int64_t rank = ranks[i];
      const bool kept = rank >= 0 && rank < keep;
      if (!kept && !fuse) continue;
      const T* row = from.get(b, num_prefix + i, first, count, buffers[num_waiting]);
      if (kept) {
        to.copy(out + (num_prefix + rank) * channels, row, count);
        continue;
      }
      waiting[num_waiting] = row;
      weight[num_waiting] = weights ? weights[i] : A(1);
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

// Where images are fewer than threads their channels are shared out too, in whole cache lines of any dtype:
// piece `piece` of `pieces` has channels [first, last).
struct ChannelRange {
  int64_t first, last;
  ChannelRange(int64_t channels, int64_t piece, int64_t pieces) {
    const int64_t blocks = (channels + kCacheLine - 1) / kCacheLine;
    first = std::min(channels, blocks * piece / pieces * kCacheLine);
    last = std::min(channels, blocks * (piece + 1) / pieces * kCacheLine);
  }
};

template <class T, class A>
void reorganize_forward(const TensorView& x, const TensorView& scores, const TensorView& tokens,
                        const TensorView& index) {
  const int64_t batch = x.shape[0], channels = x.shape[2], num_patches = scores.shape[1];
  const int64_t keep = index.shape[1];
  const int64_t bytes = batch * (x.shape[1] + tokens.shape[1]) * channels * static_cast<int64_t>(sizeof(T));
  const int64_t ranking_bytes = Ranking<A>::scratch_bytes(num_patches);
  const Collect<T, A> collect(x, tokens, num_patches, keep, bytes);
  const Pieces pieces(batch, channels / kCacheLine, bytes);
  pieces.for_each(ranking_bytes + collect.scratch_bytes(channels),
                  [&](int64_t b, int64_t piece, char* memory) {
                    Ranking<A> ranking(num_patches, memory);
                    ranking.rank(scores, b, keep);
                    if (piece == 0) {
                      int64_t* row = static_cast<int64_t*>(index.data) + b * keep;
                      for (int64_t i = 0; i < num_patches; ++i) {
                        if (ranking.ranks[i] < keep) row[ranking.ranks[i]] = i;
                      }
                    }
                    const ChannelRange range(channels, piece, pieces.per_image);
                    collect.run(b, range.first, range.last - range.first, ranking.ranks, ranking.scores,
                                memory + ranking_bytes);
                  });
}

template <class T>
WrongPlace restore_backward(const TensorView& grad_x, const TensorView& index, int64_t num_patches,
                            const TensorView& grad_tokens) {
  using A = decltype(widen(T()));
  const int64_t batch = grad_x.shape[0], channels = grad_x.shape[2];
  const int64_t bytes =
      batch * (grad_x.shape[1] + grad_tokens.shape[1]) * channels * static_cast<int64_t>(sizeof(T));
  const int64_t ranking_bytes = Ranking<A>::scratch_bytes(num_patches);
  const Collect<T, A> collect(grad_x, grad_tokens, num_patches, index.shape[1], bytes);
  const Pieces pieces(batch, channels / kCacheLine, bytes);
  WrongPlace wrong;
  pieces.for_each(
      ranking_bytes + collect.scratch_bytes(channels), [&](int64_t b, int64_t piece, char* memory) {
        Ranking<A> ranking(num_patches, memory);
        if (note(wrong, ranking.invert(index, b))) return;
        const ChannelRange range(channels, piece, pieces.per_image);
        collect.run(b, range.first, range.last - range.first, ranking.ranks, nullptr, memory + ranking_bytes);
      });
  return wrong;
}

// --- few rows to many: kept rows back to their places, the weighted last row at all others

template <class T, class A>
struct Spread {
  Rows<T> from;      // [B, M, C]
  const Rows<T>* x;  // [B, N, C] for dots, or null
  RowWriter<T>* to;  // [B, N, C], or null
  int64_t num_prefix, num_patches, keep;
  bool fused;

  static int64_t scratch_bytes(int64_t channels) {
    return padded(channels * sizeof(A)) + padded(channels * sizeof(T));
  }

  // Rows [begin, end) of image b; ranks [P]; weights [P] or null for ones; dots [P], or null, gets
  // <x, last row> at dropped places and 0 at kept ones.
  void run(int64_t b, int64_t begin, int64_t end, const int32_t* ranks, const A* weights, A* dots,
           char* memory) const {
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
      if (place >= 0 && place + kPrefetchRows < num_patches) {
        const int64_t next = ranks[place + kPrefetchRows];
        const bool next_kept = next >= 0 && next < keep;
        if (to && next_kept) from.prefetch(b, num_prefix + next, 0, channels);
        if (dots && !next_kept) x->prefetch(b, n + kPrefetchRows, 0, channels);
      }
      const int64_t rank = place < 0 ? -1 : ranks[place];
      const bool dropped = place >= 0 && (rank < 0 || rank >= keep);
      T* out = to ? to->data + (b * (num_prefix + num_patches) + n) * channels : nullptr;
      if (!dropped) {
        if (to) to->copy(out, from.get(b, place < 0 ? n : num_prefix + rank, 0, channels, buffer), channels);
        if (dots && place >= 0) dots[place] = A(0);
        continue;
      }
      if (dots) dots[place] = fused ? dot_row(x->get(b, n, 0, channels, buffer), last, channels) : A(0);
      if (!to) continue;
      if (!fused) {
        std::fill(out, out + channels, Narrow<T, A>::of(A(0)));
      } else if (weights) {
        scale_row(out, last, weights[place], channels);
      } else {
        narrow_row(out, last, channels);
      }
    }
    if (to && to->stream) stream_fence();
  }
};

// Elements [begin, end) of row b of grad_scores [B, P] contiguous.
template <class A>
void write_scores(const A* from, int64_t begin, int64_t end, const TensorView& to, int64_t b) {
  const auto narrow = [&](auto* data) {
    data += b * to.shape[1];
    using S = std::remove_pointer_t<decltype(data)>;
    for (int64_t i = begin; i < end; ++i) data[i] = Narrow<S, A>::of(from[i]);
  };
  switch (to.dtype) {
    case DType::float32: return narrow(static_cast<float*>(to.data));
    case DType::float64: return narrow(static_cast<double*>(to.data));
    case DType::bfloat16: return narrow(static_cast<bfloat16*>(to.data));
    default: return narrow(static_cast<float16*>(to.data));
  }
}

template <class T, class A>
WrongPlace reorganize_backward(const TensorView& grad_tokens, const TensorView* x, const TensorView& scores,
                               const TensorView& index, const TensorView* grad_x,
                               const TensorView* grad_scores) {
  if (!grad_x && !x) return {};
  const int64_t batch = scores.shape[0], num_patches = scores.shape[1], channels = grad_tokens.shape[2];
  const int64_t num_rows = (grad_x ? grad_x : x)->shape[1], num_prefix = num_rows - num_patches;
  const int64_t keep = index.shape[1];
  // grad_tokens, grad_x, and of x the dropped rows
  const int64_t moved_rows = grad_tokens.shape[1] + (grad_x ? num_rows : 0) + (x ? num_patches - keep : 0);
  const int64_t bytes = batch * moved_rows * channels * static_cast<int64_t>(sizeof(T));
  const int64_t ranking_bytes = Ranking<A>::scratch_bytes(num_patches);
  const int64_t dots_bytes = padded(num_patches * sizeof(A));
  RowWriter<T> writer(grad_x ? *grad_x : grad_tokens, bytes);
  const Rows<T> x_rows(x ? *x : grad_tokens);
  const Spread<T, A> spread{Rows<T>(grad_tokens),
                            x ? &x_rows : nullptr,
                            grad_x ? &writer : nullptr,
                            num_prefix,
                            num_patches,
                            keep,
                            grad_tokens.shape[1] > num_prefix + keep};
  const Pieces pieces(batch, num_rows, bytes);
  WrongPlace wrong;
  pieces.for_each(ranking_bytes + dots_bytes + spread.scratch_bytes(channels), [&](int64_t b, int64_t piece,
                                                                                   char* memory) {
    Ranking<A> ranking(num_patches, memory);
    if (note(wrong, ranking.invert(index, b))) return;
    read_scores(scores, b, ranking.scores);
    A* dots = grad_scores ? reinterpret_cast<A*>(memory + ranking_bytes) : nullptr;
    const int64_t begin = num_rows * piece / pieces.per_image;
    const int64_t end = num_rows * (piece + 1) / pieces.per_image;
    spread.run(b, begin, end, ranking.ranks, ranking.scores, dots, memory + ranking_bytes + dots_bytes);
    const int64_t first = std::max<int64_t>(begin - num_prefix, 0);
    if (dots) write_scores(dots, first, std::max(first, end - num_prefix), *grad_scores, b);
  });
  return wrong;
}

template <class T>
WrongPlace restore_forward(const TensorView& tokens, const TensorView& index, int64_t num_patches,
                           const TensorView& x) {
  using A = decltype(widen(T()));
  const int64_t batch = tokens.shape[0], channels = tokens.shape[2], num_rows = x.shape[1];
  const int64_t num_prefix = num_rows - num_patches, keep = index.shape[1];
  const int64_t bytes = batch * (num_rows + tokens.shape[1]) * channels * static_cast<int64_t>(sizeof(T));
  const int64_t ranking_bytes = Ranking<A>::scratch_bytes(num_patches);
  RowWriter<T> writer(x, bytes);
  const Spread<T, A> spread{
      Rows<T>(tokens), nullptr, &writer, num_prefix, num_patches, keep, tokens.shape[1] > num_prefix + keep};
  const Pieces pieces(batch, num_rows, bytes);
  WrongPlace wrong;
  pieces.for_each(
      ranking_bytes + spread.scratch_bytes(channels), [&](int64_t b, int64_t piece, char* memory) {
        Ranking<A> ranking(num_patches, memory);
        if (note(wrong, ranking.invert(index, b))) return;
        spread.run(b, num_rows * piece / pieces.per_image, num_rows * (piece + 1) / pieces.per_image,
                   ranking.ranks, nullptr, nullptr, memory + ranking_bytes);
      });
  return wrong;
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
WrongPlace reorganize_backward_by_scores(const TensorView& grad_tokens, const TensorView* x,
                                         const TensorView& scores, const TensorView& index,
                                         const TensorView* grad_x, const TensorView* grad_scores) {
  if constexpr (sizeof(T) < sizeof(double)) {
    if (scores.dtype != DType::float64) {
      return reorganize_backward<T, float>(grad_tokens, x, scores, index, grad_x, grad_scores);
    }
  }
  return reorganize_backward<T, double>(grad_tokens, x, scores, index, grad_x, grad_scores);
}

const CpuKernels kernels = {
    attention_forward,
    attention_backward,
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
    [](const TensorView& grad_tokens, const TensorView* x, const TensorView& scores, const TensorView& index,
       const TensorView* grad_x, const TensorView* grad_scores) -> WrongPlace {
      VIOPS_FOR_DTYPE(grad_tokens, reorganize_backward_by_scores, grad_tokens, x, scores, index, grad_x,
                      grad_scores)
    },
    [](const TensorView& tokens, const TensorView& index, int64_t num_patches, const TensorView& x)
        -> WrongPlace { VIOPS_FOR_DTYPE(tokens, restore_forward, tokens, index, num_patches, x) },
    [](const TensorView& grad_x, const TensorView& index, int64_t num_patches, const TensorView& grad_tokens)
        -> WrongPlace { VIOPS_FOR_DTYPE(grad_x, restore_backward, grad_x, index, num_patches, grad_tokens) },
};

}  // namespace

extern const CpuKernels VIOPS_LEVEL_NAME(kernels) = kernels;

}  // namespace viops::token_reorganization
