// The gradient to the filters: a product over pixels.  Local to the including file.
#pragma once

#include "integer_conv/cpu_convolve.h"

namespace viops::integer_conv {
namespace {

// Pixels of grad_y that are multiplied before their sums go into totals: columns of so many stay cached, and
// sums of so many products of 2^30 fit into the two words.  A line, a row of pixels or a piece of a long one,
// has no more of them.
constexpr int64_t kPixelsOfPart = 1792;
constexpr int64_t kPairsOfLine = kPixelsOfPart / 2;

// x as pairs of pixels that neighbours of grad_y meet: [copies, B * H + 1, pitch, channels, 2], with zeros
// left and right of it.  Place m of a row holds pixels (2 m stride + residue, and stride further), for each
// residue modulo 2 stride that a tap has: a copy.  Its last row is zero, for rows of padding.
struct Pairs {
  int64_t period, pitch, of_place, of_row, of_image, of_copy;
  explicit Pairs(const Geometry& g) {
    period = 2 * g.stride[1];
    pitch = (g.out_width + 1) / 2 + (g.kernel[1] - 1) * g.dilation[1] / period;
    of_place = 2 * g.channels, of_row = pitch * of_place, of_image = g.height * of_row;
    of_copy = g.batch * of_image + of_row;
  }
  // Of a tap across: its residue, and the place that its first pair has.
  int64_t residue(const Geometry& g, int64_t tap) const { return tap * g.dilation[1] % period; }
  int64_t place(const Geometry& g, int64_t tap) const { return tap * g.dilation[1] / period; }
  // The copy of a tap's residue: they are numbered as taps bring them.
  int64_t copy(const Geometry& g, int64_t tap) const {
    int64_t found = 0;
    for (int64_t earlier = 0; earlier < tap; ++earlier) {
      if (residue(g, earlier) == residue(g, tap)) return copy(g, earlier);
      found += is_first(g, earlier);
    }
    return found;
  }
  bool is_first(const Geometry& g, int64_t tap) const {
    for (int64_t earlier = 0; earlier < tap; ++earlier) {
      if (residue(g, earlier) == residue(g, tap)) return false;
    }
    return true;
  }
  int64_t copies(const Geometry& g) const {
    int64_t count = 0;
    for (int64_t tap = 0; tap < g.kernel[1]; ++tap) count += is_first(g, tap);
    return count;
  }
};

// to[c] = {first[c], second[c]}, null being zeros.
VIOPS_INLINE void interleave(const int16_t* first, const int16_t* second, int64_t count, int16_t* to) {
  if (first && second) {
    for (int64_t c = 0; c < count; ++c) to[2 * c] = first[c], to[2 * c + 1] = second[c];
  } else if (first) {
    for (int64_t c = 0; c < count; ++c) to[2 * c] = first[c], to[2 * c + 1] = 0;
  } else if (second) {
    for (int64_t c = 0; c < count; ++c) to[2 * c] = 0, to[2 * c + 1] = second[c];
  } else {
    std::memset(to, 0, static_cast<size_t>(count) * 4);
  }
}

inline void pair_up(const Geometry& g, const Pairs& pairs, const int16_t* x, int16_t* to, int threads) {
  const int64_t rows = g.batch * g.height;
  parallel_for(rows + 1, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int16_t* line = x + row * g.width * g.channels;
      const auto pixel = [&](int64_t column) {
        return row < rows && column >= 0 && column < g.width ? line + column * g.channels : nullptr;
      };
      for (int64_t tap = 0, copy = 0; tap < g.kernel[1]; ++tap) {
        if (!pairs.is_first(g, tap)) continue;
        int16_t* start = to + copy++ * pairs.of_copy + row * pairs.of_row;
        for (int64_t place = 0; place < pairs.pitch; ++place, start += pairs.of_place) {
          const int64_t column = place * pairs.period + pairs.residue(g, tap) - g.padding[1];
          interleave(pixel(column), pixel(column + g.stride[1]), g.channels, start);
        }
      }
    }
  });
}

