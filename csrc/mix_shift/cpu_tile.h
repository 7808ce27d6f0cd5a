// Depthwise convolution in registers: a tile of rows, and the sums of its gradient to the filters.
//
// Rows of images lie in scratch memory with zeros around, column after column, kLanes or fewer channels side
// by side in each column; a vector is several columns then, or one, of as many channels.  So one kernel
// serves planes (one channel) and channels_last.
#pragma once

#include <algorithm>

#include "common/rows.h"

namespace viops::mix_shift {
namespace {

constexpr int kMostTileRows = kVectorBytes == 64 ? 14 : 8;
constexpr int64_t kNearBytes = 16 << 10;

// What a tile of rows is convolved from: the other direction has another.
template <class A>
struct Source {
  const A* rows;  // [tile rows + k - 1][row]: columns begin k/2 before the result's
  const A* taps;  // [k columns][k rows][kLanes]
};

template <class A>
struct Tile {
  Source<A> sources[2];
  int num_sources;
  int64_t kernel;   // k
  int64_t row;      // elements between the sources' rows
  int64_t lanes;    // elements of a column
  int64_t vectors;  // of a row of the result
  const A* bias;    // [kLanes]
  A* out;           // [tile rows][out_row]
  int64_t out_row;
};

// Keeps loads of one column of taps from being hoisted above those before it: GCC would spill the sums.
VIOPS_INLINE void in_order() { __asm__ volatile("" ::: "memory"); }

// How many vectors of a row are made at a time: with two, additions need not wait for each other.
constexpr int streams_of(int rows) { return kVectorBytes == 64 && rows <= 8 ? 2 : 1; }

// What sums are made of: kRows + k - 1 vectors, `row` apart, and taps, for each of the k columns.
template <class A>
struct Stream {
  const A* from;
  const A* taps;
};

// Adds to sums what the streams give.  kKernel is k, or 0: any.
template <class A, int kKernel, int kRows, int kCount>
VIOPS_INLINE void accumulate(const Tile<A>& tile, Stream<A> (&streams)[kCount],
                             Vector<A> (&sums)[kCount][kRows]) {
  const int64_t k = kKernel ? kKernel : tile.kernel, row = tile.row;
  for (int64_t j = 0; j < k; ++j) {
#pragma GCC unroll 2
    for (int s = 0; s < kCount; ++s) {
      const A* const from = streams[s].from;
      const A* const taps = streams[s].taps;
      if constexpr (kKernel) {
#pragma GCC unroll 20
        for (int t = 0; t < kRows + kKernel - 1; ++t) {
          const Vector<A> values = load<A>(from + t * row);
#pragma GCC unroll 8
          for (int i = 0; i < kKernel; ++i) {
            if (t - i >= 0 && t - i < kRows) sums[s][t - i] += load<A>(taps + i * kLanes<A>) * values;
          }
        }
      } else {
        for (int64_t i = 0; i < k; ++i) {
          const Vector<A> tap = load<A>(taps + i * kLanes<A>);
#pragma GCC unroll 14
          for (int r = 0; r < kRows; ++r) sums[s][r] += tap * load<A>(from + (r + i) * row);
        }
      }
      streams[s].from += tile.lanes;
      streams[s].taps += k * kLanes<A>;
      in_order();
    }
  }
}

// Vectors v, v + 1, ... of a tile.
template <class A, int kKernel, int kRows, int kCount>
VIOPS_INLINE void convolve_vectors(const Tile<A>& tile, int64_t v) {
  const Vector<A> bias = load<A>(tile.bias);
  Vector<A> sums[kCount][kRows];
#pragma GCC unroll 2
  for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) sums[c][r] = bias;
  }
  for (int s = 0; s < tile.num_sources; ++s) {
    Stream<A> streams[kCount];
    for (int c = 0; c < kCount; ++c) {
      streams[c] = {tile.sources[s].rows + (v + c) * kLanes<A>, tile.sources[s].taps};
    }
    accumulate<A, kKernel, kRows, kCount>(tile, streams, sums);
  }
#pragma GCC unroll 2
  for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) store<A>(tile.out + r * tile.out_row + (v + c) * kLanes<A>, sums[c][r]);
  }
}

