// Vectors of the width of the CPU level that the including cpu.cpp is built for, half types, and
// copies.  All of it is local to the including file: see cpu_level.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace viops {
namespace {

#define VIOPS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <class To, class From>
VIOPS_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// --- vectors: `Lanes<A>` of one register, A float or double

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
using MaskVector = typename VectorOf<A>::mask;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

// As many as a vector of doubles has lanes.
typedef float FewFloats __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FewFloatBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t FewHalfBits __attribute__((vector_size(kVectorBytes / 4)));

// The same conversions for one element (uint32_t) and for a vector (FloatBits, FewFloatBits): round to
// nearest even.

template <class Bits>
VIOPS_INLINE Bits float_bits_to_bfloat16(Bits bits) {
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

template <class Bits, class Float>
VIOPS_INLINE Float float16_bits_to_float(Bits half) {
  const Bits magnitude = half & 0x7fffu;
  const Bits normal = (magnitude << 13) + 0x38000000u;
  const Bits special = (magnitude << 13) | 0x7f800000u;
  // magnitude * 2^-24 by way of the mantissa of 2^23, so that no float is subnormal: those may be flushed
  const Bits counted = magnitude | 0x4b000000u;
  const Bits subnormal = bit_cast<Bits>((bit_cast<Float>(counted) - 0x1p23f) * 0x1p-24f);
  const Bits finite = magnitude < 0x400u ? subnormal : normal;
  return bit_cast<Float>((magnitude > 0x7bffu ? special : finite) | ((half & 0x8000u) << 16));
}

template <class Bits, class Float>
VIOPS_INLINE Bits float_bits_to_float16(Bits bits) {
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits sign = (bits & 0x80000000u) >> 16;
  const Bits normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // adding 0.5 aligns a subnormal's last bit with the float's and lets the addition round
  const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  const Bits infinity = (magnitude & 0u) | 0x7c00u;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits large = magnitude > 0x7f800000u ? nan : infinity;
  return (magnitude >= 0x477ff000u ? large : finite) | sign;
}

// --- one element: T is float, double, bfloat16 or float16

VIOPS_INLINE float widen(float value) { return value; }
VIOPS_INLINE double widen(double value) { return value; }
VIOPS_INLINE float widen(bfloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
VIOPS_INLINE float widen(float16 value) { return float16_bits_to_float<uint32_t, float>(value.bits); }

template <class T, class A>
struct Narrow {
  static VIOPS_INLINE T of(A value) { return static_cast<T>(value); }
};
template <class A>
struct Narrow<bfloat16, A> {
  static VIOPS_INLINE bfloat16 of(A value) {
    const auto bits = bit_cast<uint32_t>(static_cast<float>(value));
    return {static_cast<uint16_t>(float_bits_to_bfloat16(bits))};
  }
};
template <class A>
struct Narrow<float16, A> {
  static VIOPS_INLINE float16 of(A value) {
    const auto bits = bit_cast<uint32_t>(static_cast<float>(value));
    return {static_cast<uint16_t>(float_bits_to_float16<uint32_t, float>(bits))};
  }
};

// --- a vector of A from and to kLanes<A> elements of T; any alignment

template <class A, class T>
VIOPS_INLINE Vector<A> load(const T* from) {
  Vector<A> lanes;
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = static_cast<A>(widen(from[i]));
  return lanes;
}
template <>
VIOPS_INLINE Vector<float> load<float>(const float* from) {
  Vector<float> lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
template <>
VIOPS_INLINE Vector<double> load<double>(const double* from) {
  Vector<double> lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
VIOPS_INLINE FloatBits load_half_bits(const void* from) {
  HalfBits bits;
  std::memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, FloatBits);
}
template <>
VIOPS_INLINE Vector<float> load<float>(const bfloat16* from) {
  return bit_cast<Vector<float>>(load_half_bits(from) << 16);
}
template <>
VIOPS_INLINE Vector<float> load<float>(const float16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return float16_bits_to_float<FloatBits, Vector<float>>(load_half_bits(from));
#endif
}

// Doubles, by way of floats.
template <>
VIOPS_INLINE Vector<double> load<double>(const float* from) {
  FewFloats lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return __builtin_convertvector(lanes, Vector<double>);
}
VIOPS_INLINE FewFloatBits load_few_half_bits(const void* from) {
  FewHalfBits bits;
  std::memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, FewFloatBits);
}
template <>
VIOPS_INLINE Vector<double> load<double>(const bfloat16* from) {
  return __builtin_convertvector(bit_cast<FewFloats>(load_few_half_bits(from) << 16), Vector<double>);
}
template <>
VIOPS_INLINE Vector<double> load<double>(const float16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__F16C__)
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  const FewFloatBits bits = load_few_half_bits(from);
  return __builtin_convertvector(float16_bits_to_float<FewFloatBits, FewFloats>(bits), Vector<double>);
#endif
}

template <class A, class T>
VIOPS_INLINE void store(T* to, Vector<A> lanes) {
  for (int i = 0; i < kLanes<A>; ++i) to[i] = Narrow<T, A>::of(lanes[i]);
}
template <>
VIOPS_INLINE void store<float>(float* to, Vector<float> lanes) {
  std::memcpy(to, &lanes, sizeof(lanes));
}
template <>
VIOPS_INLINE void store<double>(double* to, Vector<double> lanes) {
  std::memcpy(to, &lanes, sizeof(lanes));
}
template <>
VIOPS_INLINE void store<float>(bfloat16* to, Vector<float> lanes) {
  const HalfBits bits = __builtin_convertvector(float_bits_to_bfloat16(bit_cast<FloatBits>(lanes)), HalfBits);
  std::memcpy(to, &bits, sizeof(bits));
}
template <>
VIOPS_INLINE void store<float>(float16* to, Vector<float> lanes) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
#else
  const FloatBits wide = float_bits_to_float16<FloatBits, Vector<float>>(bit_cast<FloatBits>(lanes));
  const HalfBits bits = __builtin_convertvector(wide, HalfBits);
  std::memcpy(to, &bits, sizeof(bits));
#endif
}

// Doubles, by way of floats.
template <>
VIOPS_INLINE void store<double>(float* to, Vector<double> lanes) {
  const FewFloats floats = __builtin_convertvector(lanes, FewFloats);
  std::memcpy(to, &floats, sizeof(floats));
}
VIOPS_INLINE void store_few_half_bits(void* to, FewFloatBits wide) {
  const FewHalfBits bits = __builtin_convertvector(wide, FewHalfBits);
  std::memcpy(to, &bits, sizeof(bits));
}
template <>
VIOPS_INLINE void store<double>(bfloat16* to, Vector<double> lanes) {
  const FewFloats floats = __builtin_convertvector(lanes, FewFloats);
  store_few_half_bits(to, float_bits_to_bfloat16(bit_cast<FewFloatBits>(floats)));
}
template <>
VIOPS_INLINE void store<double>(float16* to, Vector<double> lanes) {
#if defined(__AVX512F__)
  const __m128i bits = _mm256_cvtps_ph(_mm512_cvtpd_ps(lanes), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
#elif defined(__F16C__)
  const __m128i bits = _mm_cvtps_ph(_mm256_cvtpd_ps(lanes), _MM_FROUND_TO_NEAREST_INT);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bits);
#else
  const FewFloats floats = __builtin_convertvector(lanes, FewFloats);
  store_few_half_bits(to, float_bits_to_float16<FewFloatBits, FewFloats>(bit_cast<FewFloatBits>(floats)));
#endif
}

// --- the first `count` lanes, 0 <= count <= kLanes: no memory beyond them is touched

// Zeros are loaded for the others.
template <class A, class T>
VIOPS_INLINE Vector<A> load_part(const T* from, int64_t count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) return bit_cast<Vector<A>>(_mm512_maskz_loadu_epi64(mask, from));
  if constexpr (sizeof(T) == 4 && sizeof(A) == 4) {
    return bit_cast<Vector<A>>(_mm512_maskz_loadu_epi32(mask, from));
  }
  T lanes[kLanes<A>];
  if constexpr (sizeof(T) == 4 && sizeof(A) == 8) {
    const __m256i bits = _mm256_maskz_loadu_epi32(static_cast<__mmask8>(mask), from);
    std::memcpy(lanes, &bits, sizeof(lanes));
  }
  if constexpr (sizeof(T) == 2 && sizeof(A) == 4) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
    std::memcpy(lanes, &bits, sizeof(lanes));
  }
  if constexpr (sizeof(T) == 2 && sizeof(A) == 8) {
    const __m128i bits = _mm_maskz_loadu_epi16(static_cast<__mmask8>(mask), from);
    std::memcpy(lanes, &bits, sizeof(lanes));
  }
  return load<A>(lanes);
