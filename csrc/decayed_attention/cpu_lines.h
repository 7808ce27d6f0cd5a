// Lines of tokens between strided tensors and panels, and the decay along them; part of cpu.cpp.
#pragma once

#include <utility>

#include "decayed_attention/cpu_tile.h"
#include "decayed_attention/decayed_attention.h"

namespace viops::decayed_attention {
namespace {

template <class A>
constexpr int64_t num_panels(int64_t channels) {
  return (channels + kLanes<A> - 1) / kLanes<A>;
}

// Tokens of a head, the first at `data`: data[i * step + c * stride].
template <class T>
struct Tokens {
  T* data;
  int64_t step, stride, channels;
};

// A tensor [B, H, h, w, C].
template <class T>
struct Grid {
  T* data;
  int64_t stride_b, stride_h, stride_y, stride_x, stride_c, channels;

  explicit Grid(const TensorView& view)
      : data(static_cast<T*>(view.data)),
        stride_b(view.stride[0]),
        stride_h(view.stride[1]),
        stride_y(view.stride[2]),
        stride_x(view.stride[3]),
        stride_c(view.shape[4] > 1 ? view.stride[4] : 1),
        channels(view.shape[4]) {}

  VIOPS_INLINE Tokens<T> row(int64_t b, int64_t h, int64_t y) const {
    return {data + b * stride_b + h * stride_h + y * stride_y, stride_x, stride_c, channels};
  }
  VIOPS_INLINE Tokens<T> column(int64_t b, int64_t h, int64_t x) const {
    return {data + b * stride_b + h * stride_h + x * stride_x, stride_y, stride_c, channels};
  }
};

// Calls at(address) for the cache lines of tokens whose channels lie together.
template <class T, class At>
VIOPS_INLINE void for_cache_lines(const Tokens<T>& tokens, int64_t count, const At& at) {
  if (tokens.stride != 1) return;
  const int64_t bytes = tokens.channels * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    const char* row = reinterpret_cast<const char*>(tokens.data + i * tokens.step);
    for (int64_t byte = 0; byte < bytes; byte += kCacheLine) at(row + byte);
  }
}

// Starts loading tokens, or taking over their cache lines: columns are walked in an order that no hardware
// guesses.
template <bool kWrites, class T>
VIOPS_INLINE void prefetch(const Tokens<T>& tokens, int64_t count) {
  for_cache_lines(tokens, count, [](const char* line) { __builtin_prefetch(line, kWrites); });
}

// The same well ahead of their use: into the second-level cache.
template <class T>
VIOPS_INLINE void prefetch_far(const Tokens<T>& tokens, int64_t count) {
  for_cache_lines(tokens, count, [](const char* line) { __builtin_prefetch(line, 0, 2); });
}

// Whether each token is whole vectors.
template <class A, class T>
bool is_whole(const Tokens<T>& tokens) {
  return tokens.stride == 1 && tokens.channels % kLanes<A> == 0;
}

// Channels [first, first + kLanes) of token i, zero beyond the last.
template <bool kWhole, class A, class T>
VIOPS_INLINE Vector<A> load_channels(const Tokens<const T>& tokens, int64_t i, int64_t first) {
  const T* row = tokens.data + i * tokens.step;
  if constexpr (kWhole) return load<A>(row + first);
  A lanes[kLanes<A>] = {};
  for (int64_t c = first; c < std::min(tokens.channels, first + kLanes<A>); ++c) {
    lanes[c - first] = static_cast<A>(widen(row[c * tokens.stride]));
  }
  return load<A>(lanes);
}

template <bool kWhole, class A, class T>
VIOPS_INLINE void store_channels(const Tokens<T>& tokens, int64_t i, int64_t first, Vector<A> value) {
  T* row = tokens.data + i * tokens.step;
  if constexpr (kWhole) return store<A>(row + first, value);
  A lanes[kLanes<A>];
  store<A>(lanes, value);
  for (int64_t c = first; c < std::min(tokens.channels, first + kLanes<A>); ++c) {
    row[c * tokens.stride] = Narrow<T, A>::of(lanes[c - first]);
  }
}

// What q and k are turned by; sin and cos are null where they are not.
template <class A>
struct Rotation {
  Tokens<const A> sin, cos;
};

// The lanes with neighbours (even, odd) swapped.
template <class A, std::size_t... kLane>
VIOPS_INLINE Vector<A> swap_pairs(Vector<A> x, std::index_sequence<kLane...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, x, (kLane ^ 1)...);
#else
  return Vector<A>{x[kLane ^ 1]...};
#endif
}

