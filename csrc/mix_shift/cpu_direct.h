// Both directions of a block where the image lies, without a copy: of channels_last images of A, blocks of
// kLanes channels and kernels of up to 7.
#pragma once

#include "mix_shift/cpu_plan.h"

namespace viops::mix_shift {
namespace {

constexpr int kMostDirectKernel = 7;

// What one direction of a tile is made of.
template <class A>
struct Direct {
  const A*
      rows[kMostTileRows + kMostDirectKernel - 1];  // from k/2 above the tile on; zeros outside the image
  int64_t ahead,
      back;       // a result at column w is made round w + ahead, whose values are `back` columns before
  const A* taps;  // [k columns][k rows][kLanes]
};

template <class A>
struct DirectTile {
  Direct<A> sources[2];
  int num_sources;
  int64_t width, column;  // elements from one column to the next
  const A* bias;          // [kLanes]
  Channels<A> to;
  int64_t rows;  // of the tile, that are stored
};

template <class A, int kKernel, int kRows>
__attribute__((noinline)) void convolve_direct(const DirectTile<A>& tile) {
  constexpr int64_t kMargin = kKernel / 2;
  const int64_t width = tile.width;
  const Vector<A> bias = load<A>(tile.bias);
  for (int64_t w = 0; w < width; ++w) {
    Vector<A> sums[kRows];
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) sums[r] = bias;
    for (int s = 0; s < tile.num_sources; ++s) {
      const Direct<A>& source = tile.sources[s];
      const int64_t centre = w + source.ahead < width ? w + source.ahead : w + source.ahead - width;
      const int64_t first = std::max<int64_t>(0, kMargin - centre);
      const int64_t last = std::min<int64_t>(kKernel, width + kMargin - centre);
      int64_t column = centre + first - kMargin - source.back;
      if (column < 0) column += width;
      const A* taps = source.taps + first * kKernel * kLanes<A>;
      for (int64_t j = first; j < last; ++j, taps += kKernel * kLanes<A>) {
        const int64_t place = column * tile.column;
#pragma GCC unroll 20
        for (int t = 0; t < kRows + kKernel - 1; ++t) {
          const Vector<A> values = load<A>(source.rows[t] + place);
#pragma GCC unroll 8
          for (int i = 0; i < kKernel; ++i) {
            if (t - i >= 0 && t - i < kRows) sums[t - i] += load<A>(taps + i * kLanes<A>) * values;
          }
        }
        if (++column == width) column = 0;
        in_order();
      }
    }
    A* to = tile.to.data + w * tile.to.column;
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r, to += tile.to.row) {
      if (r < tile.rows) store<A>(to, sums[r]);
    }
  }
}

template <class A, int kRows>
void convolve_direct_rows(const DirectTile<A>& tile, int64_t kernel) {
  switch (kernel) {
    case 1: return convolve_direct<A, 1, kRows>(tile);
    case 3: return convolve_direct<A, 3, kRows>(tile);
    case 5: return convolve_direct<A, 5, kRows>(tile);
    default: return convolve_direct<A, 7, kRows>(tile);
  }
}

// Whether a block can be convolved so.  Where a norm follows it is not: the values that the norm is to read
// were measured to come later from the caches than after the blocks' own copies (1.5 ms for 1.3 ms).
template <class A, class T, class U>
bool is_direct(const Plan<A>& plan, const Block& block, const Channels<const T>& image,
               const Channels<U>& to) {
  return !plan.normed && !plan.by_blocks && std::is_same_v<T, A> && std::is_same_v<U, A> &&
         block.count == kLanes<A> && image.channel == 1 && image.column == plan.channels && to.channel == 1 &&
         block.kernel <= kMostDirectKernel;
}

// Where a source's rows come from: the row of the tile's first, and by how many rows the image is rolled.
struct Rolled {
  int64_t first, down, ahead, back;
};

// `rows` rows, to `to`.  sources(done) gives those of the tile that begins so many rows further down, and how
// many rows follow each other in both.
template <class A, class Sources>
void convolve_in_place(const Plan<A>& plan, const Block& block, const Channels<const A>& image, const A* bias,
                       const A* table, const A* outside, int64_t rows, const Channels<A>& to, Ahead& ahead,
                       const Sources& sources) {
  const int64_t k = block.kernel;
  DirectTile<A> tile = {{}, block.num_sources, plan.width, image.column, bias, to, 0};
  for (int64_t done = 0; done < rows; done += tile.rows) {
    Rolled rolled[2];
    const int64_t left = std::min(rows - done, sources(done, rolled));
    const int count = tile_rows(left);
    tile.rows = std::min<int64_t>(count, left);
    tile.to = to.below(done);
    for (int s = 0; s < tile.num_sources; ++s) {
      Direct<A>& source = tile.sources[s];
      source.ahead = rolled[s].ahead, source.back = rolled[s].back;
      source.taps = table + s * k * k * kLanes<A>;
      for (int64_t t = 0; t < count + k - 1; ++t) {
        const int64_t h = rolled[s].first + t - k / 2;
        const int64_t from = h < rolled[s].down ? h - rolled[s].down + plan.height : h - rolled[s].down;
        source.rows[t] = h < 0 || h >= plan.height ? outside : image.data + from * image.row;
      }
    }
    ahead.step();
    switch (count) {
      case 4: convolve_direct_rows<A, 4>(tile, k); break;
      case 7: convolve_direct_rows<A, 7>(tile, k); break;
      case 8: convolve_direct_rows<A, 8>(tile, k); break;
      default: convolve_direct_rows<A, kMostTileRows>(tile, k); break;
    }
  }
}

}  // namespace
}  // namespace viops::mix_shift
