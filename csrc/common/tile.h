// A register tile of a float32 matrix product, and 2^x.  Local to the including file: see cpu_level.h.
#pragma once

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

// 2^x for x <= 0 (or just above it) to 2e-7 relative; below -126 it is 0, and NaN stays NaN.  The polynomial
// is the Taylor series of 2^f, f in [-1/2, 1/2], to its seventh term.
VIOPS_INLINE Vector<float> exp2_of_nonpositive(Vector<float> x) {
  using Bits = MaskVector<float>;
  const Vector<float> lowest = Vector<float>{} - 126.0f;
  const Vector<float> to_integer = Vector<float>{} + 0x1.8p23f;  // adding it rounds to an integer
  const Bits vanishes = x < lowest;
  x = vanishes ? lowest : x;
  const Vector<float> shifted = x + to_integer;
  const Vector<float> f = x - (shifted - to_integer);
  Vector<float> power = Vector<float>{} + 1.5403530e-4f;
  power = power * f + 1.3333558e-3f;
  power = power * f + 9.6181291e-3f;
  power = power * f + 5.5504109e-2f;
  power = power * f + 2.4022651e-1f;
  power = power * f + 6.9314718e-1f;
  power = power * f + 1.0f;
  power *= bit_cast<Vector<float>>((bit_cast<Bits>(shifted) << 23) + (127 << 23));
  return vanishes ? Vector<float>{} : power;
}

}  // namespace
}  // namespace viops
