// A register tile of a float32 matrix product, powers of two and logarithms.  Local to the including file:
// see cpu_level.h.
#pragma once

#include <cmath>

#include "common/rows.h"

namespace viops {
namespace {

// Rows and vectors of a tile: as many accumulators as the registers hold beside one column and one factor.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int kTileColumns = kTileVectors * kLanes<float>;

// A matrix in memory: element [m][k] is data[m * row + k * column].
struct Factors {
  const float* data;
  int64_t row, column;
};

// c[m][0..kTileColumns) = (kAdd: itself plus) the sum over k < depth of a[m][k] * b[k][0..kTileColumns); rows
// of b and c are ldb and ldc apart.
template <int kRows, bool kAdd>
__attribute__((noinline)) void multiply_tile(Factors a, const float* b, int64_t ldb, int64_t depth, float* c,
                                             int64_t ldc) {
  Vector<float> sums[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      sums[m][v] = kAdd ? load<float>(c + m * ldc + v * kLanes<float>) : Vector<float>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k, a.data += a.column, b += ldb) {
    Vector<float> row[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) row[v] = load<float>(b + v * kLanes<float>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const float factor = a.data[m * a.row];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[m][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store<float>(c + m * ldc + v * kLanes<float>, sums[m][v]);
  }
}

// c [rows, columns] = (kAdd: itself plus) a [rows, depth] b [depth, columns]; columns a multiple of
// kTileColumns.
template <bool kAdd>
void multiply(int64_t rows, int64_t columns, int64_t depth, Factors a, const float* b, int64_t ldb, float* c,
              int64_t ldc) {
  static_assert(kTileRows == 6);
  for (int64_t n = 0; n < columns; n += kTileColumns) {
    Factors part = a;
    float* out = c + n;
    int64_t left = rows;
    for (; left >= kTileRows; left -= kTileRows, part.data += kTileRows * a.row, out += kTileRows * ldc) {
      multiply_tile<kTileRows, kAdd>(part, b + n, ldb, depth, out, ldc);
    }
    switch (left) {
      case 5: multiply_tile<5, kAdd>(part, b + n, ldb, depth, out, ldc); break;
      case 4: multiply_tile<4, kAdd>(part, b + n, ldb, depth, out, ldc); break;
      case 3: multiply_tile<3, kAdd>(part, b + n, ldb, depth, out, ldc); break;
      case 2: multiply_tile<2, kAdd>(part, b + n, ldb, depth, out, ldc); break;
      case 1: multiply_tile<1, kAdd>(part, b + n, ldb, depth, out, ldc); break;
      default: break;
    }
  }
}

// 2^x for x <= 0 (or just above it) to 1e-7 relative; below -126.5 it is 0, and NaN stays NaN.  The
// polynomial is the one of its degree that is nearest to 2^f, f in [-1/2, 1/2], among those that are 1 at 0.
VIOPS_INLINE Vector<float> exp2_of_nonpositive(Vector<float> x) {
  using Bits = MaskVector<float>;
  const Vector<float> lowest = Vector<float>{} - 127.0f;
  const Vector<float> to_integer = Vector<float>{} + 0x1.8p23f;  // adding it rounds to an integer
  x = lowest > x ? lowest : x;
  const Vector<float> shifted = x + to_integer;
  const Vector<float> f = x - (shifted - to_integer);
  Vector<float> power = Vector<float>{} + 1.5353362e-4f;
  power = power * f + 1.33988745e-3f;
  power = power * f + 9.61843736e-3f;
  power = power * f + 5.55033247e-2f;
  power = power * f + 2.40226479e-1f;
  power = power * f + 6.93147203e-1f;
  power = power * f + 1.0f;
  return power * bit_cast<Vector<float>>((bit_cast<Bits>(shifted) << 23) + (127 << 23));  // 2^-127 becomes 0
}
VIOPS_INLINE Vector<double> exp2_of_nonpositive(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// The natural logarithm of x > 0, not subnormal, to 1.2e-7 of the larger of 1 and itself; NaN and infinity
// give NaN.
VIOPS_INLINE Vector<float> log_of_positive(Vector<float> x) {
  using Bits = MaskVector<float>;
  const Bits bits = bit_cast<Bits>(x);
  const Bits exponent = (bits - 0x3f3504f3) >> 23;  // so that the rest is from sqrt(1/2) to sqrt(2)
  const Vector<float> rest = bit_cast<Vector<float>>(bits - (exponent << 23));
  // log(rest) = 2 artanh(s)
  const Vector<float> s = (rest - 1.0f) / (rest + 1.0f), square = s * s;
  Vector<float> series = square * (1.0f / 9) + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  const Vector<float> log_of_rest = 2.0f * s + 2.0f * s * square * series;
  const Vector<float> whole = __builtin_convertvector(exponent, Vector<float>);
  return whole * 0.693147181f + log_of_rest + (x - x);
}
VIOPS_INLINE Vector<double> log_of_positive(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

}  // namespace
}  // namespace viops
