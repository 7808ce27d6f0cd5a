// y from x, and the gradient to x from that to y: one product for each phase.  Local to the including file.
#pragma once

#include "integer_conv/cpu_pack.h"

namespace viops::integer_conv {
namespace {

// Whether multiply_add can be fused: AVX-512 VNNI.
inline bool has_fused() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Sums become floats and go where they belong.
struct Out {
  float factor, shift;
  bool wide;
  bool relu;
  bool stream;            // store past the caches: pixels are whole vectors
  const float* gain;      // [columns] of the block, or null
  const float* bias;      // the same
  const float* residual;  // as to, or null
  float* to;              // the result at its pixel 0 and the block's first column
  int64_t channels;       // of the result
};

// float32 of high * 2^16 + low, rounded once.
inline float rounded(int32_t high, int32_t low) {
  return static_cast<float>(static_cast<double>(high) * 65536.0 + static_cast<double>(low));
}

VIOPS_INLINE Floats to_floats(const Out& out, Ints high, Ints low) {
  high += low >> 16;
  low &= 0xffff;
  Floats sum;
  if (__builtin_expect(out.wide, 0)) {
    for (int i = 0; i < kColumns; ++i) sum[i] = rounded(high[i], low[i]);
  } else {  // both are floats exactly, and so is the product
    sum = __builtin_convertvector(high, Floats) * 65536.0f + __builtin_convertvector(low, Floats);
  }
  return sum * out.factor * out.shift;
}

// Stores the tile's rows at pixels[r]; `columns` of the last vector may be beyond.  Returns the larger of
// `largest` and the magnitudes, lane by lane.
template <int kVectors>
VIOPS_INLINE Ints finish(const Out& out, const Sums& sums, const int64_t* pixels, int rows, int64_t columns,
                         Ints largest) {
  for (int r = 0; r < rows; ++r) {
    float* to = out.to + pixels[r] * out.channels;
    const float* residual = out.residual ? out.residual + pixels[r] * out.channels : nullptr;
    for (int v = 0; v < kVectors; ++v) {
      Floats value = to_floats(out, sums.high[r * kVectors + v], sums.low[r * kVectors + v]);
      const int64_t rest = columns - v * kColumns;
      if (rest >= kColumns) {
        Floats other;
        if (out.gain) {
          std::memcpy(&other, out.gain + v * kColumns, sizeof(other));
          value *= other;
        }
        if (out.bias) {
          std::memcpy(&other, out.bias + v * kColumns, sizeof(other));
          value += other;
        }
        if (residual) {
          std::memcpy(&other, residual + v * kColumns, sizeof(other));
          value += other;
        }
        if (out.relu) value = value < 0 ? Floats{} : value;  // NaN and -0 stay, as in torch's
        if (out.stream) {
          stream_bytes<kVectorBytes>(to + v * kColumns, &value);
        } else {
          std::memcpy(to + v * kColumns, &value, sizeof(value));
        }
      } else {
        for (int c = 0; c < kColumns; ++c) {
          if (c >= rest) {
            value[c] = 0;
            continue;
          }
          if (out.gain) value[c] *= out.gain[v * kColumns + c];
          if (out.bias) value[c] += out.bias[v * kColumns + c];
          if (residual) value[c] += residual[v * kColumns + c];
          if (out.relu && value[c] < 0) value[c] = 0;
          to[v * kColumns + c] = value[c];
        }
      }
      const Ints size = bit_cast<Ints>(value) & 0x7fffffff;  // in their order, then infinity, then NaN
      largest = size > largest ? size : largest;
    }
  }
  return largest;
}

// Pointers of a tile: run n of row r.
struct Table {
  const int16_t* const* runs;  // [taps, kRows]
  VIOPS_INLINE const int16_t* at(int r, const Segment& segment) const {
    return runs[segment.run * kRows + r] + 2 * int64_t(segment.start);
  }
  static constexpr int64_t step() { return 2; }
};

template <int kVectors>
inline Ints tile(bool fused, const Table& table, const char* block, int64_t segment_bytes, const Out& out,
                 const int64_t* pixels, int rows, int64_t columns, Ints largest) {
  int64_t count;
  std::memcpy(&count, block, sizeof(count));
  const auto* segments = reinterpret_cast<const Segment*>(block + PackedBlock::kHeader);
  const auto* w = reinterpret_cast<const int16_t*>(block + PackedBlock::kHeader + segment_bytes);
  Sums sums;
  if (fused) {
    multiply<kVectors, true>(table, segments, count, w, sums);
  } else {
    multiply<kVectors, false>(table, segments, count, w, sums);
  }
  return finish<kVectors>(out, sums, pixels, rows, columns, largest);
}

// One phase: places down x across of all images.
struct Phase {
  const Geometry& g;
  const Product& product;
  Axis down, across;
  int64_t taps;
  const char* packed;
  const int16_t* from;  // [B, FH, FW, groups * depth]
  const int16_t* zeros;
  int64_t* offsets;  // [taps] from a place of the source to what its taps meet
  int64_t from_height, from_width, to_height, to_width;
  bool fused;

