// Floats to integers of one scale.  Local to the including file.
#pragma once

#include "common/rows.h"
#include "integer_conv/integer_conv.h"

namespace viops::integer_conv {
namespace {

typedef int16_t HalfShorts __attribute__((vector_size(kVectorBytes / 2)));

// Bits of the largest magnitude: in the order of magnitudes, then infinity, then NaN.
template <class T>
int32_t largest_bits(const T* x, int64_t begin, int64_t end) {
  typedef MaskVector<float> Bits;
  Bits lanes[4] = {};
  int64_t i = begin;
  for (; i + 4 * kLanes<float> <= end; i += 4 * kLanes<float>) {
    for (int k = 0; k < 4; ++k) {
      const Bits bits = bit_cast<Bits>(load<float>(x + i + k * kLanes<float>)) & 0x7fffffff;
      lanes[k] = bits > lanes[k] ? bits : lanes[k];
    }
  }
  int32_t largest = 0;
  for (int k = 0; k < 4; ++k) {
    for (int j = 0; j < kLanes<float>; ++j) largest = lanes[k][j] > largest ? lanes[k][j] : largest;
  }
  for (; i < end; ++i) {
    const int32_t bits = bit_cast<int32_t>(static_cast<float>(widen(x[i]))) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

template <Rounding kRounding>
VIOPS_INLINE Vector<float> rounded_to_whole(Vector<float> value, Vector<float> noise) {
  typedef MaskVector<float> Mask;
  constexpr float kWhole = 0x1.8p23f;  // added to what is below 2^22, it leaves no room for fractions
  if constexpr (kRounding == Rounding::nearest) return (value + kWhole) - kWhole;
  Vector<float> whole = __builtin_convertvector(__builtin_convertvector(value, Mask), Vector<float>);
  if constexpr (kRounding == Rounding::truncate) return whole;
  whole = whole > value ? whole - 1.0f : whole;  // up with the probability of what is left
  return noise < value - whole ? whole + 1.0f : whole;
}

template <class T, Rounding kRounding>
void quantize_range(const T* x, const float* noise, float inverse, float limit, int16_t* data, int64_t begin,
                    int64_t end) {
  const auto integers = [&](Vector<float> values, Vector<float> random) __attribute__((always_inline)) {
    Vector<float> value = values * inverse;
    value = rounded_to_whole<kRounding>(value, random);
    value = value > limit ? Vector<float>{} + limit : value;
    value = value < -limit ? Vector<float>{} - limit : value;
    return __builtin_convertvector(__builtin_convertvector(value, MaskVector<float>), HalfShorts);
  };
  int64_t i = begin;
  for (; i + kLanes<float> <= end; i += kLanes<float>) {
    const Vector<float> random = kRounding == Rounding::stochastic ? load<float>(noise + i) : Vector<float>{};
    const HalfShorts result = integers(load<float>(x + i), random);
    std::memcpy(data + i, &result, sizeof(result));
  }
  if (i == end) return;
  Vector<float> values{}, random{};
  for (int64_t j = i; j < end; ++j) {
    values[j - i] = static_cast<float>(widen(x[j]));
    if (kRounding == Rounding::stochastic) random[j - i] = noise[j];
  }
  const HalfShorts result = integers(values, random);
  for (int64_t j = i; j < end; ++j) data[j] = result[j - i];
}

// Whole cache lines of int16 a part, so that threads do not share them.
struct Lines {
  int64_t count, lines;
  int threads;
  Lines(int64_t count, int64_t bytes)
      : count(count),
        lines((count + kCacheLine - 1) / kCacheLine),
        threads(bytes < kSerialBytes ? 1 : max_threads()) {}
  // Calls work(part, begin, end) for ranges of elements.
  template <class Work>
  void for_each(const Work& work) const {
    parallel_for(lines, threads, [&](int part, int64_t begin, int64_t end) {
      work(part, begin * kCacheLine, end == lines ? count : end * kCacheLine);
    });
  }
};

template <class T>
float largest_of_dtype(const TensorView& view) {
  const auto* x = static_cast<const T*>(view.data);
  const Lines lines(view.shape[0], view.shape[0] * static_cast<int64_t>(sizeof(T)));
  constexpr int64_t kStep = kCacheLine / 4;
  const Scratch memory(lines.threads * kCacheLine);
  auto* of_part = reinterpret_cast<int32_t*>(memory.data());
  for (int part = 0; part < lines.threads; ++part) of_part[part * kStep] = 0;
  lines.for_each(
      [&](int part, int64_t begin, int64_t end) { of_part[part * kStep] = largest_bits(x, begin, end); });
  int32_t bits = 0;
  for (int part = 0; part < lines.threads; ++part)
    bits = of_part[part * kStep] > bits ? of_part[part * kStep] : bits;
  return bit_cast<float>(bits);
}

inline float largest(const TensorView& x) { VIOPS_FOR_DTYPE(x, largest_of_dtype, x); }

// Elements [begin, end).
template <class T>
void quantize_part(const T* x, const Quantization& how, const float* noise, int16_t* data, int64_t begin,
                   int64_t end) {
  const auto limit = static_cast<float>(how.limit);
  switch (how.rounding) {
    case Rounding::nearest:
      return quantize_range<T, Rounding::nearest>(x, noise, how.inverse, limit, data, begin, end);
    case Rounding::stochastic:
      return quantize_range<T, Rounding::stochastic>(x, noise, how.inverse, limit, data, begin, end);
    default: return quantize_range<T, Rounding::truncate>(x, noise, how.inverse, limit, data, begin, end);
  }
}

template <class T>
void quantize_dtype(const TensorView& x_view, const Quantization& how, const TensorView* noise_view,
                    const TensorView& data_view) {
  const auto* x = static_cast<const T*>(x_view.data);
  const auto* noise = noise_view ? static_cast<const float*>(noise_view->data) : nullptr;
  auto* data = static_cast<int16_t*>(data_view.data);
  Lines(x_view.shape[0], x_view.shape[0] * static_cast<int64_t>(sizeof(T)))
      .for_each([&](int, int64_t begin, int64_t end) { quantize_part(x, how, noise, data, begin, end); });
}

inline void quantize(const TensorView& x, const Quantization& how, const TensorView* noise,
                     const TensorView& data) {
  VIOPS_FOR_DTYPE(x, quantize_dtype, x, how, noise, data);
}

}  // namespace
}  // namespace viops::integer_conv
