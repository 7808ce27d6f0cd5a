// Filters in the order in which the tiles read them.  Local to the including file.
#pragma once

#include "common/rows.h"
#include "integer_conv/cpu_tile.h"
#include "integer_conv/integer_conv.h"

namespace viops::integer_conv {
namespace {

// One axis of a convolution as a product reads it: result places first + t * spread, t < count, take source
// places t * step + offset(tap), for the taps first_tap + n * tap_step, n < taps.
struct Axis {
  int64_t first, spread, count, step, taps, first_tap, tap_step, offset0, offset_step;
  int64_t offset(int64_t n) const { return offset0 + n * offset_step; }
  int64_t least() const { return offset_step < 0 ? offset(taps - 1) : offset0; }
  int64_t most() const { return offset_step < 0 ? offset0 : offset(taps - 1); }
};

inline int64_t gcd(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b, b = rest;
  }
  return a;
}

inline int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }

// Of y from x there is one product; a gradient to x is one for each remainder of places by the stride that
// taps reach: along an axis the first taps reach them all, one each.
inline int64_t phases_of(const Geometry& g, Direction direction, int axis) {
  if (direction == Direction::forward) return 1;
  const int64_t remainders = g.stride[axis] / gcd(g.stride[axis], g.dilation[axis]);
  return g.kernel[axis] < remainders ? g.kernel[axis] : remainders;
}
inline int64_t phases_of(const Geometry& g, Direction direction) {
  return phases_of(g, direction, 0) * phases_of(g, direction, 1);
}

inline Axis axis_of(const Geometry& g, Direction direction, int axis, int64_t first_tap) {
  const int64_t size = axis ? g.width : g.height, out = axis ? g.out_width : g.out_height;
  const int64_t stride = g.stride[axis], padding = g.padding[axis], dilation = g.dilation[axis];
  if (direction == Direction::forward) {
    return {0, 1, out, stride, g.kernel[axis], 0, 1, -padding, dilation};
  }
  // x place = first + t * stride takes y place (first + padding - tap * dilation) / stride + t, where whole
  Axis found;
  found.first = floor_mod(first_tap * dilation - padding, stride), found.spread = stride, found.step = 1;
  found.count = size > found.first ? (size - found.first + stride - 1) / stride : 0;
  found.first_tap = first_tap, found.tap_step = stride / gcd(stride, dilation);
  found.taps = (g.kernel[axis] - first_tap + found.tap_step - 1) / found.tap_step;
  found.offset0 = (found.first + padding - first_tap * dilation) / stride;
  found.offset_step = -dilation * found.tap_step / stride;
  return found;
}

// Sizes of a product: depth is that of the source's channels, columns the result's.
struct Product {
  int64_t groups, depth, pairs, columns, blocks;
  Product(const Geometry& g, Direction direction) : groups(g.groups) {
    const bool forward = direction == Direction::forward;
    depth = forward ? g.group_channels() : g.group_filters();
    columns = forward ? g.group_filters() : g.group_channels();
    pairs = (depth + 1) / 2;
    blocks = (columns + kBlock - 1) / kBlock;
  }
  // Whether each group is one channel: then there is nothing to sum over but taps.
  bool depthwise() const { return depth == 1 && columns == 1; }
  int vectors(int64_t block) const {
    const int64_t rest = columns - block * kBlock;
    return static_cast<int>(rest >= kBlock ? kMostVectors : (rest + kColumns - 1) / kColumns);
  }
};

// A block of columns of a phase in memory: the count of segments, they, and w [taps, pairs, columns, 2].
struct PackedBlock {
  static constexpr int64_t kHeader = 64;
  static int64_t segment_bytes(int64_t taps, const Product& p) {
    return padded(taps * p.pairs * static_cast<int64_t>(sizeof(Segment)));
  }
  static int64_t bytes(int64_t taps, const Product& p, int vectors) {
    return kHeader + segment_bytes(taps, p) + padded(taps * p.pairs * vectors * kColumns * 4);
  }
};

// Where the blocks of a phase begin.
inline int64_t phase_bytes(int64_t taps, const Product& p) {
  const int64_t whole = PackedBlock::bytes(taps, p, kMostVectors);
  return p.groups * ((p.blocks - 1) * whole + PackedBlock::bytes(taps, p, p.vectors(p.blocks - 1)));
}
inline int64_t block_offset(int64_t taps, const Product& p, int64_t group, int64_t block) {
  const int64_t whole = PackedBlock::bytes(taps, p, kMostVectors);
  return group * (phase_bytes(taps, p) / p.groups) + block * whole;
}