  int64_t places() const { return g.batch * down.count * across.count; }
  int64_t tiles() const { return (places() + kRows - 1) / kRows; }

  // The tile's pixels of the result, and the runs of a group [taps, kRows]; the last tile repeats its last.
  int locate(int64_t tile, int64_t group, int64_t* pixels, const int16_t** runs) const {
    const int64_t first = tile * kRows, left = places() - first;
    const int rows = static_cast<int>(left < kRows ? left : kRows);
    const int64_t channels = product.groups * product.depth;
    int64_t x = first % across.count, rest = first / across.count;
    int64_t y = rest % down.count, b = rest / down.count;
    for (int r = 0; r < kRows; ++r) {
      pixels[r] =
          (b * to_height + down.first + y * down.spread) * to_width + across.first + x * across.spread;
      const int16_t* image = from + b * from_height * from_width * channels + group * product.depth;
      const int64_t row = y * down.step, column = x * across.step;
      if (row + down.least() >= 0 && row + down.most() < from_height && column + across.least() >= 0 &&
          column + across.most() < from_width) {
        const int16_t* place = image + (row * from_width + column) * channels;
        for (int64_t tap = 0; tap < taps; ++tap) runs[tap * kRows + r] = place + offsets[tap];
      } else {
        for (int64_t n = 0; n < down.taps; ++n) {
          const int64_t of_tap = row + down.offset(n);
          const bool inside = of_tap >= 0 && of_tap < from_height;
          for (int64_t m = 0; m < across.taps; ++m) {
            const int64_t at = column + across.offset(m);
            runs[(n * across.taps + m) * kRows + r] =
                inside && at >= 0 && at < from_width ? image + (of_tap * from_width + at) * channels : zeros;
          }
        }
      }
      if (r + 1 < rows && ++x == across.count) {
        x = 0;
        if (++y == down.count) y = 0, ++b;
      }
    }
    return rows;
  }

  // What a tile further on reads first: beside the last tap of this one.
  void prefetch(const int16_t* const* runs) const {
    constexpr int64_t kAhead = 16;
    const int64_t ahead = kAhead * kRows * across.step * product.groups * product.depth;
    for (int r = 0; r < kRows; ++r) {
      const int16_t* place = runs[(taps - 1) * kRows + r];
      if (place == zeros) continue;
      for (int64_t c = 0; c < product.depth; c += kCacheLine / 2) __builtin_prefetch(place + ahead + c, 0, 2);
    }
  }

