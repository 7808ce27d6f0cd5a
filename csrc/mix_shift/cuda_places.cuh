// How mix-shift's work is dealt to blocks of threads on the GPU, and where values lie.
//
// A block takes a tile of one image and a slab of channels of one group.  The slab's values go to shared
// memory in two tiles, rolled along W and along H, with what lies around them.
#pragma once

#include "common/cuda.cuh"
#include "mix_shift/mix_shift.h"

namespace viops::mix_shift {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRun = 7;       // rows of a thread at a time: the sides of most models' images are multiples
constexpr int kUnrolled = 7;  // kernels up to this size have code of their own
constexpr int kNever = 1 << 30;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
struct Narrow {
  static __device__ __forceinline__ T of(T value) { return value; }
};
template <>
struct Narrow<__half> {
  static __device__ __forceinline__ __half of(float value) { return __float2half_rn(value); }
};
template <>
struct Narrow<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 of(float value) { return __float2bfloat16_rn(value); }
};

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }

// A tensor [B, C, H, W].
template <class T>
struct Images {
  T* data;
  int64_t stride[4];

  __device__ __forceinline__ T* at(int64_t b, int64_t c, int64_t h, int64_t w) const {
    return data + b * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
  }
};

template <class A>
struct Filters {
  const A *lr, *td, *bias;  // [K], [K] or null, [C] or null
};

struct Group {
  int64_t offset;                // of its weights within [K]
  int kernel, shift_h, shift_w;  // shifts reduced to [0, H) and [0, W)
};

// The channels of a slab, all of one group.
struct Slab {
  int group, channels;
  int64_t first;
};

// The places of a tile.
struct Spot {
  int64_t image;
  int row, column;    // of its first place
  int rows, columns;  // that lie within the image
};

struct Deal {
  int64_t batch, channels, group_size;
  int groups, height, width;
  int rows, columns, tile_channels;  // of a tile
  int runs;                          // of kRun rows, which cover the rows of a tile
  int tiles_down, tiles_across;
  int slabs_in_group, slabs;
  int most_tiled;  // groups of larger kernels read global memory, without tiles
  // Of a layer norm: its block has u of this many slabs at a time, a place's values stage_stride apart.
  int chunk_slabs, stage_stride;
  bool adjoint;  // the gradient: convolutions of zero-padded images with flipped kernels, rolled afterwards
  Group group[kMaxGroups];

  __device__ __forceinline__ Slab slab(int index) const {
    const int g = index / slabs_in_group, within = index - g * slabs_in_group;
    const int64_t first = g * group_size + static_cast<int64_t>(within) * tile_channels;
    const int64_t end = min(min((g + 1) * group_size, channels), first + tile_channels);
    return {g, static_cast<int>(end - first), first};
  }
  __device__ __forceinline__ Spot spot(int64_t index) const {
    const int64_t above = index / tiles_across;
    const int row = static_cast<int>(above % tiles_down) * rows;
    const int column = static_cast<int>(index % tiles_across) * columns;
    return {above / tiles_down, row, column, min(rows, height - row), min(columns, width - column)};
  }
};

// One axis of a tile and of what lies around it.  Output v of the tile is made of values from(v), from(v) +
// 1,
// ..., from(v) + 2 radius.  Where the outputs of a gradient turn from the image's end to its begin, values
// beyond the end and before the begin, zeros, are between.
struct Axis {
  int size, radius;
  int start;  // the place that value 0 is of, before the roll
  int roll;   // to the right, of the values
  int turn;   // the first output that the image's begin makes again

