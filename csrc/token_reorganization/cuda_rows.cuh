// The rows of a tensor on the GPU, whole vectors or single channels at a time.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/cuda.cuh"
#include "common/ptx.cuh"

namespace viops::token_reorganization {
namespace {

constexpr int kThreads = 512;         // of every block of this op
constexpr int kLineBytes = 128;       // what memory moves at a time
constexpr int kPrefetchLines = 1536;  // of a block: its share of an L2 cache of 50 MB

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
struct Narrow {
  static __device__ __forceinline__ T of(double value) { return static_cast<T>(value); }
  static __device__ __forceinline__ T of(float value) { return static_cast<T>(value); }
};
template <>
struct Narrow<__half> {
  static __device__ __forceinline__ __half of(double value) { return of(static_cast<float>(value)); }
  static __device__ __forceinline__ __half of(float value) { return __float2half_rn(value); }
};
template <>
struct Narrow<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 of(double value) { return of(static_cast<float>(value)); }
  static __device__ __forceinline__ __nv_bfloat16 of(float value) { return __float2bfloat16_rn(value); }
};

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

// The sum over a warp, for all its lanes.
template <class A>
__device__ A warp_sum(A value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The V channels that a thread moves at a time: 16 bytes, or a single one.  They stay packed until they are
// used: taken apart at once they would need a register each, and loads would be waited for too early.
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

// The rows [B, N][C] of a tensor.
template <class T>
struct Rows {
  T* data;
  int64_t stride_b, stride_n, stride_c;

  __device__ __forceinline__ T* at(int64_t b, int64_t n, int64_t c) const {
    return data + b * stride_b + n * stride_n + c * stride_c;
  }
};

// By intrinsics, since the compiler takes a plain copy of 16 bytes apart here and there.
template <int V, class T>
__device__ __forceinline__ Vector<T, V> load(const Rows<const T>& rows, int64_t b, int64_t n, int64_t c) {
  return {__ldg(reinterpret_cast<const typename Vector<T, V>::Bits*>(rows.at(b, n, c)))};
}
template <class T, int V>
__device__ __forceinline__ void store(const Rows<T>& rows, int64_t b, int64_t n, int64_t c,
                                      const Vector<T, V>& value) {
  __stcg(reinterpret_cast<typename Vector<T, V>::Bits*>(rows.at(b, n, c)), value.bits);
}

// Asks for the first rows, of which the block reads channels [first, first + count).
template <class T>
__device__ void prefetch_rows(const Rows<const T>& rows, int64_t b, int num_rows, int first, int count) {
  if (rows.stride_c != 1 || count <= 0) return;
  const int lines = (count - 1) / (kLineBytes / static_cast<int>(sizeof(T))) + 1;  // of a row
  const int wanted = min(num_rows, kPrefetchLines / lines) * lines;
  for (int i = threadIdx.x; i < wanted; i += kThreads) {
    const auto* row = reinterpret_cast<const char*>(rows.at(b, i / lines, first));
    prefetch_l2(row + i % lines * kLineBytes);
  }
}

}  // namespace
}  // namespace viops::token_reorganization