  // Tiles [begin, end) of blocks [first, last) of a group.
  Ints run(const Finish& how, Out out, float* to, int64_t begin, int64_t end, int64_t group, int64_t first,
           int64_t last, const int16_t** runs, Ints largest) const {
    int64_t pixels[kRows];
    const int64_t segment_bytes = PackedBlock::segment_bytes(taps, product);
    for (int64_t t = begin; t < end; ++t) {
      const int rows = locate(t, group, pixels, runs);
      prefetch(runs);
      for (int64_t b = first; b < last; ++b) {
        const char* block = packed + block_offset(taps, product, group, b);
        const int64_t column = group * product.columns + b * kBlock;
        out.to = to + column;
        out.gain = how.gain ? how.gain + column : nullptr;
        out.bias = how.bias ? how.bias + column : nullptr;
        out.residual = how.residual ? how.residual + column : nullptr;
        const int64_t columns = product.columns - b * kBlock;
        const auto run_tile = [&](auto run_vectors) __attribute__((always_inline)) {
          return run_vectors(fused, Table{runs}, block, segment_bytes, out, pixels, rows, columns, largest);
        };
        switch (product.vectors(b)) {
          case 1: largest = run_tile(tile<1>); break;
#if defined(__AVX512F__)
          case 3: largest = run_tile(tile<3>); break;
          case 4: largest = run_tile(tile<4>); break;
#endif
          default: largest = run_tile(tile<2>);
        }
      }
    }
    return largest;
  }
};

// The part of the last cache from which on a result goes past it: what else is in it is the network's.
constexpr int64_t kShareOfCache = 8;

// Packed filters that many tiles can keep in a second-level cache: then each tile takes all of them.
constexpr int64_t kKeptBytes = 384 << 10;

VIOPS_INLINE int32_t largest_of(Ints lanes) {
  int32_t largest = 0;
  for (int i = 0; i < kColumns; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// Copies an odd number of channels amid what may be read beyond them; else gives `from` itself.
inline const int16_t* readable(const int16_t* from, int64_t count, bool odd, const Scratch& memory) {
  if (!odd) return from;
  auto* copy = reinterpret_cast<int16_t*>(memory.data());
  std::memcpy(copy, from, static_cast<size_t>(count) * sizeof(*copy));
  copy[count] = 0;
  return copy;
}

// y[p][c] = sum over taps of from[p + tap][c] * w[tap][c]: each group is a channel.
inline Ints convolve_depthwise(const Phase& phase, const Finish& how, Out out, float* to, int64_t begin,
                               int64_t end, int64_t kernel_across, int32_t* sums, int32_t* high,
                               Ints largest) {
  const int64_t channels = phase.product.groups;
  int64_t chain;
  std::memcpy(&chain, phase.packed, sizeof(chain));
  const auto* w = reinterpret_cast<const int16_t*>(phase.packed + PackedBlock::kHeader);
  const Axis &down = phase.down, &across = phase.across;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t x = p % across.count, y = p / across.count % down.count, b = p / across.count / down.count;
    std::memset(sums, 0, static_cast<size_t>(channels) * 4);
    std::memset(high, 0, static_cast<size_t>(channels) * 4);
    const auto close = [&] {
      for (int64_t c = 0; c < channels; ++c) high[c] += sums[c] >> 16, sums[c] &= 0xffff;
    };
    int64_t in_chain = 0;
    for (int64_t n = 0; n < down.taps; ++n) {
      const int64_t row = y * down.step + down.offset(n);
      if (row < 0 || row >= phase.from_height) continue;
      for (int64_t m = 0; m < across.taps; ++m) {
        const int64_t column = x * across.step + across.offset(m);
        if (column < 0 || column >= phase.from_width) continue;
        const int64_t i = down.first_tap + n * down.tap_step, j = across.first_tap + m * across.tap_step;
        const int16_t* other = w + (i * kernel_across + j) * channels;
        const int16_t* from =
            phase.from + ((b * phase.from_height + row) * phase.from_width + column) * channels;
        for (int64_t c = 0; c < channels; ++c) sums[c] += int32_t(from[c]) * int32_t(other[c]);
        if (++in_chain < chain) continue;
        close();
        in_chain = 0;
      }
    }
    const int64_t row = b * phase.to_height + down.first + y * down.spread;
    const int64_t pixel = row * phase.to_width + across.first + x * across.spread;
    out.to = to, out.gain = how.gain, out.bias = how.bias, out.residual = how.residual;
    for (int64_t c = 0; c < channels; c += kColumns) {
      Sums vector = {};
      const int64_t rest = channels - c, size = rest < kColumns ? rest : int64_t(kColumns);
      std::memcpy(&vector.high[0], high + c, static_cast<size_t>(size) * 4);
      std::memcpy(&vector.low[0], sums + c, static_cast<size_t>(size) * 4);
      largest = finish<1>(out, vector, &pixel, 1, rest, largest);
      out.to += kColumns;
      if (out.gain) out.gain += kColumns;
      if (out.bias) out.bias += kColumns;
      if (out.residual) out.residual += kColumns;
    }
  }
  return largest;
}

// A phase without its memory.
inline Phase phase_of(const Geometry& g, const Product& product, Direction direction, int64_t phase) {
  const bool forward = direction == Direction::forward;
  Phase p = {g,
             product,
             axis_of(g, direction, 0, phase / phases_of(g, direction, 1)),
             axis_of(g, direction, 1, phase % phases_of(g, direction, 1)),
             0,
             nullptr,
             nullptr,
             nullptr,
             nullptr,
             forward ? g.height : g.out_height,
             forward ? g.width : g.out_width,
             forward ? g.out_height : g.height,
             forward ? g.out_width : g.width,
             has_fused()};
  p.taps = p.down.taps * p.across.taps;
  return p;
}

// `count` floats, in pixels of so many channels, go to `to`.
inline Out out_of(float factor, float shift, const Finish& how, int64_t count, int64_t channels,
                  const float* to) {
  Out out = {};
  out.factor = factor, out.shift = shift, out.relu = how.relu, out.wide = how.wide, out.channels = channels;
  out.stream = !how.read_next && count * 4 >= last_cache_bytes() / kShareOfCache &&
               channels * 4 % kCacheLine == 0 && reinterpret_cast<uintptr_t>(to) % kCacheLine == 0;
  return out;
}

inline void convolve(const TensorView& from_view, float factor, float shift, const void* packed,
                     const Geometry& g, Direction direction, const Finish& how, const TensorView& to_view) {
  const bool forward = direction == Direction::forward;
  const Product product(g, direction);
  const int64_t from_channels = forward ? g.channels : g.filters,
                to_channels = forward ? g.filters : g.channels;
  const int64_t from_height = forward ? g.height : g.out_height, from_width = forward ? g.width : g.out_width;
  const int64_t to_height = forward ? g.out_height : g.height, to_width = forward ? g.out_width : g.width;
  const int64_t count = g.batch * from_height * from_width * from_channels;
  const int64_t work = g.batch * g.out_height * g.out_width * g.filters * g.group_channels() * g.taps();
  const int threads = work < (1 << 17) ? 1 : max_threads();
  const bool odd = product.depth % 2 && !product.depthwise();
  const Scratch copy(odd ? (count + 1) * 2 : 0);
  const int16_t* from = readable(static_cast<const int16_t*>(from_view.data), count, odd, copy);
  auto* to = static_cast<float*>(to_view.data);

  const int64_t run_bytes = padded(g.taps() * kRows * static_cast<int64_t>(sizeof(void*)));
  const int64_t zero_bytes = padded((product.depth + 1) * 2);
  const int64_t line_bytes = product.depthwise() ? 2 * padded(to_channels * 4) : 0;
  const int64_t offset_bytes = padded(g.taps() * 8);
  const Scratch memory(zero_bytes + offset_bytes + threads * (run_bytes + line_bytes + kCacheLine));
  std::memset(memory.data(), 0, static_cast<size_t>(zero_bytes));
  const auto* zeros = reinterpret_cast<const int16_t*>(memory.data());
  auto* offsets = reinterpret_cast<int64_t*>(memory.data() + zero_bytes);
  char* const own = memory.data() + zero_bytes + offset_bytes;
  constexpr int64_t kStep = kCacheLine / 4;
  auto* largest = reinterpret_cast<int32_t*>(own + threads * (run_bytes + line_bytes));
  for (int part = 0; part < threads; ++part) largest[part * kStep] = 0;

  const int64_t to_count = g.batch * to_height * to_width * to_channels;
  const Out out = out_of(factor, shift, how, to_count, to_channels, to);
  if (!forward && phases_of(g, direction) < g.stride[0] * g.stride[1]) {  // places that no tap reaches
    std::memset(to, 0, static_cast<size_t>(to_count) * sizeof(float));
  }
  const auto* of_phase = static_cast<const char*>(packed);
  for (int64_t phase = 0; phase < phases_of(g, direction); ++phase) {
    Phase p = phase_of(g, product, direction, phase);
    p.packed = of_phase, p.from = from, p.zeros = zeros, p.offsets = offsets;
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      const int64_t row = p.down.offset(tap / p.across.taps), column = p.across.offset(tap % p.across.taps);
      offsets[tap] = (row * from_width + column) * from_channels;
    }
    const auto note = [&](int part, Ints lanes) {
      const int32_t found = largest_of(lanes);
      if (found > largest[part * kStep]) largest[part * kStep] = found;
    };
    if (product.depthwise()) {
      parallel_for(p.places(), threads, [&](int part, int64_t begin, int64_t end) {
        auto* sums = reinterpret_cast<int32_t*>(own + part * (run_bytes + line_bytes) + run_bytes);
        const int64_t line = padded(to_channels * 4) / 4;
        note(part, convolve_depthwise(p, how, out, to, begin, end, g.kernel[1], sums, sums + line, Ints{}));
      });
      continue;
    }
    const bool kept = phase_bytes(p.taps, product) <= kKeptBytes;
    const int64_t items = kept ? 1 : product.groups * product.blocks;  // else one block after the other
    parallel_for(items * p.tiles(), threads, [&](int part, int64_t begin, int64_t end) {
      auto** runs = reinterpret_cast<const int16_t**>(own + part * (run_bytes + line_bytes));
      Ints lanes{};
      while (begin < end) {
        const int64_t item = begin / p.tiles(), first = begin % p.tiles();
        const int64_t last = end - item * p.tiles() < p.tiles() ? end - item * p.tiles() : p.tiles();
        if (!kept) {
          const int64_t group = item / product.blocks, block = item % product.blocks;
          lanes = p.run(how, out, to, first, last, group, block, block + 1, runs, lanes);
        } else if (product.groups == 1) {
          lanes = p.run(how, out, to, first, last, 0, 0, product.blocks, runs, lanes);
        } else {
          for (int64_t t = first; t < last; ++t) {
            for (int64_t group = 0; group < product.groups; ++group) {
              lanes = p.run(how, out, to, t, t + 1, group, 0, product.blocks, runs, lanes);
            }
          }
        }
        begin = item * p.tiles() + last;
      }
      note(part, lanes);
      stream_fence();
    });
    of_phase += phase_bytes(p.taps, product);
  }
  if (how.largest) {
    int32_t bits = 0;
    for (int part = 0; part < threads; ++part) {
      if (largest[part * kStep] > bits) bits = largest[part * kStep];
    }
    *how.largest = bit_cast<float>(bits);
  }
}

}  // namespace
}  // namespace viops::integer_conv
