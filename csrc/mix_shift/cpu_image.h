// Rows of images of any strides to scratch memory and back, and how channels are dealt to vectors.
#pragma once

#include <algorithm>
#include <type_traits>

#include "mix_shift/cpu_tile.h"
#include "mix_shift/mix_shift.h"

namespace viops::mix_shift {
namespace {

// n mod size, from 0 on.
inline int64_t wrapped(int64_t n, int64_t size) {
  const int64_t rest = n % size;
  return rest < 0 ? rest + size : rest;
}

// Channels side by side in scratch memory: those of a vector, or those that are left of a group.
struct Block {
  int64_t first, count;  // channels
  int64_t lanes;         // elements of a column: count, filled up to a power of two
  int64_t group, kernel;
  int64_t right, down;  // rolls of the two directions, from 0 on
  int num_sources;      // 2, or 1 where there is one direction
  bool merged;          // neither is rolled: both share a table of taps
  int64_t tables;       // where its tables begin, in vectors

  int64_t taps() const { return kernel * kernel; }
  int64_t table() const { return num_sources * taps(); }
};

// A plane, or some channels, of one image.
template <class T>
struct Channels {
  T* data;
  int64_t channel, row, column;  // strides

  Channels(const TensorView& view, int64_t b, int64_t first)
      : data(static_cast<T*>(view.data) + b * view.stride[0] + first * view.stride[1]),
        channel(view.stride[1]),
        row(view.stride[2]),
        column(view.stride[3]) {}
  Channels(T* data, int64_t channel, int64_t row, int64_t column)
      : data(data), channel(channel), row(row), column(column) {}

  Channels below(int64_t rows) const { return {data + rows * row, channel, row, column}; }
  Channels from(int64_t first) const { return {data + first * channel, channel, row, column}; }
};

// Columns of kCount channels, side by side there and here.
template <int kCount, class To, class From>
VIOPS_INLINE void copy_columns(const From* from, int64_t from_column, int64_t columns, To* to,
                               int64_t to_column) {
  for (int64_t w = 0; w < columns; ++w, from += from_column, to += to_column) {
    if constexpr (std::is_same_v<To, From>) {
      std::memcpy(to, from, kCount * sizeof(To));
    } else {
      for (int c = 0; c < kCount; ++c) to[c] = Narrow<To, decltype(widen(from[c]))>::of(widen(from[c]));
    }
  }
}

// [4][from_row] -> [4][to_row], rows and columns swapped.
VIOPS_INLINE void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
  typedef float Four __attribute__((vector_size(16)));
  Four rows[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&rows[i], from + i * from_row, sizeof(Four));
  typedef int32_t Places __attribute__((vector_size(16)));
  const Places low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  const Four a = __builtin_shuffle(rows[0], rows[1], low), b = __builtin_shuffle(rows[0], rows[1], high);
  const Four c = __builtin_shuffle(rows[2], rows[3], low), d = __builtin_shuffle(rows[2], rows[3], high);
  const Four out[4] = {__builtin_shuffle(a, c, first), __builtin_shuffle(a, c, second),
                       __builtin_shuffle(b, d, first), __builtin_shuffle(b, d, second)};
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_row, &out[i], sizeof(Four));
}

// to[column * to_column + row * to_row] = from[column * from_column + row * from_row]; side by side are rows
// of one and columns of the other.
template <class To, class From>
VIOPS_INLINE void swap_axes(const From* from, int64_t from_row, int64_t from_column, int64_t rows,
                            int64_t columns, To* to, int64_t to_row, int64_t to_column) {
  int64_t row = 0;
  if constexpr (std::is_same_v<To, float> && std::is_same_v<From, float>) {
    for (; row + 4 <= rows; row += 4) {
      int64_t column = 0;
      for (; column + 4 <= columns; column += 4) {
        const float* const block = from + row * from_row + column * from_column;
        transpose(block, from_column == 1 ? from_row : from_column, to + row * to_row + column * to_column,
                  from_column == 1 ? to_column : to_row);
      }
      for (; column < columns; ++column) {
        for (int i = 0; i < 4; ++i) {
          to[(row + i) * to_row + column * to_column] = from[(row + i) * from_row + column * from_column];
        }
      }
    }
  }
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const From value = from[row * from_row + column * from_column];
      to[row * to_row + column * to_column] = Narrow<To, decltype(widen(value))>::of(widen(value));
    }
  }
}

