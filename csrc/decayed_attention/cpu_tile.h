// Register tiles of decayed attention on the CPU; part of cpu.cpp.
//
// Matrices lie in panels of one vector's width: element [r][c] of a matrix is at
// data[c / kLanes * plane + r * kLanes + c % kLanes].  Logits have a row for each key and a lane for each
// query, so that a softmax is taken in all lanes at once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/tile.h"

namespace viops::decayed_attention {
namespace {

template <class A>
struct Panels {
  A* data;
  int64_t plane;

  VIOPS_INLINE Panels(A* data, int64_t plane) : data(data), plane(plane) {}
  template <class B, class = std::enable_if_t<std::is_same_v<const B, A>>>
  VIOPS_INLINE Panels(const Panels<B>& other) : data(other.data), plane(other.plane) {}

  VIOPS_INLINE A* row(int64_t r) const { return data + r * kLanes<A>; }
  VIOPS_INLINE Panels rows_from(int64_t r) const { return {row(r), plane}; }
  VIOPS_INLINE Panels panels_from(int64_t p) const { return {data + p * plane, plane}; }
};

// Vectors of a tile, and as many rows as the registers hold accumulators beside them and one factor.
constexpr int kVectors = 2;
template <int kWidth>
constexpr int kMaxRows = kVectorBytes == 64 ? 14
                         : kWidth == 2      ? 6
                                            : 12;

template <int kRows>
using Rows = std::integral_constant<int, kRows>;

// Cuts `rows` into tiles alike and calls tile(Rows<R>, first, count), count at most R.
template <int kWidth, class Tile>
VIOPS_INLINE void for_tiles(int64_t rows, const Tile& tile) {
  constexpr int kMost = kMaxRows<kWidth>, kMiddle = kMost > 6 ? 8 : 4, kFew = kMost > 6 ? 4 : 2;
  for (int64_t first = 0; first < rows;) {
    const int64_t left = rows - first, tiles = (left + kMost - 1) / kMost, share = (left + tiles - 1) / tiles;
    if (share > kMiddle) {
      tile(Rows<kMost>(), first, std::min<int64_t>(left, kMost));
      first += kMost;
    } else if (share > kFew) {
      tile(Rows<kMiddle>(), first, std::min<int64_t>(left, kMiddle));
      first += kMiddle;
    } else {
      tile(Rows<kFew>(), first, std::min<int64_t>(left, kFew));
      first += kFew;
    }
  }
}

template <class A, int kRows, int kWidth>
using Sums = Vector<A>[kRows][kWidth];

// sums[r][v] += the sum over k < depth of a[r * kRow + k * kStep] times row k of panel v of b.
template <int kRow, int kStep, class A, int kRows, int kWidth>
VIOPS_INLINE void add_products(Sums<A, kRows, kWidth>& sums, const A* a, Panels<const A> b, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, a += kStep, b.data += kLanes<A>) {
    Vector<A> row[kWidth];
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) row[v] = load<A>(b.data + v * b.plane);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const A factor = a[r * kRow];
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) sums[r][v] += factor * row[v];
    }
  }
}

// sums[r][v] += the sum over channels c of row r of a panel by panel, times row c of panel v of b.
template <class A, int kRows, int kWidth>
VIOPS_INLINE void add_channels(Sums<A, kRows, kWidth>& sums, const A* a, int64_t plane, Panels<const A> b,
                               int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes<A>, a += plane, b.data += kLanes<A> * kLanes<A>) {
    add_products<kLanes<A>, 1>(sums, a, b, std::min<int64_t>(kLanes<A>, channels - c));
  }
}

// The logits of keys [first, first + kRows): decay, plus k [keys][D] times q [D][queries].
template <class A, int kRows, int kWidth, class Decay>
VIOPS_INLINE void sum_logits(Sums<A, kRows, kWidth>& sums, Panels<const A> k, Panels<const A> q,
                             int64_t channels, const Decay& decay, int64_t first) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) sums[r][v] = decay.at(first + r, v);
  }
  add_channels<A, kRows, kWidth>(sums, k.row(first), k.plane, q, channels);
}

// Writes logits [keys][queries] and raises most[v] to the largest of them.
template <int kRows, int kWidth, class A, class Decay>
__attribute__((noinline)) void logit_tile(Panels<const A> k, Panels<const A> q, int64_t channels, Decay decay,
                                          int64_t first, int64_t count, Panels<A> logits, Vector<A>* most) {
  Sums<A, kRows, kWidth> sums;
  sum_logits<A, kRows, kWidth>(sums, k, q, channels, decay, first);
#pragma GCC unroll 4
  for (int v = 0; v < kWidth; ++v) {
    Vector<A> largest = most[v];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) break;
      store<A>(logits.data + v * logits.plane + r * kLanes<A>, sums[r][v]);
      largest = largest > sums[r][v] ? largest : sums[r][v];
    }
    most[v] = largest;
  }
}

