// Convolutions of one tap, stride 1 and no padding: a few pixels at a time.  Local to the including file.
#pragma once

#include "integer_conv/cpu_convolve.h"
#include "integer_conv/cpu_quantize.h"

namespace viops::integer_conv {
namespace {

// Integers that are made, or fetched, before they are multiplied: they stay in the second-level cache.
constexpr int64_t kIntegerBytes = 64 << 10;

inline bool is_pointwise(const Geometry& g) {
  return g.taps() == 1 && g.stride[0] == 1 && g.stride[1] == 1 && g.padding[0] == 0 && g.padding[1] == 0;
}

// fill(first, count, integers) gives elements [first, first + count) of the images as integers.
template <class Fill>
void convolve_pointwise(const Fill& fill, float factor, float shift, const void* packed, const Geometry& g,
                        Direction direction, const Finish& finish, const TensorView& to_view) {
  const Product product(g, direction);
  const int64_t from_channels = product.groups * product.depth,
                to_channels = product.groups * product.columns;
  const int64_t pixels = g.batch * g.height * g.width;
  const int64_t tiles = (pixels + kRows - 1) / kRows;
  int64_t tiles_of_part = kIntegerBytes / (2 * kRows * from_channels);
  if (tiles_of_part < 1) tiles_of_part = 1;
  const int64_t of_part = tiles_of_part * kRows, integer_bytes = padded((of_part * from_channels + 1) * 2);
  const int threads = pixels * from_channels * product.columns < (1 << 17) ? 1 : max_threads();
  const Scratch zeros((product.depth + 1) * 2);
  std::memset(zeros.data(), 0, static_cast<size_t>((product.depth + 1) * 2));
  const int64_t own = integer_bytes + kCacheLine;
  const Scratch memory(threads * (own + padded(kRows * 8)));
  auto* to = static_cast<float*>(to_view.data);
  const Out out = out_of(factor, shift, finish, pixels * to_channels, to_channels, to);
  const bool kept = phase_bytes(1, product) <= kKeptBytes;
  int64_t offset = 0;
  for (int part = 0; part < threads; ++part) {
    std::memset(memory.data() + part * own + integer_bytes, 0, kCacheLine);
  }
  parallel_for(tiles, threads, [&](int part, int64_t begin, int64_t end) {
    auto* integers = reinterpret_cast<int16_t*>(memory.data() + part * own);
    auto** runs = reinterpret_cast<const int16_t**>(memory.data() + threads * own + part * padded(kRows * 8));
    Ints lanes{};
    for (int64_t tile = begin; tile < end; tile += tiles_of_part) {
      const int64_t last = tile + tiles_of_part < end ? tile + tiles_of_part : end;
      const int64_t first_pixel = tile * kRows, last_pixel = last * kRows < pixels ? last * kRows : pixels;
      const int64_t count = last_pixel - first_pixel;
      fill(first_pixel * from_channels, count * from_channels, integers);
      integers[count * from_channels] = 0;  // beyond an odd number of channels
      Geometry strip = g;
      strip.batch = 1, strip.height = strip.out_height = 1, strip.width = strip.out_width = count;
      Phase phase = phase_of(strip, product, direction, 0);
      phase.packed = static_cast<const char*>(packed);
      phase.from = integers, phase.zeros = reinterpret_cast<const int16_t*>(zeros.data()),
      phase.offsets = &offset;
      Finish shifted = finish;
      if (finish.residual) shifted.residual = finish.residual + first_pixel * to_channels;
      float* const start = to + first_pixel * to_channels;
      const int64_t step = kept ? product.blocks : 1;  // else one block of filters after the other
      for (int64_t group = 0; group < product.groups; ++group) {
        for (int64_t block = 0; block < product.blocks; block += step) {
          lanes = phase.run(shifted, out, start, 0, last - tile, group, block, block + step, runs, lanes);
        }
      }
    }
    const int32_t found = largest_of(lanes);
    std::memcpy(memory.data() + part * own + integer_bytes, &found, sizeof(found));
    stream_fence();
  });
  if (!finish.largest) return;
  int32_t bits = 0;
  for (int part = 0; part < threads; ++part) {
    int32_t found;
    std::memcpy(&found, memory.data() + part * own + integer_bytes, sizeof(found));
    bits = found > bits ? found : bits;
  }
  *finish.largest = bit_cast<float>(bits);
}

inline void convolve_floats(const TensorView& x_view, const Quantization& how, float factor, float shift,
                            const void* packed, const Geometry& g, const Finish& finish,
                            const TensorView& to) {
  const auto* x = static_cast<const float*>(x_view.data);
  const auto fill = [&](int64_t first, int64_t count, int16_t* integers) {
    quantize_part(x + first, how, nullptr, integers, 0, count);
  };
  convolve_pointwise(fill, factor, shift, packed, g, Direction::forward, finish, to);
}

// Images from this size on are read from beyond the caches: one line after the other is faster than six at
// once.
constexpr int64_t kFetchedBytes = 2 << 20;

inline void convolve_any(const TensorView& from, float factor, float shift, const void* packed,
                         const Geometry& g, Direction direction, const Finish& finish, const TensorView& to) {
  const Product product(g, direction);
  const int64_t bytes = g.batch * g.height * g.width * product.groups * product.depth * 2;
  if (!is_pointwise(g) || product.depthwise() || bytes < kFetchedBytes) {
    return convolve(from, factor, shift, packed, g, direction, finish, to);
  }
  const auto* x = static_cast<const int16_t*>(from.data);
  const auto fill = [&](int64_t first, int64_t count, int16_t* integers) {
    std::memcpy(integers, x + first, static_cast<size_t>(count) * sizeof(*integers));
  };
  convolve_pointwise(fill, factor, shift, packed, g, direction, finish, to);
}

}  // namespace
}  // namespace viops::integer_conv