// (even, odd) -> (-odd, even).
template <class A, std::size_t... kLane>
VIOPS_INLINE Vector<A> turned(Vector<A> x, std::index_sequence<kLane...> lanes) {
  return swap_pairs<A>(x, lanes) * Vector<A>{(kLane % 2 ? A(1) : A(-1))...};
}

template <class A>
using LaneSequence = std::make_index_sequence<kLanes<A>>;

template <bool kWhole, class A>
VIOPS_INLINE Vector<A> rotate(Vector<A> x, const Rotation<A>& rotation, int64_t i, int64_t first) {
  return x * load_channels<kWhole, A>(rotation.cos, i, first) +
         turned<A>(x, LaneSequence<A>()) * load_channels<kWhole, A>(rotation.sin, i, first);
}

// The gradient to x of `rotate`.
template <bool kWhole, class A>
VIOPS_INLINE Vector<A> rotate_back(Vector<A> grad, const Rotation<A>& rotation, int64_t i, int64_t first) {
  return grad * load_channels<kWhole, A>(rotation.cos, i, first) -
         turned<A>(grad * load_channels<kWhole, A>(rotation.sin, i, first), LaneSequence<A>());
}

// Calls each(i, c, panel) for the first channels c of the panels of tokens i.
template <class A, class Each>
VIOPS_INLINE void for_vectors(int64_t count, int64_t channels, const Each& each) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0, panel = 0; c < channels; c += kLanes<A>, ++panel) each(i, c, panel);
  }
}

template <bool kWhole, class A, class T>
void pack_as(const Tokens<const T>& tokens, int64_t count, Panels<A> to) {
  for_vectors<A>(count, tokens.channels, [&](int64_t i, int64_t c, int64_t panel) {
    store<A>(to.panels_from(panel).row(i), load_channels<kWhole, A>(tokens, i, c));
  });
}

template <class A, class T>
void pack(const Tokens<const T>& tokens, int64_t count, Panels<A> to) {
  is_whole<A>(tokens) ? pack_as<true, A>(tokens, count, to) : pack_as<false, A>(tokens, count, to);
}

template <bool kWhole, bool kRotated, class A, class T>
void pack_rotated_as(const Tokens<const T>& tokens, const Rotation<A>& rotation, A scale, int64_t count,
                     Panels<A> to) {
  for_vectors<A>(count, tokens.channels, [&](int64_t i, int64_t c, int64_t panel) {
    Vector<A> x = load_channels<kWhole, A>(tokens, i, c);
    if constexpr (kRotated) x = rotate<kWhole, A>(x, rotation, i, c);
    store<A>(to.panels_from(panel).row(i), x * scale);
  });
}

template <class A, class T>
void pack_rotated(const Tokens<const T>& tokens, const Rotation<A>& rotation, A scale, int64_t count,
                  Panels<A> to) {
  if (!rotation.sin.data) {
    return is_whole<A>(tokens) ? pack_rotated_as<true, false, A>(tokens, rotation, scale, count, to)
                               : pack_rotated_as<false, false, A>(tokens, rotation, scale, count, to);
  }
  return is_whole<A>(tokens) && is_whole<A>(rotation.sin) && is_whole<A>(rotation.cos)
             ? pack_rotated_as<true, true, A>(tokens, rotation, scale, count, to)
             : pack_rotated_as<false, true, A>(tokens, rotation, scale, count, to);
}

template <bool kWhole, class A, class T>
void unpack_as(Panels<const A> from, int64_t count, const Tokens<T>& tokens) {
  for_vectors<A>(count, tokens.channels, [&](int64_t i, int64_t c, int64_t panel) {
    store_channels<kWhole, A>(tokens, i, c, load<A>(from.panels_from(panel).row(i)));
  });
}

template <class A, class T>
void unpack(Panels<const A> from, int64_t count, const Tokens<T>& tokens) {
  is_whole<A>(tokens) ? unpack_as<true, A>(from, count, tokens) : unpack_as<false, A>(from, count, tokens);
}