// Lines of grad_y: rows of pixels, or pieces of them.
struct GradLines {
  int64_t in_row, pieces, count;  // pairs in a row, lines in a row, lines
  explicit GradLines(const Geometry& g)
      : in_row((g.out_width + 1) / 2),
        pieces((in_row + kPairsOfLine - 1) / kPairsOfLine),
        count(g.batch * g.out_height * pieces) {}
  int64_t most() const { return in_row < kPairsOfLine ? in_row : kPairsOfLine; }
  int64_t first_pair(int64_t line) const { return line % pieces * kPairsOfLine; }
  int64_t pairs(int64_t line) const {
    const int64_t left = in_row - first_pair(line);
    return left < kPairsOfLine ? left : kPairsOfLine;
  }
};

// A line as columns [pairs, columns, 2] of a block: pairs are neighbours of a row of pixels.
inline void pack_line(const Geometry& g, const GradLines& lines, int64_t line, const int16_t* grad_y,
                      int64_t first_column, int64_t real, int columns, int16_t* to) {
  const int64_t first = 2 * lines.first_pair(line), last = first + 2 * lines.pairs(line);
  const int16_t* pixel = grad_y + (line / lines.pieces * g.out_width + first) * g.filters + first_column;
  for (int64_t x = first; x < last; x += 2, to += 2 * columns, pixel += 2 * g.filters) {
    interleave(pixel, x + 1 < g.out_width ? pixel + g.filters : nullptr, real, to);
    std::memset(to + 2 * real, 0, static_cast<size_t>(columns - real) * 4);
  }
}

// Channels of a tile at a tap: neighbours in memory; each run is a line, at its own offset.
struct ChannelRows {
  const int16_t* base;
  const int64_t* offsets;
  int64_t of_place;
  VIOPS_INLINE const int16_t* at(int r, const Segment& segment) const {
    return base + offsets[segment.run] + segment.start * of_place + 2 * r;
  }
  VIOPS_INLINE int64_t step() const { return of_place; }
};

template <int kVectors>
inline void add_tile(bool fused, const ChannelRows& rows, const Segment* segments, int64_t count,
                     const int16_t* w, bool fresh, int64_t* totals) {
  Sums sums;
  if (fused) {
    multiply<kVectors, true>(rows, segments, count, w, sums);
  } else {
    multiply<kVectors, false>(rows, segments, count, w, sums);
  }
  const auto* high = reinterpret_cast<const int32_t*>(sums.high);
  const auto* low = reinterpret_cast<const int32_t*>(sums.low);
  constexpr int kCount = kRows * kVectors * kColumns;
  if (fresh) {
    for (int i = 0; i < kCount; ++i) totals[i] = int64_t(high[i]) * 65536 + low[i];
  } else {
    for (int i = 0; i < kCount; ++i) totals[i] += int64_t(high[i]) * 65536 + low[i];
  }
}

inline void weight_gradient_depthwise(const Geometry& g, const int16_t* grad_y, const int16_t* x,
                                      float factor, float shift, int64_t chain, float* grad_w, int threads) {
  parallel_for(g.taps(), threads, [&](int, int64_t begin, int64_t end) {
    const Scratch memory(g.channels * 12);
    auto* totals = reinterpret_cast<int64_t*>(memory.data());
    auto* sums = reinterpret_cast<int32_t*>(memory.data() + g.channels * 8);
    for (int64_t tap = begin; tap < end; ++tap) {
      const int64_t i = tap / g.kernel[1], j = tap % g.kernel[1];
      std::memset(memory.data(), 0, static_cast<size_t>(g.channels) * 12);
      int64_t in_chain = 0;
      const auto close = [&] {
        for (int64_t c = 0; c < g.channels; ++c) totals[c] += sums[c], sums[c] = 0;
        in_chain = 0;
      };
      for (int64_t row = 0; row < g.batch * g.out_height; ++row) {
        const int64_t b = row / g.out_height;
        const int64_t y = row % g.out_height * g.stride[0] + i * g.dilation[0] - g.padding[0];
        if (y < 0 || y >= g.height) continue;
        for (int64_t ox = 0; ox < g.out_width; ++ox) {
          const int64_t column = ox * g.stride[1] + j * g.dilation[1] - g.padding[1];
          if (column < 0 || column >= g.width) continue;
          const int16_t* grad = grad_y + (row * g.out_width + ox) * g.channels;
          const int16_t* pixel = x + ((b * g.height + y) * g.width + column) * g.channels;
          for (int64_t c = 0; c < g.channels; ++c) sums[c] += int32_t(grad[c]) * int32_t(pixel[c]);
          if (++in_chain >= chain) close();
        }
      }
      close();
      for (int64_t c = 0; c < g.channels; ++c) {
        grad_w[c * g.taps() + tap] = static_cast<float>(totals[c]) * factor * shift;
      }
    }
  });
}