#else
  if (count == kLanes<A>) return load<A>(from);
  T lanes[kLanes<A>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load<A>(lanes);
#endif
}

template <class A, class T>
VIOPS_INLINE void store_part(T* to, Vector<A> values, int64_t count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_epi64(to, mask, bit_cast<__m512i>(values));
  if constexpr (sizeof(T) == 4 && sizeof(A) == 4) {
    return _mm512_mask_storeu_epi32(to, mask, bit_cast<__m512i>(values));
  }
  T lanes[kLanes<A>];
  store<A>(lanes, values);
  if constexpr (sizeof(T) == 4 && sizeof(A) == 8) {
    __m256i bits;
    std::memcpy(&bits, lanes, sizeof(bits));
    return _mm256_mask_storeu_epi32(to, static_cast<__mmask8>(mask), bits);
  }
  if constexpr (sizeof(T) == 2 && sizeof(A) == 4) {
    __m256i bits;
    std::memcpy(&bits, lanes, sizeof(bits));
    return _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), bits);
  }
  if constexpr (sizeof(T) == 2 && sizeof(A) == 8) {
    __m128i bits;
    std::memcpy(&bits, lanes, sizeof(bits));
    return _mm_mask_storeu_epi16(to, static_cast<__mmask8>(mask), bits);
  }