template <bool kWhole, bool kRotated, class A, class T>
void unpack_rotated_back_as(Panels<const A> from, const Rotation<A>& rotation, A scale, int64_t count,
                            const Tokens<T>& tokens) {
  for_vectors<A>(count, tokens.channels, [&](int64_t i, int64_t c, int64_t panel) {
    Vector<A> x = load<A>(from.panels_from(panel).row(i));
    if constexpr (kRotated) x = rotate_back<kWhole, A>(x, rotation, i, c);
    store_channels<kWhole, A>(tokens, i, c, x * scale);
  });
}

template <class A, class T>
void unpack_rotated_back(Panels<const A> from, const Rotation<A>& rotation, A scale, int64_t count,
                         const Tokens<T>& tokens) {
  if (!rotation.sin.data) {
    return is_whole<A>(tokens)
               ? unpack_rotated_back_as<true, false, A>(from, rotation, scale, count, tokens)
               : unpack_rotated_back_as<false, false, A>(from, rotation, scale, count, tokens);
  }
  return is_whole<A>(tokens) && is_whole<A>(rotation.sin) && is_whole<A>(rotation.cos)
             ? unpack_rotated_back_as<true, true, A>(from, rotation, scale, count, tokens)
             : unpack_rotated_back_as<false, true, A>(from, rotation, scale, count, tokens);
}

// Rows of `from` that lie `from_step` rows apart -> rows of `to` that lie `to_step` apart.
template <class A>
void copy_rows(Panels<const A> from, int64_t from_step, Panels<A> to, int64_t to_step, int64_t count,
               int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes<A>, from.data += from.plane, to.data += to.plane) {
    for (int64_t i = 0; i < count; ++i) store<A>(to.row(i * to_step), load<A>(from.row(i * from_step)));
  }
}

// Swaps the bits kBit of the row and of the lane.
template <int kBit, class A, std::size_t... kLane>
VIOPS_INLINE void exchange(Vector<A>* rows, std::index_sequence<kLane...>) {
#pragma GCC unroll 16
  for (int r = 0; r < kLanes<A>; ++r) {
    if (r & kBit) continue;
    const Vector<A> a = rows[r], b = rows[r + kBit];
#if __has_builtin(__builtin_shufflevector)
    rows[r] = __builtin_shufflevector(a, b, (kLane & kBit ? kLane - kBit + kLanes<A> : kLane)...);
    rows[r + kBit] = __builtin_shufflevector(a, b, (kLane & kBit ? kLane + kLanes<A> : kLane + kBit)...);
#else
    rows[r] = Vector<A>{(kLane & kBit ? b[kLane - kBit] : a[kLane])...};
    rows[r + kBit] = Vector<A>{(kLane & kBit ? b[kLane] : a[(kLane + kBit) % kLanes<A>])...};
#endif
  }
}

// The square of kLanes vectors.
template <class A>
VIOPS_INLINE void transpose(Vector<A>* rows) {
  const LaneSequence<A> lanes;
  exchange<1, A>(rows, lanes);
  if constexpr (kLanes<A> > 2) exchange<2, A>(rows, lanes);
  if constexpr (kLanes<A> > 4) exchange<4, A>(rows, lanes);
  if constexpr (kLanes<A> > 8) exchange<8, A>(rows, lanes);
}

// Up to kLanes rows [count][channels] -> to [channels][kLanes], zero beyond `count`.
template <class A>
void pack_transposed(Panels<const A> from, int64_t count, int64_t channels, A* to) {
  for (int64_t c = 0; c < channels; c += kLanes<A>, from.data += from.plane, to += kLanes<A> * kLanes<A>) {
    Vector<A> rows[kLanes<A>];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes<A>; ++r) rows[r] = r < count ? load<A>(from.row(r)) : Vector<A>{};
    transpose<A>(rows);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes<A>; ++r) store<A>(to + r * kLanes<A>, rows[r]);
  }
}

// Hands out memory, aligned; with none it counts how much is wanted.
class Memory {
 public:
  explicit Memory(char* data = nullptr)
      : next_(data ? padded(reinterpret_cast<intptr_t>(data)) : 0), first_(next_) {}

