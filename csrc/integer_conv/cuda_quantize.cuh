// Floats to integers of one scale, on the GPU.
#pragma once

#include "common/cuda.cuh"
#include "integer_conv/integer_conv.h"

namespace viops::integer_conv {
namespace {

constexpr int kQuantizeThreads = 256;
constexpr int kInFlight = 4;  // elements of a thread that are loaded before the first is used
constexpr int32_t kInfinity = 0x7f800000;

// As float32.
__device__ __forceinline__ float narrow(float value) { return value; }
__device__ __forceinline__ float narrow(double value) { return static_cast<float>(value); }
__device__ __forceinline__ float narrow(__half value) { return __half2float(value); }
__device__ __forceinline__ float narrow(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ int32_t magnitude_bits(float value) { return __float_as_int(value) & 0x7fffffff; }

// Calls work(i) for the thread's elements i of `count`.
template <class Work>
__device__ __forceinline__ void for_own(int64_t count, const Work& work) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kQuantizeThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kQuantizeThreads + threadIdx.x;
  for (; i + (kInFlight - 1) * step < count; i += kInFlight * step) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) work(i + u * step);
  }
  for (; i < count; i += step) work(i);
}

__global__ void clear_largest_kernel(int32_t* largest) { *largest = 0; }

// The bits of the largest magnitude: in the order of magnitudes, then infinity, then NaN.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    largest_kernel(const T* x, int64_t count, int32_t* largest) {
  VIOPS_SHARED(int32_t, of_warp, [kQuantizeThreads / 32]);
  int32_t bits = 0;
  for_own(count, [&](int64_t i) { bits = max(bits, magnitude_bits(narrow(__ldg(x + i)))); });
  for (int distance = 16; distance > 0; distance /= 2) {
    bits = max(bits, __shfl_xor_sync(~0u, bits, distance));
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % 32 == 0) of_warp[thread / 32] = bits;
  __syncthreads();
  if (thread > 0) return;
  for (int warp = 1; warp < kQuantizeThreads / 32; ++warp) bits = max(bits, of_warp[warp]);
  atomicMax(largest, bits);
}

__device__ __forceinline__ float limit_of(const Scaling& how) {
  return static_cast<float>((1 << how.bits) - 1);
}

// Of the bits of a finite largest magnitude: at least 2^-126, and 1 for zero.
__device__ __forceinline__ float scale_of(int32_t largest, const Scaling& how) {
  constexpr float kSmallest = 0x1p-126f;
  if (largest == 0) return 1;
  if (!how.power_of_two) {
    const float scale = __int_as_float(largest) / limit_of(how);
    return scale < kSmallest ? kSmallest : scale;
  }
  // 2^(exponent - 1) <= largest < 2^exponent; that of subnormal numbers is less, and so is their scale
  const int exponent = (largest >> 23) - 126;
  return __int_as_float((max(exponent - how.bits, -126) + 127) << 23);
}

template <Rounding kRounding>
__device__ __forceinline__ float rounded_to_whole(float value, float noise) {
  if (kRounding == Rounding::nearest) return rintf(value);
  if (kRounding == Rounding::truncate) return truncf(value);
  const float whole = floorf(value);
  return noise < __fadd_rn(value, -whole) ? __fadd_rn(whole, 1.0f) : whole;
}

// Where x is not all finite, the scale is NaN and data zero.
template <class T, Rounding kRounding>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_kernel(const T* x, const float* noise, int64_t count, Scaling how, const int32_t* largest,
                    int16_t* data, float* scale_out) {
  const int32_t bits = *largest;
  const bool finite = bits < kInfinity;
  const float scale = finite ? scale_of(bits, how) : __int_as_float(0x7fc00000);
  const float inverse = 1.0f / scale, limit = limit_of(how);
  if (blockIdx.x == 0 && threadIdx.x == 0) *scale_out = scale;
  for_own(count, [&](int64_t i) {
    const float random = kRounding == Rounding::stochastic ? __ldg(noise + i) : 0.0f;
    const float value = rounded_to_whole<kRounding>(__fmul_rn(narrow(__ldg(x + i)), inverse), random);
    const float clamped = value > limit ? limit : value < -limit ? -limit : value;
    data[i] = finite ? static_cast<int16_t>(__float2int_rz(clamped)) : int16_t(0);
  });
}

}  // namespace
}  // namespace viops::integer_conv
