// The values of [B, C, S] tensors on the GPU, and which of them a thread has.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/cuda.cuh"

namespace viops::batch_channel_norm {
namespace {

constexpr int kThreads = 256;     // of a block that walks values
constexpr int kBlocksAtOnce = 2;  // of a multiprocessor, at least

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

// The V elements that a thread moves at a time, 16 bytes or a single one; packed until they are used.
template <class T, int V>
struct Vector {
  using Bits = std::conditional_t<V == 1, T, uint4>;
  static_assert(sizeof(Bits) == sizeof(T) * V);
  Bits bits;

  __device__ __forceinline__ T get(int v) const {
    T value;
    memcpy(&value, reinterpret_cast<const char*>(&bits) + v * sizeof(T), sizeof(T));
    return value;
  }
  __device__ __forceinline__ void set(int v, T value) {
    memcpy(reinterpret_cast<char*>(&bits) + v * sizeof(T), &value, sizeof(T));
  }
};

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load(const T* from) {
  return {__ldg(reinterpret_cast<const typename Vector<T, V>::Bits*>(from))};
}
template <int V, class T>
__device__ __forceinline__ void store(T* to, const Vector<T, V>& value) {
  __stcg(reinterpret_cast<typename Vector<T, V>::Bits*>(to), value.bits);
}

// How values are dealt out.  In planes, a team of `columns` threads has a piece of one plane; in
// channels_last a block has `columns` vectors of channels, its threads in rows over the places of a piece.
struct Deal {
  int64_t batch, channels, places;
  int64_t length;  // places of a piece, a multiple of V in planes; the last has fewer
  int64_t blocks;
  int pieces, columns;
  int wide;  // blocks side by side over the channels, in channels_last
};

template <int V, bool kChannelsLast>
struct Share {
  static constexpr int kOwn = kChannelsLast ? V : 1;  // channels of a thread
  int64_t b, c, first, last, step;                    // its vectors: first, first + step, ... below last
  int piece, row, rows;                               // row: of the threads that have the same channels
  bool any;

  __device__ Share(const Deal& deal, int64_t block) {
    const int thread = static_cast<int>(threadIdx.x), column = thread % deal.columns;
    if (kChannelsLast) {
      row = thread / deal.columns, rows = kThreads / deal.columns;
      c = (block % deal.wide * deal.columns + column) * V;
      piece = static_cast<int>(block / deal.wide % deal.pieces);
      b = block / deal.wide / deal.pieces;
      any = row < rows && c < deal.channels;
    } else {
      row = column, rows = deal.columns;
      const int64_t team = block * (kThreads / deal.columns) + thread / deal.columns;
      piece = static_cast<int>(team % deal.pieces);
      c = team / deal.pieces % deal.channels;
      b = team / deal.pieces / deal.channels;
      any = b < deal.batch;
    }
    const int64_t begin = piece * deal.length, end = min(begin + deal.length, deal.places);
    if (kChannelsLast) {
      first = (b * deal.places + begin + row) * deal.channels + c;
      last = (b * deal.places + end) * deal.channels;
      step = rows * deal.channels;
    } else {
      first = (b * deal.channels + c) * deal.places + begin + row * V;
      last = (b * deal.channels + c) * deal.places + end;
      step = static_cast<int64_t>(deal.columns) * V;
    }
    if (!any) first = last = 0;
  }

  // Of tensors [B, C] and [C]: where the thread's first channel is.
  __device__ __forceinline__ int64_t plane(const Deal& deal) const { return b * deal.channels + c; }
};

// The thread's values of a tensor [.., C], from its first channel on.
template <class A, int kOwn>
struct Own {
  A values[kOwn];

  __device__ __forceinline__ Own() {}
  __device__ __forceinline__ Own(const A* from, bool any) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) values[i] = any ? from[i] : A(0);
  }
  // Of the v-th element of a vector.
  __device__ __forceinline__ A at(int v) const { return values[kOwn == 1 ? 0 : v]; }
  __device__ __forceinline__ A& operator[](int i) { return values[i]; }
};

template <class R>
__device__ __forceinline__ R warp_sum(R value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The sums over the threads of a team, or of a column, for all of them; room is the block's, [kThreads].
template <int V, bool kChannelsLast>
__device__ double sum_over_rows(const Deal& deal, const Share<V, kChannelsLast>& share, double value,
                                double* room) {
  const int thread = static_cast<int>(threadIdx.x);
  if (!kChannelsLast) {
    value = warp_sum(value);
    if (deal.columns == 32) return value;
    __syncthreads();  // the room may be in use
    if (thread % 32 == 0) room[thread / 32] = value;
    __syncthreads();
    double sum = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += room[warp];
    return sum;
  }
  __syncthreads();
  room[thread] = value;
  __syncthreads();
  for (int rows = share.rows; rows > 1;) {
    const int half = (rows + 1) / 2;
    if (share.row < rows - half) room[thread] += room[thread + half * deal.columns];
    rows = half;
    __syncthreads();
  }
  return room[thread % deal.columns];
}

}  // namespace
}  // namespace viops::batch_channel_norm