  template <class E>
  E* take(int64_t count) {
    E* taken = reinterpret_cast<E*>(next_);
    next_ += padded(count * static_cast<int64_t>(sizeof(E)));
    return taken;
  }

  template <class A>
  Panels<A> take_panels(int64_t rows, int64_t channels);

  // With room to align.
  int64_t bytes() const { return next_ - first_ + kCacheLine; }

 private:
  int64_t next_, first_;
};

// How the queries of a line are dealt to the lanes of panels: alike, so that no panel is almost empty.
template <class A>
struct Deal {
  int64_t length, panels, lanes;

  explicit Deal(int64_t length)
      : length(length), panels(num_panels<A>(length)), lanes((length + panels - 1) / panels) {}

  VIOPS_INLINE int64_t first(int64_t panel) const { return panel * lanes; }
  VIOPS_INLINE int64_t count(int64_t panel) const {
    return std::clamp<int64_t>(length - panel * lanes, 0, lanes);
  }
  int64_t blocks() const { return (panels + kVectors - 1) / kVectors; }
};

// Rows beyond the last that tiles read, and lanes beyond the last that vectors do.
constexpr int64_t kSpareRows = 16;

template <class A>
Panels<A> Memory::take_panels(int64_t rows, int64_t channels) {
  const int64_t plane = (rows + kSpareRows) * kLanes<A>;
  return {take<A>(plane * num_panels<A>(channels)), plane};
}

// `factor` times the distance between tokens of one row or column.
template <class A>
struct LineDistance {
  const A* origin;  // |i| * factor at origin[i]
  int64_t lanes;

  VIOPS_INLINE Vector<A> at(int64_t key, int64_t panel) const {
    return load<A>(origin + panel * lanes - key);
  }

  static int64_t size(int64_t length) { return 2 * length + kSpareRows + (kVectors + 1) * kLanes<A>; }

  // Fills a table of `size` elements; the distances of the queries from 0 on.
  static LineDistance fill(A* table, int64_t length, A factor, int64_t lanes) {
    const int64_t before = length + kSpareRows;
    for (int64_t i = 0; i < size(length); ++i) {
      table[i] = factor * static_cast<A>(i < before ? before - i : i - before);
    }
    return {table + before, lanes};
  }
};

// The same between tokens of the whole grid: from a table for rows and one for columns, each with a row of
// lanes for each place there.
template <class A>
struct GridDistance {
  const A *by_row, *by_column;
  const int32_t* places;  // of each key: where its row and column lie in these

  static constexpr int64_t kRow = kVectors * kLanes<A>;

  VIOPS_INLINE Vector<A> at(int64_t key, int64_t panel) const {
    return load<A>(by_row + places[2 * key] + panel * kLanes<A>) +
           load<A>(by_column + places[2 * key + 1] + panel * kLanes<A>);
  }

  // Fills the tables for queries [first, first + kVectors * lanes) of a grid of this width.
  static void fill(A* by_row, A* by_column, int64_t height, int64_t width, A factor, int64_t first,
                   int64_t lanes) {
    for (int64_t panel = 0; panel < kVectors; ++panel) {
      A y[kLanes<A>], x[kLanes<A>];
      for (int i = 0; i < kLanes<A>; ++i) {
        y[i] = static_cast<A>((first + panel * lanes + i) / width);
        x[i] = static_cast<A>((first + panel * lanes + i) % width);
      }
      fill_table(by_row + panel * kLanes<A>, load<A>(y), height, factor);
      fill_table(by_column + panel * kLanes<A>, load<A>(x), width, factor);
    }
  }

  static void fill_table(A* table, Vector<A> own, int64_t count, A factor) {
    for (int64_t i = 0; i < count; ++i) {
      const Vector<A> away = own - static_cast<A>(i);
      store<A>(table + i * kRow, factor * (away > -away ? away : -away));
    }
  }

  static void fill_places(int32_t* places, int64_t height, int64_t width) {
    for (int64_t key = 0; key < height * width + kSpareRows; ++key) {
      const bool spare = key >= height * width;
      places[2 * key] = spare ? 0 : static_cast<int32_t>(key / width * kRow);
      places[2 * key + 1] = spare ? 0 : static_cast<int32_t>(key % width * kRow);
    }
  }
};

}  // namespace
}  // namespace viops::decayed_attention
