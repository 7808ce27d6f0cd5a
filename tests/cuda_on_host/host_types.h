// CUDA's vector types and half types.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#define VIOPS_VECTOR_TYPES(name, type)                                                   \
  struct name##1 { type x; };                                                            \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                               \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##1 make_##name##1(type x) { return {x}; }                                  \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                       \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

VIOPS_VECTOR_TYPES(char, signed char)
VIOPS_VECTOR_TYPES(uchar, unsigned char)
VIOPS_VECTOR_TYPES(short, short)
VIOPS_VECTOR_TYPES(ushort, unsigned short)
VIOPS_VECTOR_TYPES(int, int)
VIOPS_VECTOR_TYPES(uint, unsigned)
VIOPS_VECTOR_TYPES(longlong, long long)
VIOPS_VECTOR_TYPES(ulonglong, unsigned long long)
VIOPS_VECTOR_TYPES(float, float)
VIOPS_VECTOR_TYPES(double, double)
#undef VIOPS_VECTOR_TYPES

struct float3 {
  float x, y, z;
};
struct int3 {
  int x, y, z;
};

inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16;
  const unsigned exponent = value.bits >> 10 & 0x1fu, mantissa = value.bits & 0x3ffu;
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(static_cast<float>(mantissa) * 0x1p-24f));
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Rounds to nearest, ties to even; NaN becomes the one NaN that the device makes.
inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const auto result = [&](unsigned half) { return __half{static_cast<uint16_t>(sign | half)}; };
  if (magnitude > 0x7f800000u) return __half{0x7fff};
  if (magnitude >= 0x477ff000u) return result(0x7c00u);  // what rounds to 65536 and beyond
  if (magnitude < 0x38800000u) {                         // subnormal: a multiple of 2^-24
    const float aligned = __uint_as_float(magnitude) + 0.5f;
    return result(__float_as_uint(aligned) - 0x3f000000u);
  }
  const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return result((rounded - 0x38000000u) >> 13);
}

inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// Of a double, rounded once: the float in between is rounded to odd.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || nearest != nearest) return nearest;
  const unsigned bits = __float_as_uint(nearest);
  if (bits & 1u) return nearest;
  const bool too_large = std::abs(static_cast<double>(nearest)) > std::abs(value);
  return __uint_as_float(too_large ? bits - 1 : bits + 1);
}

inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half __double2half(double value) { return __float2half_rn(round_to_odd(value)); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat16 __double2bfloat16(double value) { return __float2bfloat16_rn(round_to_odd(value)); }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