  __device__ __forceinline__ static Axis of(int size, int radius, int first, int shift, bool adjoint) {
    if (!adjoint || shift == 0) return {size, radius, first - radius, shift, kNever};
    const int64_t rolled = static_cast<int64_t>(first) + shift;
    const int begin = static_cast<int>(rolled < size ? rolled : rolled - size);
    return {size, radius, begin - radius, 0, size - begin};
  }
  __device__ __forceinline__ int from(int output) const {
    return output < turn ? output : output + 2 * radius;
  }
  // How many values so many outputs are made of.
  __device__ __forceinline__ int values(int outputs) const { return from(outputs - 1) + 2 * radius + 1; }
  // The place, before the roll, of the first value of an output.
  __device__ __forceinline__ int begin(int output) const {
    return output < turn ? start + output : output - turn - radius;
  }
  // The place in memory of a value, or -1: it is a zero.
  __device__ __forceinline__ int place(int value) const {
    const int rolled = value < turn + 2 * radius ? start + value : value - turn - 3 * radius;
    if (rolled < 0 || rolled >= size) return -1;
    return rolled < roll ? rolled - roll + size : rolled - roll;
  }
  // The first and the last but one of the taps of an output that do not meet zeros.
  __device__ __forceinline__ int first_tap(int output) const { return max(0, -begin(output)); }
  __device__ __forceinline__ int last_tap(int output) const {
    return min(2 * radius + 1, size - begin(output));
  }
};

// Both axes of a tile.
struct Axes {
  Axis down, across;

  __device__ __forceinline__ static Axes of(const Deal& deal, const Spot& spot, int radius, int shift_h,
                                            int shift_w) {
    return {Axis::of(deal.height, radius, spot.row, shift_h, deal.adjoint),
            Axis::of(deal.width, radius, spot.column, shift_w, deal.adjoint)};
  }
};

// Columns of a tile in memory: an odd number, so that the rows of a plane begin at different banks.
template <bool kChannelsLast>
__host__ __device__ constexpr int pitch_of(int columns) {
  return kChannelsLast ? columns : columns | 1;
}

// Values in shared memory: [rows, columns, channels] where kChannelsLast, else [channels, rows, pitch].
template <class A, bool kChannelsLast>
struct Tile {
  A* data;
  int rows, columns, channels;
  Axes axes;

  __device__ __forceinline__ int row_stride() const {
    return kChannelsLast ? columns * channels : pitch_of<false>(columns);
  }
  __device__ __forceinline__ int column_stride() const { return kChannelsLast ? channels : 1; }
  __device__ __forceinline__ int channel_stride() const { return kChannelsLast ? 1 : rows * row_stride(); }
  __device__ __forceinline__ int size() const { return pitch_of<kChannelsLast>(columns) * rows * channels; }

  __device__ __forceinline__ const A* at(int channel, int row, int column) const {
    return data + channel * channel_stride() + row * row_stride() + column * column_stride();
  }

  // Lanes go along what is side by side in memory.
  template <class T>
  __device__ __forceinline__ void load(const Images<const T>& images, int64_t image, int64_t channel) const {
    const T* const from = images.at(image, channel, 0, 0);
    if (kChannelsLast) {
#pragma unroll 2
      for (int i = warp(); i < rows * columns; i += kWarps) {
        const int row = i / columns, h = axes.down.place(row), w = axes.across.place(i - row * columns);
        const T* const place = from + h * images.stride[2] + w * images.stride[3];
        for (int c = lane(); c < channels; c += 32) {
          data[i * channels + c] =
              h >= 0 && w >= 0 ? static_cast<A>(widen(__ldg(place + c * images.stride[1]))) : A(0);
        }
      }
    } else {
#pragma unroll 2
      for (int i = warp(); i < channels * rows; i += kWarps) {
        const int c = i / rows, h = axes.down.place(i - c * rows);
        const T* const line = from + c * images.stride[1] + h * images.stride[2];
        for (int column = lane(); column < columns; column += 32) {
          const int w = axes.across.place(column);
          data[i * row_stride() + column] =
              h >= 0 && w >= 0 ? static_cast<A>(widen(__ldg(line + w * images.stride[3]))) : A(0);
        }
      }
    }
  }
};

// The same values where they have no tile: read from global memory.
template <class T>
struct Direct {
  const T* data;  // of the image and the slab's first channel
  int64_t channel_stride, row_stride, column_stride;
  Axes axes;

  // A value that is no zero.
  __device__ __forceinline__ auto value(int channel, int row, int column) const {
    return widen(__ldg(data + channel * channel_stride + axes.down.place(row) * row_stride +
                       axes.across.place(column) * column_stride));
  }
};

}  // namespace
}  // namespace viops::mix_shift