template <class A, int kKernel, int kRows>
__attribute__((noinline)) void convolve_tile(const Tile<A>& tile) {
  constexpr int kStreams = streams_of(kRows);
  int64_t v = 0;
  for (; v + kStreams <= tile.vectors; v += kStreams) convolve_vectors<A, kKernel, kRows, kStreams>(tile, v);
  for (; v < tile.vectors; ++v) convolve_vectors<A, kKernel, kRows, 1>(tile, v);
}

template <class A, int kRows>
void convolve_rows(const Tile<A>& tile) {
  switch (tile.kernel) {
    case 1: return convolve_tile<A, 1, kRows>(tile);
    case 3: return convolve_tile<A, 3, kRows>(tile);
    case 5: return convolve_tile<A, 5, kRows>(tile);
    case 7: return convolve_tile<A, 7, kRows>(tile);
    default: return convolve_tile<A, 0, kRows>(tile);
  }
}

// How many rows the next tile has, `left` being still to come: those beyond are not read by anybody, but the
// sources and the result must have room for them.  Images of 7, 14, 28, 56 rows are usual.
inline int tile_rows(int64_t left) {
  if (kMostTileRows == 14 && left >= 12 && left != 15 && left != 16) return 14;
  return left <= 4 ? 4 : left == 7 || left == 14 ? 7 : 8;
}

// Memory that a thread will come to next, fetched while it computes: planes and stripes are too short for the
// machine to see where the next one begins.
struct Ahead {
  const char* place[2] = {};  // to be read, to be written; or null
  int64_t bytes = 0;          // from each place on
  int64_t share = 0;          // of a step
  bool is_near = false;       // into the first cache, and not the second: it is little

  // `steps` are to come until it is needed.
  Ahead(const void* read, const void* written, int64_t bytes, int64_t steps)
      : place{static_cast<const char*>(read), static_cast<const char*>(written)},
        bytes(bytes),
        share(padded((bytes + steps - 1) / steps)),
        is_near(bytes <= kNearBytes) {}
  Ahead() = default;

  VIOPS_INLINE void step() { is_near ? fetch<3>() : fetch<2>(); }

 private:
  template <int kLocality>
  VIOPS_INLINE void fetch() {
    const int64_t count = share < bytes ? share : bytes;
    for (int64_t i = 0; place[0] && i < count; i += kCacheLine)
      __builtin_prefetch(place[0] + i, 0, kLocality);
    for (int64_t i = 0; place[1] && i < count; i += kCacheLine) __builtin_prefetch(place[1] + i, 1, 2);
    if (place[0]) place[0] += count;
    if (place[1]) place[1] += count;
    bytes -= count;
  }
};

// `rows` rows of a result, tile after tile; done(first, count) is called with the rows of each.
template <class A, class Done>
VIOPS_INLINE void convolve(Tile<A> tile, int64_t rows, Ahead& ahead, const Done& done) {
  for (int64_t first = 0; first < rows;) {
    const int count = tile_rows(rows - first);
    ahead.step();
    switch (count) {
      case 4: convolve_rows<A, 4>(tile); break;
      case 7: convolve_rows<A, 7>(tile); break;
      case 8: convolve_rows<A, 8>(tile); break;
      default: convolve_rows<A, kMostTileRows>(tile); break;
    }
    for (int s = 0; s < tile.num_sources; ++s) tile.sources[s].rows += count * tile.row;
    const int64_t moved = done(first, std::min<int64_t>(count, rows - first));
    tile.out += moved * tile.out_row;
    first += count;
  }
}

// The gradient to the filters over a slab of rows; grads and rows beyond the slab's are zero.
template <class A>
struct TapSums {
  const A* rows;   // [slab rows + k - 1][row], as in Source
  const A* grads;  // [slab rows][grad_row]
  int64_t kernel, row, grad_row, lanes, vectors;
  A* sums;  // [k columns][k rows][kLanes]: added to
};