constexpr double kLog2OfE = 1.4426950408889634;

// Writes numerators of the softmax [keys][queries] with these log-sum-exps, so that the sums are almost 1;
// adds these to sum[v].
template <int kRows, int kWidth, class A, class Decay>
__attribute__((noinline)) void attention_tile(Panels<const A> k, Panels<const A> q, int64_t channels,
                                              Decay decay, int64_t first, int64_t count,
                                              const Vector<A>* logsumexp, Panels<A> attention,
                                              Vector<A>* sum) {
  Sums<A, kRows, kWidth> sums;
  sum_logits<A, kRows, kWidth>(sums, k, q, channels, decay, first);
#pragma GCC unroll 4
  for (int v = 0; v < kWidth; ++v) {
    Vector<A> total{};  // of the tile alone: shorter sums round less
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) break;
      const Vector<A> numerators =
          exp2_of_nonpositive((sums[r][v] - logsumexp[v]) * static_cast<A>(kLog2OfE));
      store<A>(attention.data + v * attention.plane + r * kLanes<A>, numerators);
      total += numerators;
    }
    sum[v] += total;
  }
}

// Writes the gradients to the attention [keys][queries]: v [keys][Dv] times grad [Dv][queries]; adds to
// delta[v] what they give with the attention.
template <int kRows, int kWidth, class A>
__attribute__((noinline)) void gradient_tile(Panels<const A> values, Panels<const A> grad, int64_t channels,
                                             int64_t first, int64_t count, Panels<const A> attention,
                                             Panels<A> grad_attention, Vector<A>* delta) {
  Sums<A, kRows, kWidth> sums;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) sums[r][v] = Vector<A>{};
  }
  add_channels<A, kRows, kWidth>(sums, values.row(first), values.plane, grad, channels);
#pragma GCC unroll 4
  for (int v = 0; v < kWidth; ++v) {
    Vector<A> total{};
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) break;
      store<A>(grad_attention.data + v * grad_attention.plane + r * kLanes<A>, sums[r][v]);
      total += sums[r][v] * load<A>(attention.data + v * attention.plane + r * kLanes<A>);
    }
    delta[v] += total;
  }
}

// c [rows][kWidth panels] = (add: itself plus) the sum over panels p and k < depth(p) of a(p, r, k) times the
// rows of b, which go on from panel to panel, and all that times factors[r] unless null; a(p, r, k) is
// a.data[p * a.plane + r * kRow + k * kStep].
template <int kRows, int kWidth, int kRow, int kStep, class A, class Depth>
VIOPS_INLINE void product_tile(Panels<const A> a, int64_t panels, const Depth& depth, Panels<const A> b,
                               Panels<A> c, int64_t count, bool add, const A* factors) {
  Sums<A, kRows, kWidth> sums;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) sums[r][v] = Vector<A>{};
  }
  for (int64_t p = 0; p < panels; ++p) {
    add_products<kRow, kStep>(sums, a.data + p * a.plane, b, depth(p));
    b.data += depth(p) * kLanes<A>;
  }
  if (add) {  // last, so that sums are short and round less
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) sums[r][v] += load<A>(c.data + v * c.plane + r * kLanes<A>);
    }
  }
  if (factors) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) sums[r][v] *= factors[r];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r >= count) break;
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) store<A>(c.data + v * c.plane + r * kLanes<A>, sums[r][v]);
  }
}

// c [queries][C] = (add: itself plus) the transpose of a panel of a [keys][queries], times b [keys][C], each
// row times its factor unless null.
template <int kRows, int kWidth, class A>
__attribute__((noinline)) void transposed_product_tile(const A* a, int64_t keys, Panels<const A> b,
                                                       Panels<A> c, int64_t count, bool add,
                                                       const A* factors) {
  const auto depth = [=](int64_t) { return keys; };
  product_tile<kRows, kWidth, 1, kLanes<A>, A>({a, 0}, 1, depth, b, c, count, add, factors);
}

// c [keys][C] = (add: itself plus) a [keys][queries] times b [queries][C].
template <int kRows, int kWidth, class A, class Depth>
__attribute__((noinline)) void product_over_queries_tile(Panels<const A> a, int64_t panels, Depth depth,
                                                         Panels<const A> b, Panels<A> c, int64_t count,
                                                         bool add) {
  product_tile<kRows, kWidth, kLanes<A>, 1, A>(a, panels, depth, b, c, count, add, nullptr);
}

}  // namespace
}  // namespace viops::decayed_attention
