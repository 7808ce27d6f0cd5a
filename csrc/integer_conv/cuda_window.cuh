// Convolutions as the products of two matrices, on the GPU: how blocks share them, and where taps lead.
#pragma once

#include "integer_conv/cuda_digits.cuh"
#include "integer_conv/integer_conv.h"

namespace viops::integer_conv {
namespace {

// How blocks share a call: each has a tile of a group's result, in a phase, over a part of the depth.  A
// phase may have fewer rows than the most.
struct Tiling {
  int64_t row_tiles, column_tiles, splits, phases, groups;
  int64_t split_depth;  // of each split but the last, a multiple of kDepth
  __host__ __device__ int64_t blocks() const { return row_tiles * column_tiles * splits * phases * groups; }
};

// Of one block.
struct Part {
  int64_t first_row, first_column, first_depth, phase, group;
  __device__ __forceinline__ Part(const Tiling& tiling, int64_t block) {
    first_column = block % tiling.column_tiles * kTile, block /= tiling.column_tiles;
    first_row = block % tiling.row_tiles * kTile, block /= tiling.row_tiles;
    first_depth = block % tiling.splits * tiling.split_depth, block /= tiling.splits;
    phase = block % tiling.phases, group = block / tiling.phases;
  }
};

// One axis of a phase: result places first + t * spread, t < count, take source places t * step + offset(n),
// for the taps first_tap + n * tap_step, n < taps.
struct Axis {
  int first, spread, count, step, taps, first_tap, tap_step, offset0, offset_step;
  __device__ __forceinline__ int offset(int n) const { return offset0 + n * offset_step; }
  __device__ __forceinline__ int tap(int n) const { return first_tap + n * tap_step; }
};

// One axis of a convolution.  Of y from x there is one phase; a gradient to x has one for each remainder of
// places by the stride, whose taps are those that reach such places.
struct Window {
  int size, out_size;  // of x and y
  int kernel, stride, padding, dilation;

  __host__ __device__ int phases(Direction direction) const {
    if (direction == Direction::forward) return 1;
    return stride < size ? stride : size;
  }
  // The most result places that a phase has.
  __host__ __device__ int most_places(Direction direction) const {
    return direction == Direction::forward ? out_size : (size - 1) / stride + 1;
  }

  __device__ __forceinline__ Axis axis(Direction direction, int phase) const {
    if (direction == Direction::forward) return {0, 1, out_size, stride, kernel, 0, 1, -padding, dilation};
    // x place = phase + t * stride takes y place (phase + padding - tap * dilation) / stride + t, if whole
    Axis found = {phase, stride, (size - 1 - phase) / stride + 1, 1, 0, 0, 0, 0, 0};
    found.tap_step = stride / common_divisor(stride, dilation);
    found.offset_step = -(dilation / (stride / found.tap_step));
    for (int tap = 0; tap < kernel && tap < found.tap_step; ++tap) {
      const int64_t reach = phase + padding - static_cast<int64_t>(tap) * dilation;
      if (reach % stride != 0) continue;
      found.first_tap = tap;
      found.offset0 = static_cast<int>(reach / stride);
      found.taps = (kernel - 1 - tap) / found.tap_step + 1;
      break;
    }
    return found;
  }

 private:
  static __device__ __forceinline__ int common_divisor(int a, int b) {
    while (b) {
      const int rest = a % b;
      a = b, b = rest;
    }
    return a;
  }
};

// Puts element e of a chunk that is filled from its first on.
__device__ __forceinline__ void put_element(Chunk& chunk, int e, int16_t value) {
  const auto bits = static_cast<uint32_t>(static_cast<uint16_t>(value));
  chunk.words[e / 2] = e % 2 ? chunk.words[e / 2] | bits << 16 : bits;
}

// Zeros where there is nothing to read.
__device__ __forceinline__ int16_t load_element(const int16_t* from) {
  return from ? __ldg(from) : int16_t(0);
}
// The same of eight integers, 16-byte aligned.
__device__ __forceinline__ Chunk load_chunk(const int16_t* from) {
  if (!from) return {};
  const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(from));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}

}  // namespace
}  // namespace viops::integer_conv