// Columns of taps that are summed at a time: as many sums as hide the latency of an addition.
constexpr int columns_at_once(int kernel) {
  const bool many_registers = kVectorBytes == 64;
  return kernel == 3 ? 3 : kernel == 5 ? (many_registers ? 3 : 2) : kernel == 7 && many_registers ? 2 : 1;
}

template <class A, int kKernel, int kColumns, int kRows>
__attribute__((noinline)) void sum_columns(const TapSums<A>& t, int64_t first_column, int64_t slab_rows) {
  Vector<A> sums[kColumns][kKernel] = {};
  for (int64_t h = 0; h < slab_rows; h += kRows) {
    const A* from = t.rows + h * t.row + first_column * t.lanes;
    const A* grads = t.grads + h * t.grad_row;
    for (int64_t v = 0; v < t.vectors; ++v, from += kLanes<A>, grads += kLanes<A>) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows + kKernel - 1; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
          const Vector<A> values = load<A>(from + r * t.row + j * t.lanes);
#pragma GCC unroll 8
          for (int i = 0; i < kKernel; ++i) {
            if (r - i >= 0 && r - i < kRows) sums[j][i] += load<A>(grads + (r - i) * t.grad_row) * values;
          }
        }
      }
      in_order();
    }
  }
  A* out = t.sums + first_column * kKernel * kLanes<A>;
#pragma GCC unroll 4
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kKernel; ++i, out += kLanes<A>) store<A>(out, load<A>(out) + sums[j][i]);
  }
}

template <class A, int kKernel, int kRows>
void sum_taps_of(const TapSums<A>& t, int64_t slab_rows) {
  constexpr int kColumns = columns_at_once(kKernel);
  int64_t j = 0;
  for (; j + kColumns <= kKernel; j += kColumns) {
    sum_columns<A, kKernel, kColumns, kRows>(t, j, slab_rows);
  }
  if constexpr (kKernel % kColumns != 0) {
    sum_columns<A, kKernel, kKernel % kColumns, kRows>(t, j, slab_rows);
  }
}

// One tap at a time, the sums of several rows side by side: kernels of one tap, and of any size.
template <class A>
void sum_any_taps(const TapSums<A>& t, int64_t slab_rows) {
  constexpr int kRows = 4;
  for (int64_t j = 0; j < t.kernel; ++j) {
    for (int64_t i = 0; i < t.kernel; ++i) {
      Vector<A> sums[kRows] = {};
      for (int64_t h = 0; h < slab_rows; h += kRows) {
        const A* from = t.rows + (h + i) * t.row + j * t.lanes;
        const A* grads = t.grads + h * t.grad_row;
        for (int64_t v = 0; v < t.vectors; ++v, from += kLanes<A>, grads += kLanes<A>) {
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            sums[r] += load<A>(grads + r * t.grad_row) * load<A>(from + r * t.row);
          }
        }
      }
      A* out = t.sums + (j * t.kernel + i) * kLanes<A>;
      store<A>(out, load<A>(out) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
  }
}

// How many rows of grads sum_taps reads at most for `rows` of them: those beyond are to be zero.
inline int64_t summed_rows(int64_t rows) { return (rows + 7) / 8 * 8; }

template <class A>
void sum_taps(const TapSums<A>& t, int64_t rows) {
  const bool by_sevens = rows % 7 == 0 && rows % 8 != 0;  // no row is multiplied in vain
  const int64_t eights = summed_rows(rows), fours = (rows + 3) / 4 * 4;
  switch (t.kernel) {
    case 3: return by_sevens ? sum_taps_of<A, 3, 7>(t, rows) : sum_taps_of<A, 3, 8>(t, eights);
    case 5: return by_sevens ? sum_taps_of<A, 5, 7>(t, rows) : sum_taps_of<A, 5, 8>(t, eights);
    case 7: return by_sevens ? sum_taps_of<A, 7, 7>(t, rows) : sum_taps_of<A, 7, 8>(t, eights);
    default: return sum_any_taps(t, fours);
  }
}

}  // namespace
}  // namespace viops::mix_shift