#else
  if (count == kLanes<A>) return store<A>(to, values);
  T lanes[kLanes<A>];
  store<A>(lanes, values);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

VIOPS_INLINE float sum_lanes(Vector<float> lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(lanes);
#elif defined(__AVX2__)
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
  float sum = 0;
  for (int i = 0; i < kLanes<float>; ++i) sum += lanes[i];
  return sum;
#endif
}
VIOPS_INLINE double sum_lanes(Vector<double> lanes) {
  double sum = 0;
  for (int i = 0; i < kLanes<double>; ++i) sum += lanes[i];
  return sum;
}

// --- stores past the caches: the caller fences (stream_fence) before another thread may read

// Stores kBytes past the caches, at a place aligned to them.
template <int kBytes>
VIOPS_INLINE void stream_bytes(void* to, const void* from) {
#if defined(__AVX512F__)
  if constexpr (kBytes == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#endif
#if defined(__AVX2__)
  if constexpr (kBytes == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to),
                               _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }
#endif
#if defined(__x86_64__)
  if constexpr (kBytes == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
  }
#endif
  std::memcpy(to, from, kBytes);
}

// To a place aligned to the bytes that it takes.
template <class A, class T>
VIOPS_INLINE void stream(T* to, Vector<A> lanes) {
  T narrow[kLanes<A>];
  store<A>(narrow, lanes);
  stream_bytes<sizeof(narrow)>(to, narrow);
}

// Copies `bytes`, a multiple of 64, to a 64-byte-aligned place.
VIOPS_INLINE void stream_copy(void* to, const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kVectorBytes) {
    stream_bytes<kVectorBytes>(static_cast<char*>(to) + i, static_cast<const char*>(from) + i);
  }
}

VIOPS_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace viops