// Columns of `count` channels each -> [columns][lanes], zeros where there is no channel.  Up to a vector
// beyond the last column is zero then.
template <class A, class T>
VIOPS_INLINE void load_columns(const T* from, int64_t column, int64_t channel, int64_t columns, int64_t count,
                               int64_t lanes, A* to) {
  if (lanes == 1 && column == 1) {
    int64_t w = 0;
    for (; w + kLanes<A> <= columns; w += kLanes<A>) store<A>(to + w, load<A>(from + w));
    if (w < columns) store<A>(to + w, load_part<A>(from + w, columns - w));
    return;
  }
  if (channel == 1) {
    if (count == kLanes<A>) {
      for (int64_t w = 0; w < columns; ++w) store<A>(to + w * kLanes<A>, load<A>(from + w * column));
      return;
    }
    if (count == 4 && lanes == 4) return copy_columns<4>(from, column, columns, to, lanes);
    if (count == 8 && lanes == 8) return copy_columns<8>(from, column, columns, to, lanes);
    for (int64_t w = 0; w < columns; ++w) store<A>(to + w * lanes, load_part<A>(from + w * column, count));
    return;
  }
  if (column == 1) {
    swap_axes(from, channel, 1, count, columns, to, 1, lanes);
  } else {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t w = 0; w < columns; ++w) {
        to[w * lanes + c] = static_cast<A>(widen(from[c * channel + w * column]));
      }
    }
  }
  for (int64_t c = count; c < lanes; ++c) {
    for (int64_t w = 0; w < columns; ++w) to[w * lanes + c] = 0;
  }
}

// The other way round.
template <class A, class T>
VIOPS_INLINE void store_columns(const A* from, int64_t columns, int64_t count, int64_t lanes, T* to,
                                int64_t column, int64_t channel) {
  if (lanes == 1 && column == 1) {
    int64_t w = 0;
    for (; w + kLanes<A> <= columns; w += kLanes<A>) store<A>(to + w, load<A>(from + w));
    if (w < columns) store_part<A>(to + w, load<A>(from + w), columns - w);
    return;
  }
  if (channel == 1) {
    if (count == kLanes<A>) {
      for (int64_t w = 0; w < columns; ++w) store<A>(to + w * column, load<A>(from + w * kLanes<A>));
      return;
    }
    if (count == 4) return copy_columns<4>(from, lanes, columns, to, column);
    if (count == 8) return copy_columns<8>(from, lanes, columns, to, column);
    for (int64_t w = 0; w < columns; ++w) store_part<A>(to + w * column, load<A>(from + w * lanes), count);
    return;
  }
  if (column == 1) return swap_axes(from, 1, lanes, count, columns, to, channel, 1);
  for (int64_t c = 0; c < count; ++c, to += channel) {
    for (int64_t w = 0; w < columns; ++w) to[w * column] = Narrow<T, A>::of(from[w * lanes + c]);
  }
}

// Rows in scratch memory, with zeros at both ends, and a vector of room behind the last.
template <class A>
struct Slab {
  A* data;
  int64_t columns;  // of the image
  int64_t lanes;
  int64_t margin;  // columns of zeros at each end: k/2
  int64_t left;    // elements before the first column: the margin, filled up to whole vectors
  int64_t row;     // elements from one row to the next

  Slab(A* data, int64_t columns, int64_t lanes, int64_t margin)
      : data(data),
        columns(columns),
        lanes(lanes),
        margin(margin),
        left(whole(margin * lanes)),
        row(row_of(columns, lanes, margin)) {}

  static int64_t whole(int64_t elements) { return (elements + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }
  static int64_t row_of(int64_t columns, int64_t lanes, int64_t margin) {
    return whole(columns * lanes) + 2 * whole(margin * lanes);
  }

  // Where rows begin, their margin included.
  const A* rows() const { return data + left - margin * lanes; }

  void zero_rows(int64_t first, int64_t last) {
    for (A* to = data + first * row; to < data + last * row; to += kLanes<A>) store<A>(to, Vector<A>{});
  }

  // Row r: an image's row, rolled by `shift` columns, 0 <= shift < columns.  Rows before it stay as they are.
  template <class T>
  VIOPS_INLINE void load_row(int64_t r, const T* from, const Channels<const T>& image, int64_t count,
                             int64_t shift) {
    A* const to = data + r * row;
    A* const begin = to + left;
    for (int64_t i = 0; i < left; i += kLanes<A>) store<A>(to + i, Vector<A>{});
    const T* const end = from + (columns - shift) * image.column;
    load_columns<A, T>(end, image.column, image.channel, shift, count, lanes, begin);
    load_columns<A, T>(from, image.column, image.channel, columns - shift, count, lanes,
                       begin + shift * lanes);
    for (A* zero = begin + columns * lanes; zero < to + row; zero += kLanes<A>) store<A>(zero, Vector<A>{});
  }

  // Rows [first, first + rows) of an image whose rows are rolled by `down` and columns by `right`, zeros
  // outside of it.
  template <class T>
  void load(const Channels<const T>& image, int64_t count, int64_t height, int64_t first, int64_t rows,
            int64_t down, int64_t right) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = first + r;
      if (h < 0 || h >= height) {
        zero_rows(r, r + 1);
      } else {
        load_row(r, image.data + (h < down ? h - down + height : h - down) * image.row, image, count, right);
      }
    }
  }
};

}  // namespace
}  // namespace viops::mix_shift