inline void weight_gradient(const TensorView& grad_y_view, const TensorView& x_view, float factor,
                            float shift, const Geometry& g, int32_t limit_grad, int32_t limit_x,
                            const TensorView& grad_w_view) {
  const auto* grad_y = static_cast<const int16_t*>(grad_y_view.data);
  const auto* x = static_cast<const int16_t*>(x_view.data);
  auto* grad_w = static_cast<float*>(grad_w_view.data);
  const int64_t work = g.batch * g.out_height * g.out_width * g.filters * g.group_channels() * g.taps();
  const int threads = work < (1 << 17) ? 1 : max_threads();
  const Product product(g, Direction::forward);
  if (product.depthwise()) {
    const int64_t chain = ((int64_t(1) << 31) - 1) / (int64_t(limit_grad) * limit_x);
    return weight_gradient_depthwise(g, grad_y, x, factor, shift, chain, grad_w, threads);
  }
  const Pairs pairs(g);
  // a last tile reads rows that are none
  const Scratch paired((pairs.copies(g) * pairs.of_copy + 2 * kRows) * 2);
  auto* const x_pairs = reinterpret_cast<int16_t*>(paired.data());
  std::memset(x_pairs + pairs.copies(g) * pairs.of_copy, 0, 4 * kRows);
  pair_up(g, pairs, x, x_pairs, threads);

  const GradLines lines(g);
  int64_t lines_of_part = kPixelsOfPart / (2 * lines.most());
  if (lines_of_part > lines.count) lines_of_part = lines.count;
  const int64_t parts = (lines.count + lines_of_part - 1) / lines_of_part;
  const int64_t of_columns = padded(lines_of_part * lines.most() * kBlock * 4);
  const int64_t of_segments = padded(lines_of_part * lines.most() * static_cast<int64_t>(sizeof(Segment)));
  const int64_t of_part = kCacheLine + of_segments + of_columns;
  const int64_t blocks = product.groups * product.blocks;
  const int64_t tiles = (product.depth + kRows - 1) / kRows, units = tiles * g.taps();
  constexpr int64_t kOfUnit = kRows * kBlock;
  const int64_t kept = parts == 1 ? threads * g.taps() : blocks * units;  // totals
  const int64_t of_offsets = padded(g.kernel[0] * lines.count * 8);
  const Scratch memory(blocks * parts * of_part + of_offsets + kept * kOfUnit * 8);
  char* const packed = memory.data();
  // [kernel down, lines] to the pairs that a line's first one meets at a tap
  auto* offsets = reinterpret_cast<int64_t*>(packed + blocks * parts * of_part);
  auto* totals = offsets + of_offsets / 8;
  for (int64_t i = 0; i < g.kernel[0]; ++i) {
    for (int64_t line = 0; line < lines.count; ++line) {
      const int64_t row = line / lines.pieces, b = row / g.out_height;
      const int64_t y = row % g.out_height * g.stride[0] + i * g.dilation[0] - g.padding[0];
      const bool inside = y >= 0 && y < g.height;
      const int64_t of_x = inside ? b * g.height + y : g.batch * g.height;
      offsets[i * lines.count + line] = of_x * pairs.of_row + lines.first_pair(line) * pairs.of_place;
    }
  }
  parallel_for(blocks * parts, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / blocks, block = item % blocks, of_group = block % product.blocks;
      const int64_t first = part * lines_of_part;
      const int64_t last = first + lines_of_part < lines.count ? first + lines_of_part : lines.count;
      const int columns = product.vectors(of_group) * kColumns;
      const int64_t rest = product.columns - of_group * kBlock, real = rest < columns ? rest : columns;
      const int64_t first_column = block / product.blocks * product.columns + of_group * kBlock;
      char* start = packed + item * of_part;
      auto* to = reinterpret_cast<int16_t*>(start + kCacheLine + of_segments);
      Planner planner(reinterpret_cast<Segment*>(start + kCacheLine), limit_x);
      for (int64_t line = first; line < last; ++line) {
        pack_line(g, lines, line, grad_y, first_column, real, columns, to);
        planner.add(static_cast<int32_t>(line - first), lines.pairs(line), to, columns);
        to += lines.pairs(line) * 2 * columns;
      }
      const int64_t count = planner.count();
      std::memcpy(start, &count, sizeof(count));
    }
  });

  const bool fused = has_fused();
  // The sums of a unit, [kRows, columns], of a part: unit = (block * tiles + tile) * taps + tap.
  const auto add_part = [&](int64_t part, int64_t unit, int64_t* total) {
    const int64_t tap = unit % g.taps(), tile = unit / g.taps() % tiles, block = unit / g.taps() / tiles;
    const int64_t i = tap / g.kernel[1], j = tap % g.kernel[1];
    const int64_t channel = block / product.blocks * product.depth + tile * kRows;
    const int16_t* base =
        x_pairs + pairs.copy(g, j) * pairs.of_copy + pairs.place(g, j) * pairs.of_place + 2 * channel;
    const ChannelRows channel_rows = {base, offsets + i * lines.count + part * lines_of_part, pairs.of_place};
    const char* start = packed + (part * blocks + block) * of_part;
    int64_t count;
    std::memcpy(&count, start, sizeof(count));
    const auto* segments = reinterpret_cast<const Segment*>(start + kCacheLine);
    const auto* w = reinterpret_cast<const int16_t*>(start + kCacheLine + of_segments);
    switch (product.vectors(block % product.blocks)) {
      case 1: return add_tile<1>(fused, channel_rows, segments, count, w, part == 0, total);
#if defined(__AVX512F__)
      case 3: return add_tile<3>(fused, channel_rows, segments, count, w, part == 0, total);
      case 4: return add_tile<4>(fused, channel_rows, segments, count, w, part == 0, total);
#endif
      default: return add_tile<2>(fused, channel_rows, segments, count, w, part == 0, total);
    }
  };
  // The totals [taps, kRows * kBlock] of a tile as grad_w [columns, kRows, taps].
  const auto write = [&](int64_t item, const int64_t* of_tile) {
    const int64_t tile = item % tiles, block = item / tiles, group = block / product.blocks;
    const int64_t columns = product.vectors(block % product.blocks) * kColumns;
    const int64_t first = block % product.blocks * kBlock, rest = product.depth - tile * kRows;
    for (int64_t c = 0; c < columns && first + c < product.columns; ++c) {
      float* to = grad_w + ((group * product.columns + first + c) * product.depth + tile * kRows) * g.taps();
      for (int64_t r = 0; r < kRows && r < rest; ++r) {
        for (int64_t tap = 0; tap < g.taps(); ++tap) {
          *to++ = static_cast<float>(of_tile[tap * kOfUnit + r * columns + c]) * factor * shift;
        }
      }
    }
  };
  if (parts == 1) {
    parallel_for(blocks * tiles, threads, [&](int thread, int64_t begin, int64_t end) {
      int64_t* of_tile = totals + thread * g.taps() * kOfUnit;
      for (int64_t item = begin; item < end; ++item) {
        for (int64_t tap = 0; tap < g.taps(); ++tap)
          add_part(0, item * g.taps() + tap, of_tile + tap * kOfUnit);
        write(item, of_tile);
      }
    });
    return;
  }
  parallel_for(blocks * units, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t unit = begin; unit < end; ++unit) add_part(part, unit, totals + unit * kOfUnit);
    }
  });
  parallel_for(blocks * tiles, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) write(item, totals + item * g.taps() * kOfUnit);
  });
}

}  // namespace
}  // namespace viops::integer_conv