inline int64_t packed_bytes(const Geometry& g, Direction direction) {
  const Product product(g, direction);
  // a depthwise product reads w [taps, channels] and how many taps make a chain
  if (product.depthwise()) return padded(g.taps() * g.channels * 2) + PackedBlock::kHeader;
  int64_t bytes = 0;
  for (int64_t phase = 0; phase < phases_of(g, direction); ++phase) {
    const int64_t across = phases_of(g, direction, 1);
    bytes += phase_bytes(
        axis_of(g, direction, 0, phase / across).taps * axis_of(g, direction, 1, phase % across).taps,
        product);
  }
  return bytes;
}

// w [taps of the phase, pairs, columns, 2] of a block of columns; what lies beyond is zero.
inline void pack_block(const int16_t* w, const Geometry& g, Direction direction, const Axis& down,
                       const Axis& across, int64_t group, int64_t first_column, int columns, int16_t* to) {
  const Product product(g, direction);
  const bool forward = direction == Direction::forward;
  const int64_t taps = g.taps(), of_filter = g.group_channels() * taps;
  const int64_t by_column = forward ? of_filter : taps, by_depth = forward ? taps : of_filter;
  const int64_t rest = product.columns - first_column;
  const int real = static_cast<int>(rest < columns ? rest : columns);
  w += group * g.group_filters() * of_filter + first_column * by_column;
  for (int64_t n = 0; n < down.taps; ++n) {
    for (int64_t m = 0; m < across.taps; ++m) {
      const int64_t i = down.first_tap + n * down.tap_step, j = across.first_tap + m * across.tap_step;
      const int16_t* of_tap = w + i * g.kernel[1] + j;
      for (int64_t pair = 0; pair < product.pairs; ++pair, to += 2 * columns) {
        const int16_t* first = of_tap + 2 * pair * by_depth;
        const bool whole = 2 * pair + 1 < product.depth;
        for (int c = 0; c < real; ++c) {
          to[2 * c] = first[c * by_column];
          to[2 * c + 1] = whole ? first[c * by_column + by_depth] : int16_t(0);
        }
        for (int c = 2 * real; c < 2 * columns; ++c) to[c] = 0;
      }
    }
  }
}

inline void pack(const TensorView& w_view, const Geometry& g, Direction direction, int32_t limit,
                 void* packed) {
  const Product product(g, direction);
  const auto* w = static_cast<const int16_t*>(w_view.data);
  auto* memory = static_cast<char*>(packed);
  if (product.depthwise()) {
    auto* to = reinterpret_cast<int16_t*>(memory + PackedBlock::kHeader);
    int64_t largest = 1;
    for (int64_t c = 0; c < g.channels; ++c) {
      for (int64_t tap = 0; tap < g.taps(); ++tap) {
        const int16_t value = w[c * g.taps() + tap];
        to[tap * g.channels + c] = value;
        const int64_t size = value < 0 ? -int64_t(value) : int64_t(value);
        largest = size > largest ? size : largest;
      }
    }
    const int64_t chain = ((int64_t(1) << 31) - (1 << 16)) / (largest * limit);  // at least 1
    std::memcpy(memory, &chain, sizeof(chain));
    return;
  }
  const int threads = g.taps() * g.filters * g.group_channels() < (1 << 15) ? 1 : max_threads();
  for (int64_t phase = 0; phase < phases_of(g, direction); ++phase) {
    const Axis down = axis_of(g, direction, 0, phase / phases_of(g, direction, 1));
    const Axis across = axis_of(g, direction, 1, phase % phases_of(g, direction, 1));
    const int64_t taps = down.taps * across.taps;
    parallel_for(product.groups * product.blocks, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / product.blocks, block = item % product.blocks;
        const int columns = product.vectors(block) * kColumns;
        char* start = memory + block_offset(taps, product, group, block);
        auto* segments = reinterpret_cast<Segment*>(start + PackedBlock::kHeader);
        auto* to = reinterpret_cast<int16_t*>(start + PackedBlock::kHeader +
                                              PackedBlock::segment_bytes(taps, product));
        pack_block(w, g, direction, down, across, group, block * kBlock, columns, to);
        Planner planner(segments, limit);
        for (int64_t tap = 0; tap < taps; ++tap) {
          planner.add(static_cast<int32_t>(tap), product.pairs, to + tap * product.pairs * 2 * columns,
                      columns);
        }
        const int64_t count = planner.count();
        std::memcpy(start, &count, sizeof(count));
      }
    });
    memory += phase_bytes(taps, product);
  }
}

}  // namespace
}  // namespace viops::integer_conv
